"""Written steps, sentence encoders, and soft labels, which equal a slow loop."""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config import FinetuneConfig, NarrateConfig, SweepConfig, override
from pipelines.data.narration import encoders
from pipelines.data.narration.encoders import ScoreArray, index_steps
from pipelines.data.narration.labels import Labeller, LabelMeta, soft_labels
from pipelines.data.narration.steps import check_count, digest, read_steps, text_ids
from pipelines.errors import UserError
from pipelines.tuning import draws, search_space
from pipelines.tuning.trials import objective_of, trial_of

TEXTS = ["Whisk the eggs", "Heat the pan", "Pour the eggs into the pan", "Grate some cheese", "Fold the omelette"]


def slow_labels(scores: list[float], top_k: int, temperature: float) -> dict[int, float]:
    """The method in the words of the paper: softmax over all steps, keep the K largest, make them sum to 1.

    A step that is not alike is none of them.
    """
    largest = max(scores)
    shares = [math.exp((score - largest) / temperature) for score in scores]
    shares = [share / sum(shares) for share in shares]
    kept = sorted(range(len(scores)), key=lambda step: (-scores[step], step))[:top_k]
    alike = [step for step in kept if scores[step] > 0]
    return {step: shares[step] / sum(shares[each] for each in alike) if step in alike else 0.0 for step in kept}


def scores(rows: int, steps: int, ties: bool) -> ScoreArray:
    found = np.random.default_rng(0).uniform(-1, 1, (rows, steps)).astype(np.float32)
    return np.round(found, 1) if ties else found


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 0.05), (3, 0.05), (3, 5.0), (50, 0.5)])
def test_labels_equal_a_slow_loop(top_k: int, temperature: float, ties: bool) -> None:
    score_RS = scores(40, 50, ties)
    steps_RK, share_RK = soft_labels(score_RS, top_k, temperature)
    for row, steps, shares in zip(score_RS.tolist(), steps_RK.tolist(), share_RK.tolist(), strict=True):
        expected = slow_labels(row, top_k, temperature)
        assert steps == list(expected)
        assert shares == pytest.approx(list(expected.values()), rel=1e-4, abs=1e-7)
    np.testing.assert_allclose(share_RK.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("unlike", [0.0, -0.3])
@pytest.mark.parametrize("temperature", [0.05, 5.0])
def test_steps_that_are_not_alike_have_no_share(temperature: float, unlike: float) -> None:
    score_RS = np.full((3, 6), unlike, np.float32)
    score_RS[0, 4], score_RS[1, [2, 5]] = 0.4, (0.1, 0.2)
    steps_RK, share_RK = soft_labels(score_RS, 3, temperature)
    assert (steps_RK[0, 0], share_RK[0].tolist()) == (4, [1.0, 0.0, 0.0])
    assert steps_RK[1, :2].tolist() == [5, 2]
    assert share_RK[1, 1] > 0
    assert share_RK[1].tolist() == pytest.approx(list(slow_labels(score_RS[1].tolist(), 3, temperature).values()))
    assert share_RK[2].tolist() == [0.0, 0.0, 0.0]


def test_a_small_temperature_does_not_overflow() -> None:
    _, share_RK = soft_labels(scores(5, 50, False), 3, 1e-6)
    assert share_RK[:, 0].tolist() == [1.0] * 5


def segments(*texts: str) -> pa.Table:
    return pa.table({"text": list(texts), "row": list(range(len(texts)))})


def test_what_is_said_is_labelled_by_words_in_common() -> None:
    index = pickle.loads(pickle.dumps(index_steps("tfidf", TEXTS, "cpu")))
    # Steps 2 and 5 of seven have no text.
    ids = np.array([0, 1, 3, 4, 6])
    found = Labeller(index, ids, 2, 0.05)(
        segments("now whisk those EGGS", "um, okay so", "some chéese to grate", "zzz")
    )
    assert [None if steps is None else steps[0] for steps in found["steps"].to_pylist()] == [0, None, 4, None]
    assert found["probabilities"].null_count == 2
    assert sum(found["probabilities"][0].as_py()) == pytest.approx(1)
    assert found["row"].to_pylist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("steps", "said", "nothing"),
    [
        (
            [f"{verb} the {thing} to the {place}" for verb, thing, place in zip(
                ["Fill", "Move", "Put", "Add", "Bring", "Carry"],
                ["glass", "pan", "lid", "salt", "water", "plate"],
                ["top", "back", "bottom", "bowl", "boil", "table"], strict=True)],
            ["fill it", "move it", "put it", "now the salt", "to the boil", "a table"],
            "hello to the world",
        ),
        (
            [f"{thing} in die {place} geben" for thing, place in zip(
                ["Salz", "Mehl", "Milch", "Zucker"], ["Pfanne", "Form", "Tasse", "Dose"], strict=True)],
            ["das Salz", "in die Form", "mit Milch", "die Dose"],
            "wir gehen in die Stadt",
        ),
    ],
)  # fmt: skip
def test_words_that_many_steps_have_are_like_none_in_any_language(
    steps: list[str], said: list[str], nothing: str
) -> None:
    index = index_steps("tfidf", steps, "cpu")
    assert index.blank == 0
    assert index.similarities(said).argmax(1).tolist() == list(range(len(steps)))
    assert index.similarities([nothing]).max() == 0
    assert index_steps("tfidf", [*steps, steps[0].split()[1]], "cpu").blank == 1


def test_similarity_is_the_cosine() -> None:
    index = index_steps("tfidf", TEXTS, "cpu")
    assert np.diag(index.similarities(TEXTS)) == pytest.approx(np.ones(len(TEXTS)), abs=1e-6)
    said = ["pour eggs", "heat"]
    vectors = index.encoder.embed(said).toarray()
    steps = index.encoder.embed(TEXTS).toarray()
    slow = [[float(sum(a * b for a, b in zip(left, right, strict=True))) for right in steps] for left in vectors]
    np.testing.assert_allclose(index.similarities(said), slow, atol=1e-6)
    assert index.digest.startswith("tfidf scikit-learn ")


def test_encoders_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="encoder is 'tfidf': no step has a word of at least two letters"):
        index_steps("tfidf", ["a", "?"], "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    encoders.check_encoder("tfidf")
    with pytest.raises(
        UserError, match=r"encoder is 'some-model': .* is missing; .* 's5-video\[narration\]', or give tfidf"
    ):
        encoders.check_encoder("some-model")


# --- steps ----------------------------------------------------------------------------------------------------------


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_every_form_of_steps_gives_the_same_ids(tmp_path: Path) -> None:
    csv = write(
        tmp_path / "a.csv", 'task,step,text\nOmelette,1,Whisk the eggs\nOmelette,2,\nTea,1,"Boil  water, hot"\n'
    )
    titled = {"Omelette": ["Whisk the eggs", None], "Tea": [{"text": "Boil water, hot"}]}
    listed = [
        [{"headline": "Whisk the eggs", "text": "With a fork."}, {"headline": " \n"}],
        [{"text": "Boil water, hot"}],
    ]
    found = [read_steps(csv), *(read_steps(write(tmp_path / "b.json", json.dumps(x))) for x in (titled, listed))]
    for steps in found:
        assert [" ".join(step.text.split()) for step in steps] == ["Whisk the eggs", "", "Boil water, hot"]
        assert text_ids(steps) == [0, 2]
    assert [step.task for step in found[1]] == ["Omelette", "Omelette", "Tea"]
    assert [step.task for step in found[2]] == ["0", "0", "1"]
    assert found[0][2].location == "a.csv line 4"
    assert digest(found[1]) != digest(found[2])
    with pytest.raises(UserError, match="top_k is 3: there are 2 steps with text; give at most 2"):
        check_count(found[0], 3)


@pytest.mark.parametrize("headline", [None, "", " \n"])
def test_a_step_without_headline_has_its_text(headline: str | None, tmp_path: Path) -> None:
    tasks = {"Tea": [{"headline": headline, "text": "Boil water"}, {"headline": "Pour", "text": "Boil water"}]}
    found = read_steps(write(tmp_path / "s.json", json.dumps(tasks)))
    assert [step.text for step in found] == ["Boil water", "Pour"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.csv", "task,words\nx,y\n", "steps is '.*': s.csv has an unknown column 'words'"),
        ("s.csv", "task,text\nx\n", "s.csv line 2 has 1 fields, not as many fields as the header"),
        ("s.csv", "task,text\n,y\n", "s.csv line 2 has task ''; it must not be empty"),
        ("s.csv", "task,text\nx,\n", "none of its 1 steps has a text"),
        ("s.json", "{", "steps is '.*s.json': it is no JSON"),
        ("s.json", "3", "neither a list of tasks nor an object of tasks"),
        ("s.json", '{"Tea": "Boil"}', "task 'Tea' is str, not a list of steps"),
        ("s.json", '{"Tea": ["Boil", 3]}', "task 'Tea' step 2 is 3: give a text, or an object with a headline"),
        ("s.json", '{"Tea": [{"headline": 0, "text": "Boil"}]}', "task 'Tea' step 1 is 0: give a text"),
        ("s.json", "[]", "none of its 0 steps has a text"),
        ("s.txt", "", "give a file that ends in .csv or .json"),
    ],
)
def test_steps_that_are_none_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_steps(write(tmp_path / name, content))


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k is 0: give at least 1"),
        ({"temperature": 0}, "temperature is 0.0: give a positive number"),
        ({"shortest_s": -1}, "shortest_s is -1.0: give 0 or more seconds"),
        ({"encoder": ""}, "encoder is '': give tfidf, or a model of sentence-transformers"),
    ],
)
def test_mistakes_in_settings_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(NarrateConfig(), changes)


def test_labels_belong_to_the_task_that_learns_them() -> None:
    with pytest.raises(UserError, match=r"labels is '': task distant learns them; give the --out of `narrate`"):
        override(FinetuneConfig(), {"task": "distant"})
    with pytest.raises(UserError, match=r"labels is 'out': task class has none; leave it out, or give --task distant"):
        override(FinetuneConfig(), {"labels": "out"})


def test_a_sweep_compares_distant_supervision_by_its_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes: dict[str, object] = {"stages": "finetune", "finetune.task": "distant", "finetune.labels": "out/narrate"}
    changes |= {"finetune.features": "out/features", "finetune.model.backbone.frozen": True}
    config = override(SweepConfig(space=("optim.lr=1e-3,1e-4",)), changes)
    objective = objective_of(config)
    assert (objective.metric, objective.mode) == ("val/loss", "min")
    for values in draws.settings_of(config, search_space.parse(config)):
        settings = trial_of(config, values, seed=0).stages["finetune"]
        assert isinstance(settings, FinetuneConfig)
        assert (settings.labels, settings.features) == (f"{tmp_path}/out/narrate", f"{tmp_path}/out/features")


def test_labels_are_known_by_all_that_made_them() -> None:
    values = {"manifest": "m", "narration": "n", "steps": "s", "encoder": "e", "top_k": 3, "temperature": 0.05}
    meta = LabelMeta(**values, shortest_s=9.0)  # type: ignore[arg-type]
    others = [values | {name: "other"} for name in ("manifest", "narration", "steps", "encoder")]
    others += [values | {"top_k": 4}, values | {"temperature": 0.1}]
    digests = {LabelMeta(**other, shortest_s=9.0).digest for other in others}  # type: ignore[arg-type]
    assert len(digests | {meta.digest}) == 7
