"""Probes of a pretrained encoder: which videos they learn from, and what is refused before any work."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipelines import storage
from pipelines.config import EvaluateConfig, TrackingConfig
from pipelines.data.narration.labels import LABELS_FILE, MADE_BY, STEPS, LabelMeta
from pipelines.data.narration.reading import NarratedSteps
from pipelines.errors import StageError, UserError
from pipelines.running.stage import stage_run
from pipelines.stages.evaluating import pretrained
from s5.checkpoints.checkpoint import Meta
from s5.config import ClipConfig
from s5.evaluation.inference import ClipOutputs
from s5.tasks.distant import StepLabels


def manifest(train: list[int | None], test: list[int | None]) -> pa.Table:
    """Return the columns of a manifest that probes look at, for videos with these labels."""
    labels = train + test
    return pa.table(
        {
            "video_id": [f"v{i}" for i in range(len(labels))],
            "split": ["train"] * len(train) + ["test"] * len(test),
            "label": pa.array(labels, pa.int64()),
        }
    )


def learned_from(table: pa.Table, kind: Any = "lsmcl", **settings: Any) -> list[int]:
    config = EvaluateConfig(**settings)
    videos = table.filter(pa.compute.equal(table["split"], config.split))
    found = pretrained.training_videos(table, config, Meta(kind=kind, step=1, model={}), videos, ClipConfig())
    return list(found["label"].to_pylist())


def test_videos_learned_from_are_spread_over_the_classes() -> None:
    table = manifest([0, 0, 0, 1, 1, 1, None, 2, 2, 2], [0])
    assert learned_from(table, train_videos=3) == [0, 1, 2]
    assert learned_from(table, train_videos=0, probe="linear") == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_neighbours_need_no_labels() -> None:
    assert learned_from(manifest([None, 0], [None])) == []
    assert learned_from(manifest([None], [0])) == []
    assert learned_from(manifest([0, 1], [0]), split="train") == []
    assert learned_from(manifest([0, 1], [0]), kind="class") == []


@pytest.mark.parametrize("probe", ["linear", "both"])
@pytest.mark.parametrize(
    ("train", "test", "kind", "split", "message"),
    [
        ([0, 1], [0], "class", "test", "the checkpoint is of a fine-tuned model, which has a head"),
        ([0, 1], [0], "lsmcl", "train", "it learns from split 'train' and cannot be tested on it"),
        ([], [0], "lsmcl", "test", "split 'train' .* has no videos with a label"),
        ([None, None], [0], "lsmcl", "test", "split 'train' .* has no videos with a label"),
        ([0, 1], [], "lsmcl", "test", "split 'test' .* has no videos with a label"),
        ([0, 1], [None], "lsmcl", "test", "split 'test' .* has no videos with a label"),
        ([3, 3, None], [3], "lsmcl", "test", r"all 2 labelled videos of split 'train' are of one class \(label 3\)"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    probe: Any, train: list[int | None], test: list[int | None], kind: str, split: str, message: str
) -> None:
    with pytest.raises(UserError, match=f"probe is '{probe}': {message}"):
        learned_from(manifest(train, test), kind, probe=probe, split=split)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="train_videos is -1: give 0 or more"):
        EvaluateConfig(train_videos=-1)


def outputs(names: list[str], labels: list[int], pictured: int = 0) -> ClipOutputs:
    """Features of clips that say their label, and frames of the first of them."""
    known = torch.tensor(labels)
    values = torch.eye(3)[known.clamp_min(0)] + 0.1 * torch.randn(len(labels), 3)
    frames = [torch.zeros(8, 8, 3, dtype=torch.uint8) if i < pictured else None for i in range(len(labels))]
    return ClipOutputs(names, values, known, torch.full((len(labels),), torch.nan), [], frames)


@pytest.mark.parametrize("probe", ["knn", "linear", "both"])
def test_report_has_the_probes_asked_for(probe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = EvaluateConfig(out=str(tmp_path / "out"), probe=probe, neighbours=2, tracking=TrackingConfig(uri="off"))
    found = outputs(["a", "a", "b", "b", "c", "c", "d", "d"], [0, 0, 1, 1, 2, 2, -1, -1], pictured=6)
    train = outputs([f"t{i}" for i in range(12)], [i % 3 for i in range(12)])
    with stage_run("evaluate", config) as stage:
        pretrained.report(stage, config, found, train)
    assert stage.metrics["retrieval/clips"] == 8
    assert stage.metrics["retrieval/chance"] == pytest.approx(1 / 7)
    assert stage.metrics.get("knn/top1") == (None if probe == "linear" else 1)
    assert stage.metrics.get("knn/videos") == (None if probe == "linear" else 6)
    assert stage.metrics.get("linear/top1") == (None if probe == "knn" else 1)
    assert stage.metrics.get("linear/videos") == (None if probe == "knn" else 3)
    shown = capsys.readouterr().out
    assert ("linear probe top-1 1.000" in shown) == (probe != "knn")
    assert "among the first 6 clips" in shown
    assert (tmp_path / "out" / "neighbours.png").read_bytes().startswith(b"\x89PNG")


def test_training_videos_left_of_one_class_end_the_stage(tmp_path: Path) -> None:
    config = EvaluateConfig(out=str(tmp_path / "out"), probe="linear", tracking=TrackingConfig(uri="off"))
    with pytest.raises(StageError, match="at least 2 classes, and there are 1"), stage_run("evaluate", config) as stage:
        pretrained.report(stage, config, outputs(["a"], [1]), outputs(["t", "u"], [1, 1]))


def test_predicted_steps_equal_a_loop_over_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "SEGMENTS_AT_ONCE", 2)
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 6)
    values, names = torch.randn(6, 4), ["a", "a", "b", "c", "d", "e"]
    found = ClipOutputs(names, values, torch.full((6,), -1), torch.full((6,), torch.nan), [])
    # The last step of b only fills up its label.
    labels = StepLabels(
        {name: row for row, name in enumerate("edcba")},
        torch.tensor([[0, 1], [1, 2], [2, 5], [3, 0], [int(head(values[:2].mean(0)).argmax()), 3]]),
        torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.7, 0.3], [1.0, 0.0], [0.8, 0.2]]),
    )
    expected, hits = [], []
    for name in "abcde":
        clips = [value for value, owner in zip(values, names, strict=True) if owner == name]
        predicted = head(torch.stack(clips).mean(0)).softmax(0).detach()
        steps, shares = (each[0].tolist() for each in labels.of([name]))
        pairs = [(share, float(predicted[step])) for step, share in zip(steps, shares, strict=True) if share]
        expected.append(sum(share * math.log(share / other) for share, other in pairs))
        hits.append(int(predicted.argmax()) == steps[0])
    config = EvaluateConfig(out=str(tmp_path), tracking=TrackingConfig(uri="off"))
    with stage_run("evaluate", config) as stage:
        pretrained.steps(stage, "test", head, found, NarratedSteps(labels, [], ""))
    assert stage.metrics["test/loss"] == pytest.approx(sum(expected) / 5, rel=1e-4)
    assert stage.metrics["test/accuracy"] == pytest.approx(sum(hits) / 5)
    assert hits[0]


def test_labels_that_a_checkpoint_cannot_be_compared_with_are_named(tmp_path: Path) -> None:
    videos = pa.table({"video_id": ["a"]})
    meta = Meta(kind="distant", step=1, model={}, classes=["Tea: Boil"])
    made = LabelMeta(manifest="", narration="", steps="", encoder="", top_k=1, temperature=1, shortest_s=0)
    about = {MADE_BY: json.dumps(asdict(made)), STEPS: json.dumps(["Tea: Pour"])}
    table = pa.table({"video_id": ["a"], "steps": [[0]], "probabilities": [[1.0]]})
    config = EvaluateConfig(manifest=str(tmp_path / "manifest.parquet"))
    assert pretrained.narrated_steps(config, meta, videos) is None
    storage.write_table(str(tmp_path / LABELS_FILE), table.replace_schema_metadata(about))
    with pytest.raises(UserError, match="its 1 steps are not the 1 that the checkpoint has learnt"):
        pretrained.narrated_steps(config, meta, videos)
    found = pretrained.narrated_steps(config, replace(meta, classes=["Tea: Pour"]), videos)
    assert found is not None
    assert found.labels.rows == {"a": 0}
    with pytest.raises(UserError, match=r"labels is 'x': a checkpoint of task lsmcl predicts no steps; leave it out"):
        pretrained.narrated_steps(EvaluateConfig(labels="x"), replace(meta, kind="lsmcl"), videos)
