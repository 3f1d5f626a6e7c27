"""The manifest: what it says of itself, and the checks before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.manifest import (
    SCHEMA,
    Description,
    check_clips,
    check_for_training,
    classes,
    description,
    digest,
    drop_too_short,
    metadata,
    read_manifest,
    split_of,
    splits,
)
from pipelines.errors import UserError
from s5.config import ClipConfig

CLIPS = ClipConfig(frames=4, long_stride=1.0, short_stride=0.25)


def _manifest(count: int = 4, seconds: float = 10.0, **columns: list[Any]) -> pa.Table:
    row = {"dataset": "d", "split": "train", "label": 0, "class_name": "a", "target": 1.0, "start_s": 0.0, "fps": 8.0}
    row |= {"end_s": seconds, "duration_s": seconds, "num_frames": 80, "width": 64, "height": 64, "codec": "h264"}
    rows = [row | {"video_id": f"v{i}", "uri": f"/v{i}.mp4"} for i in range(count)]
    for name, values in columns.items():
        for item, value in zip(rows, values, strict=True):
            item[name] = value
    return pa.Table.from_pylist(rows, SCHEMA)


def test_a_manifest_that_is_not_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    with pytest.raises(UserError, match=r"no such file; run `python -m pipelines index`"):
        read_manifest(str(path))
    path.write_text("x")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read_manifest(str(path))
    with pytest.raises(UserError, match=r"did you mean .*/manifest.parquet"):
        read_manifest(str(tmp_path / "manfest.parquet"))
    pq.write_table(_manifest().drop_columns(["fps", "uri"]), path)
    with pytest.raises(UserError, match="the columns uri, fps are missing"):
        read_manifest(str(tmp_path))
    pq.write_table(_manifest(0), path)
    with pytest.raises(UserError, match="it has no videos"):
        read_manifest(str(path))
    pq.write_table(_manifest(3, split=["train", "test", "train"]), path)
    table = read_manifest(str(tmp_path))
    assert splits(table) == {"train": 2, "test": 1}
    assert split_of(table, "test")["video_id"].to_pylist() == ["v1"]
    assert classes(table) == ["a"]


def _of_benchmark(table: pa.Table, **about: Any) -> pa.Table:
    return table.replace_schema_metadata(metadata(["a", "b"], Description(dataset="lvu", **about)))


def test_a_manifest_says_what_it_is_of(tmp_path: Path) -> None:
    assert description(_manifest()) == Description()
    table = _of_benchmark(_manifest(), task="genre", protocol="windows", listed={"train": 9, "test": 2})
    pq.write_table(table, tmp_path / "manifest.parquet")
    about = description(split_of(read_manifest(str(tmp_path)), "train"))
    assert (about.dataset, about.task, about.protocol, about.listed) == (
        "lvu",
        "genre",
        "windows",
        {"train": 9, "test": 2},
    )
    # Another protocol is another training; how many more were listed is not.
    assert digest(table) != digest(_of_benchmark(_manifest(), task="genre", protocol="whole"))
    assert digest(table) == digest(_of_benchmark(_manifest(), task="genre", protocol="windows"))


def _check(table: pa.Table, clips: ClipConfig = CLIPS, batch_size: int = 2, labelled: bool = True, **task: Any) -> None:
    check_for_training(table, clips, batch_size, labelled=labelled, **task)


def test_a_sound_manifest_passes() -> None:
    _check(_manifest())
    _check(_manifest(label=[None] * 4, target=[None] * 4), labelled=False)
    _check(_manifest(label=[None] * 4), task="regression")
    _check(_of_benchmark(_manifest(class_name=["a", "a", "a", "b"])))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (_manifest(split=["val"] * 4), r"no videos in split train, only in val \(4\)"),
        (_manifest(1, class_name=[None]), "loop.batch_size is 2: split train has 1 videos; give at most 1"),
        (_manifest(label=[0, None, 0, None]), "2 of 4 videos of split train have no label, such as 'v1'"),
        (_manifest(class_name=["a", "a", "a", "b"]), "class 'b' has a single video, v3"),
        (
            _manifest(class_name=["a", "a", "b", "b"], split=["train", "train", "val", "test"]),
            "class 'b' has videos, but none in split train",
        ),
        (_manifest(label=[None] * 4), "the videos of split train have a target but no label: set task to regression"),
        (
            _manifest(end_s=[10, 2, 10, 1]),
            r"2 of 4 videos of split train are shorter than 4 frames at that stride, such as 'v1' with 2.00 s; "
            r"give at most 0.291, lower clips.frames, or set clips.too_short to drop or shrink",
        ),
        (_manifest(end_s=[10, 10, 10, 2], split=["train"] * 3 + ["val"]), "1 of 1 videos of split val are shorter"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(table: pa.Table, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _check(table)


def test_missing_targets_are_refused() -> None:
    with pytest.raises(UserError, match="have no target"):
        _check(_manifest(target=[None, 1, 1, 1]), task="regression")


def test_short_videos_are_dropped_or_kept_as_set() -> None:
    table = _manifest(end_s=[10, 2, 10, 1])
    drop = ClipConfig(frames=4, long_stride=1.0, too_short="drop")
    assert drop_too_short(table, drop)["video_id"].to_pylist() == ["v0", "v2"]
    with pytest.raises(UserError, match=r"has 2 videos \(and 2 that are too short\); give at most 2"):
        _check(table, drop, batch_size=3)
    shrink = ClipConfig(frames=4, long_stride=1.0, too_short="shrink")
    assert len(drop_too_short(table, shrink)) == 4
    check_clips(table, shrink)
    with pytest.raises(UserError, match=r"set clips.too_short to shrink"):
        check_clips(table.slice(1, 1), drop)
    check_clips(table.slice(0, 0), drop)


def test_the_stride_in_the_remedy_is_in_the_unit_that_was_given() -> None:
    frames = ClipConfig(frames=4, long_stride=8, short_stride=1, unit="frames")
    with pytest.raises(UserError, match=r"long_stride is 8 frames: .* give at most 5,"):
        check_clips(_manifest(seconds=2.0), frames)
