"""Probes of a pretrained encoder: which videos they learn from, and what is refused before any work."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipelines.config import EvaluateConfig
from pipelines.errors import UserError
from pipelines.stages import pretrained
from s5.checkpoints.checkpoint import Meta
from s5.config import ClipConfig


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
