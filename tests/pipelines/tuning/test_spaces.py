"""Search spaces: values of any type, ready spaces, files, draws, proposals, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines import preflight
from pipelines.config import SweepConfig, override
from pipelines.errors import UserError
from pipelines.tuning import draws, ready_spaces, search_space
from pipelines.tuning.plans import examples
from pipelines.tuning.search_space import Choice, parse
from pipelines.tuning.trials import trial_of


def dimension(entry: str, stages: str = "finetune") -> search_space.Dimension:
    config = override(SweepConfig(), {"space": (entry,), "stages": stages})
    return next(iter(parse(config).values()))


def settings(*space: str, **changes: Any) -> list[dict[str, Any]]:
    config = SweepConfig(space=space, stages="finetune", **changes)
    return draws.settings_of(config, parse(config))


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("loop.compile=true,no", (True, False)),
        ("loop.precision=bf16,fp32", ("bf16", "fp32")),
        ("model.decoder.width=None,64", (None, 64)),
        ("optim.lr=1e-3,0.001,2e-3", (0.001, 0.002)),
        ("views.crop_scale=[],[0.08,1]", ((), (0.08, 1.0))),
        ("finetune.model.decoder.selection.keep_ratio=0.5,[0.5,0.7]", ((0.5,), (0.5, 0.7))),
    ],
)
def test_values_are_of_their_settings_types(entry: str, values: tuple[Any, ...]) -> None:
    found = dimension(entry)
    assert isinstance(found, Choice)
    assert found.values == values
    assert [type(value) for value in found.values] == [type(value) for value in values]


def test_a_range_of_a_whole_number_has_both_ends_and_no_fractions() -> None:
    for form in ("uniform", "loguniform"):
        drawn = [values["clips.frames"] for values in settings(f"clips.frames={form}(2,5)", search="random", samples=9)]
        # There are only four of them.
        assert sorted(drawn) == [2, 3, 4, 5]
        assert {type(value) for value in drawn} == {int}


def test_weights_say_how_often_a_value_is_drawn() -> None:
    space = ("model.decoder.name=choice(s5:8,lst:1)", "optim.lr=loguniform(1e-5,1e-2)")
    drawn = settings(*space, search="random", samples=200)
    counts = Counter(values["model.decoder.name"] for values in drawn)
    assert len(drawn) == 200
    assert 150 < counts["s5"] < 198
    assert drawn == settings(*space, search="random", samples=200)
    assert drawn[:50] == settings(*space, search="random", samples=50)


def test_known_settings_count_as_samples() -> None:
    config = SweepConfig(space=("optim.lr=uniform(0.1,0.9)",), stages="finetune", search="random", samples=4)
    first = draws.settings_of(config, parse(config))
    known = [{"optim.lr": 0.5}, first[2]]
    again = draws.settings_of(config, parse(config), known)
    assert (len(again), again[:2]) == (4, known)


@pytest.mark.parametrize("name", list(ready_spaces.SPACES))
def test_ready_spaces_are_of_settings_that_there_are(name: str) -> None:
    config = ready_spaces.resolved(SweepConfig(space=(name,)))
    for values in draws.settings_of(config, parse(config)):
        trial_of(config, values, 0)
    assert len(examples(config, parse(config))) > 1


def test_a_file_is_a_space(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(
        "optim.lr: loguniform(1e-5, 1e-2)\n"
        "loop.compile: [true, false]\n"
        "model.decoder.selection.keep_ratio: [[0.5], [0.5, 0.7]]\n"
        "clips.frames: [8, 16]\n"
    )
    config = ready_spaces.resolved(SweepConfig(space=(str(file), "loop.batch_size=4,8"), stages="finetune"))
    line = SweepConfig(
        space=(
            "optim.lr=loguniform(1e-5,1e-2)",
            "loop.compile=true,false",
            "model.decoder.selection.keep_ratio=[0.5],[0.5,0.7]",
            "clips.frames=8,16",
            "loop.batch_size=4,8",
        ),
        stages="finetune",
    )
    assert parse(config) == parse(line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n", "it holds no keys"),
        ("a: [\n", "it is no YAML"),
        ("lsmcl: {mask_ratio: [0.5]}\n", "keys in one line"),
        ("optim.lr: ['0.1,0.2']\n", "write values without commas and brackets"),
        ("optim.lr:\n", "lists? of values"),
    ],
)
def test_a_file_that_is_no_space_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        ready_spaces.resolved(SweepConfig(space=(str(file),)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": ("mask-ration",)}, r"unknown space 'mask-ration': did you mean mask-ratio\?"),
        ({"space": ("none.yaml",)}, "space is 'none.yaml': it cannot be read"),
        ({"space": ("lsmcl.mask_ratios=0.5",)}, r"unknown setting .* did you mean lsmcl.mask_ratio\?"),
        (
            {"space": ("mask-ratio",), "stages": "finetune"},
            r"lsmcl.mask_ratio is a setting of pretrain, which --stages finetune leaves out; give pretrain\+finetune",
        ),
        ({"space": ("finetune.task=class",), "stages": "pretrain"}, "finetune.task is a setting of finetune, which"),
        ({"space": ("optim.lr=fast,0.1",)}, "space is 'optim.lr=fast,0.1': optim.lr is 'fast'"),
        ({"space": ("clips.frames=8.5",)}, "clips.frames is '8.5'"),
        ({"space": ("clips.frames=uniform(1.5,4)",)}, "clips.frames is 1.5"),
        ({"space": ("model.decoder.name=uniform(0,1)",)}, "model.decoder.name is 0.0"),
        ({"space": ("loop.compile=uniform(0,1)",)}, "loop.compile takes no numbers"),
        ({"space": ("optim.lr=uniform(1)",)}, "a range has two bounds"),
        ({"space": ("optim.lr=choice(0.1:0)",)}, "weights above 0"),
        ({"space": ("optim.lr=choice(0.1:1,1e-1:2)",)}, "1e-1 is there twice; give it one weight"),
        ({"space": ("loop.seed=0,1",)}, "seeds are an axis of their own; give --seeds N"),
        ({"space": ("finetune.out=a,b",)}, "each trial has its own"),
        ({"space": ("finetune.checkpoint=a,b",)}, "trials fine-tune what they pretrain"),
        ({"space": ("optim.lr=choice(0.1:1,0.2:2)",)}, "give --search random"),
        ({"space": ("optim.lr=0.1,0.2",), "samples": 3}, "a grid of single values has nothing to draw"),
        ({"metric": "test/accuracy"}, "cannot be tested on it; give val/accuracy"),
        (
            {"metric": "f1"},
            r"^unknown metric 'f1': there are knn/top1, .*val/accuracy[^:]* \(of --stages pretrain\+finetune\)$",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight.check_space(override(SweepConfig(), changes))


def test_a_grid_that_nobody_would_run_asks_for_samples() -> None:
    values = ",".join(str(0.001 * number) for number in range(1, 101))
    space = (f"pretrain.optim.lr={values}", f"finetune.optim.lr={values}")
    config = SweepConfig(space=space)
    with pytest.raises(UserError, match=r"10000 combinations.*--search random --samples N"):
        draws.check_size(config, parse(config))
    config = SweepConfig(space=space, search="random", samples=7)
    draws.check_size(config, parse(config))
    assert len(draws.settings_of(config, parse(config))) == 7


def test_examples_have_every_value_of_a_space() -> None:
    config = SweepConfig(space=("lsmcl.mask_ratio=0.1,0.2,0.3", "optim.lr=uniform(0.1,0.2)", "clips.frames=4,8"))
    found = [trial.values for trial in examples(config, parse(config))]
    assert len(found) == 3
    assert {values["lsmcl.mask_ratio"] for values in found} == {0.1, 0.2, 0.3}
    assert ({v["optim.lr"] for v in found}, {v["clips.frames"] for v in found}) == ({0.1, 0.2}, {4, 8})


def test_the_order_of_a_space_changes_no_trial() -> None:
    entries = ("optim.lr=1e-3,1e-2", "clips.frames=8,16")
    names = [{search_space.name_of(values) for values in settings(*space)} for space in (entries, entries[::-1])]
    assert names[0] == names[1]


def test_one_more_choice_leaves_the_draws_of_the_others() -> None:
    rates = "optim.lr=loguniform(1e-5,1e-2)"
    few = settings("clips.frames=8,16", rates, samples=3)
    config = SweepConfig(space=("clips.frames=8,16,32", rates), stages="finetune", samples=3)
    more = draws.settings_of(config, parse(config))
    assert few == [values for values in more if values["clips.frames"] < 32]
    extended = draws.settings_of(config, parse(config), few[2:])
    assert Counter(values["clips.frames"] for values in extended) == {8: 3, 16: 3, 32: 3}


def test_a_narrow_range_has_as_many_values_as_a_wide_one() -> None:
    drawn = settings("optim.weight_decay=uniform(0.999,0.99999)", search="random", samples=50)
    assert len({values["optim.weight_decay"] for values in drawn}) == 50
