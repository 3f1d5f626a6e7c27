"""Probes of a pretrained encoder: which videos they learn from, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipelines.config import EvaluateConfig, TrackingConfig
from pipelines.errors import StageError, UserError
from pipelines.running.stage import stage_run
from pipelines.stages import pretrained
from s5.checkpoints.checkpoint import Meta
from s5.config import ClipConfig
from s5.evaluation.inference import ClipOutputs


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
