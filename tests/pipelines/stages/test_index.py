"""Stage `index` on real files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.config import DecodeConfig, IndexConfig, TrackingConfig
from pipelines.data.annotations import breakfast
from pipelines.data.annotations.shared import AnnotatedVideo
from pipelines.data.indexing import holding_out
from pipelines.data.manifest import check_for_training, classes, description, read_manifest
from pipelines.errors import UserError
from pipelines.stages import index
from s5.config import ClipConfig
from tests.s5.videos import truncate, write_audio, write_video

CLIPS_OF_ONE = ClipConfig(frames=1)
in_ray = pytest.mark.usefixtures("ray_local")


def _config(tmp_path: Path, **changes: Any) -> IndexConfig:
    settings: dict[str, Any] = {"out": str(tmp_path / "out"), "videos": str(tmp_path / "videos")}
    return IndexConfig(
        **(settings | changes),
        tracking=TrackingConfig(uri="off"),
        data=DecodeConfig(clips_per_task=3, cpus_per_decode=1),
    )


def _rows(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {row["video_id"]: row for row in read_manifest(str(tmp_path / "out")).to_pylist()}


def _rejects(tmp_path: Path) -> dict[str, str]:
    rows = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    return {row["video_id"]: row["reason"] for row in rows}


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def _csv(tmp_path: Path, text: str) -> str:
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- the stage ------------------------------------------------------------------------------------------------------


@in_ray
def test_a_folder_of_splits_and_classes(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    write_video(videos / "train/cook/v1.mp4", 16, width=96)
    write_video(videos / "train/bake/v 2.avi", 24, codec="mpeg4")
    write_video(videos / "val/cook/v3.mp4", 8)
    write_video(videos / "train/bake/deeper/Ünï.mp4", 8)
    write_video(videos / ".hidden/v.mp4", 8)
    write_video(videos / "train/eat/none.mp4", 8)
    truncate(str(videos / "train/eat/none.mp4"))
    (videos / "train/cook/empty.mp4").touch()
    (videos / "train/cook/text.mkv").write_text("no video")
    write_audio(videos / "train/cook/sound.mp4")
    (videos / "readme.txt").write_text("x")
    result = index.run(_config(tmp_path, dataset="kitchen"))

    rows = _rows(tmp_path)
    assert list(rows) == ["train/bake/deeper/Ünï", "train/bake/v 2", "train/cook/v1", "val/cook/v3"]
    row = rows["train/cook/v1"]
    assert row["uri"] == str(videos / "train/cook/v1.mp4")
    assert (row["dataset"], row["split"], row["label"], row["class_name"]) == ("kitchen", "train", 1, "cook")
    assert (row["start_s"], row["end_s"], row["duration_s"], row["num_frames"]) == (0, 2, 2, 16)
    assert (row["width"], row["height"], row["codec"], row["target"]) == (96, 64, "h264", None)
    assert rows["train/bake/deeper/Ünï"]["class_name"] == "bake"
    assert rows["val/cook/v3"]["split"] == "val"
    # A class all of whose videos are broken keeps its place.
    assert classes(read_manifest(str(tmp_path / "out"))) == ["bake", "cook", "eat"]

    rejects = _rejects(tmp_path)
    assert list(rejects) == ["train/cook/empty", "train/cook/sound", "train/cook/text", "train/eat/none"]
    assert "empty" in rejects["train/cook/empty"]
    assert "no video stream" in rejects["train/cook/sound"]
    assert result["counts"] == {"listed": 8, "videos": 4, "rejects": 4, "ignored": 2, "train": 3, "val": 1}
    assert result["others"] == {"hidden": 1, ".txt": 1}
    assert result["metrics"]["index/rejects"] == 4
    assert result["metrics"]["index/hours"] == pytest.approx((2 + 3 + 1 + 1) / 3600)


@in_ray
def test_a_csv_says_what_there_is(tmp_path: Path) -> None:
    write_video(tmp_path / "videos/a/v1.mp4", 80)
    write_video(tmp_path / "videos/v2.mp4", 16)
    write_video(tmp_path / "videos/unlisted.mp4", 16)
    text = """video,label,target,split,start_s,end_s
a/v1.mp4,2,0.5,train,0,4
a/v1.mp4,0,,test,4,99
v2.mp4,2,-1e-1,,,
v2.mp4,2,,,9,
gone.mp4,2,,,,
"""
    result = index.run(_config(tmp_path, annotations=_csv(tmp_path, text)))
    rows = _rows(tmp_path)
    assert list(rows) == ["a/v1@0-4", "a/v1@4-99", "v2"]
    assert (rows["a/v1@0-4"]["end_s"], rows["a/v1@0-4"]["target"], rows["a/v1@0-4"]["split"]) == (4, 0.5, "train")
    assert (rows["a/v1@4-99"]["start_s"], rows["a/v1@4-99"]["end_s"], rows["a/v1@4-99"]["split"]) == (4, 10, "test")
    assert (rows["v2"]["target"], rows["v2"]["split"], rows["v2"]["label"]) == (-0.1, "train", 2)
    # Labels that are numbers stay what they are, and one that no video has keeps its place.
    assert classes(read_manifest(str(tmp_path / "out"))) == ["0", "1", "2"]
    assert _rejects(tmp_path)["gone.mp4"] == "listed in labels.csv line 6, not found as gone.mp4"
    assert "beyond the end" in _rejects(tmp_path)["v2@9-"]
    assert result["counts"]["ignored"] == 1


@in_ray
def test_nothing_that_can_be_read_leaves_rejects_and_no_manifest(tmp_path: Path) -> None:
    _touch(tmp_path / "videos", "a.mp4", "b.mp4")
    _touch(tmp_path / "out", "manifest.parquet")
    with pytest.raises(UserError, match=r"none of the 2 videos can be read \('a': .*rejects.parquet"):
        index.run(_config(tmp_path))
    assert list(_rejects(tmp_path)) == ["a", "b"]
    assert not (tmp_path / "out" / "manifest.parquet").exists()


@in_ray
def test_a_decode_task_larger_than_the_cluster_is_refused(tmp_path: Path) -> None:
    _touch(tmp_path / "videos", "a.mp4")
    config = IndexConfig(
        out=str(tmp_path / "out"),
        videos=str(tmp_path / "videos"),
        data=DecodeConfig(cpus_per_decode=64),
        tracking=TrackingConfig(uri="off"),
    )
    with pytest.raises(UserError, match=r"data.cpus_per_decode is 64: the cluster has 2 CPUs"):
        index.run(config)


# --- benchmarks ------------------------------------------------------------------------------------------------------


def _breakfast(tmp_path: Path) -> str:
    folder = tmp_path / "breakfast"
    folder.mkdir()
    header = "file_name,duration,action,class_id\n"
    lines = [f"P{i:02d}-cam01-P{i:02d}_tea,9,tea,2\n" for i in range(20)]
    (folder / "train.csv").write_text(header + "".join(lines[:15]) + "P99-cam02-P99_milk,9,milk,8\n")
    (folder / "test.csv").write_text(header + "".join(lines[15:]))
    return str(folder)


@in_ray
def test_a_benchmark_of_which_few_videos_are_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = tmp_path / "videos"
    for person in ("P00", "P01", "P16"):
        write_video(videos / f"sync/{person}/cam01/{person}_tea.AVI", 8, codec="mpeg4")
    write_video(videos / "sync/P02/cam01/P02_tea.mp4", 8)
    write_video(videos / "sync/P03/cam02/P03_tea.mp4", 8)
    truncate(str(videos / "sync/P02/cam01/P02_tea.mp4"))
    _touch(videos, "P04/cam01/P04_tea.mp4", "P04/cam01/P04_tea.avi", "P05_tea.mp4")
    config = _config(tmp_path, source="breakfast", annotations=_breakfast(tmp_path), val_share=0.2)
    result = index.run(config)

    table = read_manifest(str(tmp_path / "out"))
    rows = _rows(tmp_path)
    assert list(rows) == ["P00-cam01-P00_tea", "P01-cam01-P01_tea", "P16-cam01-P16_tea"]
    assert rows["P00-cam01-P00_tea"]["uri"] == str(videos / "sync/P00/cam01/P00_tea.AVI")
    assert {(row["dataset"], row["label"], row["class_name"]) for row in rows.values()} == {("breakfast", 2, "tea")}
    assert rows["P16-cam01-P16_tea"]["split"] == "test"
    # The head keeps its size, and the share held out is one of all that are listed.
    assert classes(table) == ["0", "1", "tea", "3", "4", "5", "6", "7", "milk", "9"]
    about = description(table)
    assert (about.dataset, about.task, about.protocol) == ("breakfast", "", "whole")
    assert about.listed == {"train": 13, "val": 3, "test": 5}
    assert result["counts"]["listed"] == 21
    assert result["others"] == {"videos that are not listed": 3}
    assert result["splits"]["test"] == {"listed": 5, "found": 1, "rejected": 4}
    assert sum(numbers["found"] for numbers in result["splits"].values()) == 4

    rejects = _rejects(tmp_path)
    assert len(rejects) == 18
    assert next(iter(rejects)) == "P02-cam01-P02_tea"
    assert rejects["P03-cam01-P03_tea"] == (
        "listed in train.csv line 5, not found as P03/cam01/P03_tea.* in the folder or below it"
    )
    assert rejects["P04-cam01-P04_tea"] == "found as P04/cam01/P04_tea.avi and as P04/cam01/P04_tea.mp4: leave one"
    printed = capsys.readouterr().out
    assert "[index] breakfast 21 videos in 10 classes, 4 found below" in printed
    assert "[index] test: 5 listed, 1 found, 4 rejected" in printed
    # Few are left, but the benchmark is what it is.
    check_for_training(table, CLIPS_OF_ONE, 1, labelled=True)


@in_ray
def test_a_stretch_is_used_of_each_coin_video(tmp_path: Path) -> None:
    entry = {"class": "Tea", "recipe_type": 3, "subset": "training"}
    stretches = {"a": (1, 2.5), "b": (1, 99), "c": (9, 12)}
    database = {video_id: entry | {"start": start, "end": end} for video_id, (start, end) in stretches.items()}
    (tmp_path / "COIN.json").write_text(json.dumps({"database": database}))
    for video_id in database:
        write_video(tmp_path / f"videos/{video_id}.mp4", 32)
    index.run(_config(tmp_path, source="coin", annotations=str(tmp_path / "COIN.json"), val_share=0.0))
    assert {key: (row["start_s"], row["end_s"]) for key, row in _rows(tmp_path).items()} == {"a": (1, 2.5), "b": (1, 4)}
    assert "beyond the end" in _rejects(tmp_path)["c"]


def test_a_folder_without_any_of_the_listed_videos_is_refused(tmp_path: Path) -> None:
    _touch(tmp_path / "videos", "P00_tea.mp4", "P00/cam01/P00_tea.txt")
    config = _config(tmp_path, source="breakfast", annotations=_breakfast(tmp_path))
    with pytest.raises(UserError, match=r"none of the 21 videos .* such as P00/cam01/P00_tea.mp4; 1 other videos are"):
        index.list_videos(config)


def test_a_benchmark_without_a_validation_split_gets_one(tmp_path: Path) -> None:
    _touch(tmp_path / "videos", "P00/cam01/P00_tea.mp4")
    config = _config(tmp_path, source="breakfast", annotations=_breakfast(tmp_path))
    annotations, _ = index.list_videos(config)
    assert holding_out.shares(annotations, config) == {"val": holding_out.BENCHMARK_VAL_SHARE}
    own, _ = index.list_videos(_config(tmp_path))
    assert holding_out.shares(own, _config(tmp_path)) == {"val": 0, "test": 0}
    assert holding_out.shares(own, _config(tmp_path, val_share=0.3)) == {"val": 0.3, "test": 0}


# --- listing --------------------------------------------------------------------------------------------------------


def test_ids_are_names_without_endings_where_no_two_are_the_same(tmp_path: Path) -> None:
    _touch(tmp_path / "videos", "a.mp4", "a.avi", "b.MP4", "c/b.mp4", "c/notes.txt", "d.x/e.mp4")
    listed, files = index.list_videos(_config(tmp_path))
    assert [video.video_id for video in listed.videos] == ["a.avi", "a.mp4", "b", "c/b", "d.x/e"]
    assert [video.class_name for video in listed.videos] == [None, None, None, "c", "d.x"]
    assert files.others == {".txt": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,lable\nv.mp4,x\n", "unknown column 'lable': did you mean label"),
        ("label\nx\n", "labels.csv has no column video; the first line must name the columns"),
        ("", "labels.csv has no column video"),
        ("video,target\nv.mp4,high\n", "line 2 has target 'high'"),
        ("video,start_s\nv.mp4,-1\n", "line 2 has start_s '-1'"),
        ("video,target\nv.mp4,nan\n", "line 2 has target 'nan'"),
        ("video,split\nv.mp4,valid\n", "line 2 has split 'valid'; give train, val, test"),
        ("video,label\nv.mp4\n", "line 2 has 1 fields, not as many fields as the header"),
        ("video,label\n,x\n", "line 2 has video ''; it must not be empty"),
        ("video,label\n", "it lists no videos"),
    ],
)
def test_a_wrong_csv_is_refused(tmp_path: Path, text: str, message: str) -> None:
    _touch(tmp_path / "videos", "v.mp4")
    with pytest.raises(UserError, match=message):
        index.list_videos(_config(tmp_path, annotations=_csv(tmp_path, text)))


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"videos is '.*videos': there is no such folder"):
        index.list_videos(_config(tmp_path))
    _touch(tmp_path / "videos", "notes.txt")
    with pytest.raises(
        UserError, match=r"no videos below it; looked for files that end in mp4, .*, among 1 other file \(1 .txt\)"
    ):
        index.list_videos(_config(tmp_path))
    with pytest.raises(UserError, match=r"annotations is 'nowhere.csv': there is no such file"):
        index.list_videos(_config(tmp_path, annotations="nowhere.csv"))
    with pytest.raises(UserError, match=r"it is a folder; give a file, or with --source the data set"):
        index.list_videos(_config(tmp_path, annotations=str(tmp_path)))


# --- holding out ----------------------------------------------------------------------------------------------------


def _listed(count: int, classes: str = "a", split: str = "") -> list[AnnotatedVideo]:
    return [AnnotatedVideo(f"{name}{i}", "", class_name=name, split=split) for name in classes for i in range(count)]


def test_hold_out_takes_the_share_of_each_class_by_seed() -> None:
    videos = [*_listed(20, "ab"), *_listed(9, "t", "test")]
    held = holding_out.hold_out(videos, {"val": 0.2, "test": 0.3}, 0)
    for name in "ab":
        assert [held.get(f"{name}{i}") for i in range(20)].count("val") == 4
        assert [held.get(f"{name}{i}") for i in range(20)].count("test") == 6
    assert not [video_id for video_id in held if video_id.startswith("t")]
    assert held == holding_out.hold_out(videos, {"val": 0.2, "test": 0.3}, 0)
    assert held != holding_out.hold_out(videos, {"val": 0.2, "test": 0.3}, 1)
    assert held == holding_out.hold_out(videos[::-1], {"val": 0.2, "test": 0.3}, 0)


def test_hold_out_leaves_a_video_of_each_class_for_training() -> None:
    assert holding_out.hold_out(_listed(1), {"val": 0.9}, 0) == {}
    assert len(holding_out.hold_out(_listed(3), {"val": 0.99}, 0)) == 2


def _performed(people: dict[str, str], cameras: int = 3) -> list[AnnotatedVideo]:
    """List dishes of people as Breakfast does: each performance by several cameras."""
    return [
        AnnotatedVideo(f"{person}-cam{camera}-{dish}", "", class_name=dish, split="train", group=person)
        for person, dishes in people.items()
        for dish in dishes
        for camera in range(cameras)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_held_out_whole(seed: int) -> None:
    videos = _performed({f"P{number:02}": "abcd" if number % 3 else "ab" for number in range(40)})
    held = holding_out.hold_out(videos, {"val": 0.1, "test": 0.2}, seed)
    sides = {(video.group, held.get(video.video_id, "train")) for video in videos}
    assert len(sides) == 40
    counts = Counter(held.values())
    # Groups have 6 or 12 videos, so that half of one may be missing or too many.
    assert abs(counts["val"] - 0.1 * len(videos)) <= 6.5
    assert abs(counts["test"] - 0.2 * len(videos)) <= 6.5
    for split in ("val", "test", "train"):
        assert {v.class_name for v in videos if held.get(v.video_id, "train") == split} == set("abcd")
    assert held == holding_out.hold_out(videos[::-1], {"val": 0.1, "test": 0.2}, seed)


def test_groups_leave_each_class_for_training_and_come_back_whole() -> None:
    alone = _performed({"P00": "ab", "P01": "a", "P02": "a"})
    held = holding_out.hold_out(alone, {"val": 0.5}, 0)
    assert held
    assert not [name for name in held if name.startswith("P00")]
    videos = _performed({"P00": "ab", "P01": "a"})
    held = {video.video_id: "val" for video in videos if video.group == "P00"}
    holding_out.keep_learnable(videos, held)
    assert held == {}


def test_breakfast_holds_out_people(tmp_path: Path) -> None:
    header = "file_name,duration,action,class_id\n"
    lines = [f"P{p:02}-cam0{c}-P{p:02}_tea,9,tea,0\n" for p in range(20) for c in range(4)]
    (tmp_path / "train.csv").write_text(header + "".join(lines))
    (tmp_path / "test.csv").write_text(header + "P50-cam01-P50_tea,9,tea,0\n")
    videos = breakfast.read(str(tmp_path)).videos
    held = holding_out.hold_out(videos, {"val": 0.1}, 0)
    assert Counter(name.partition("-")[0] for name in held).most_common() == [(name[:3], 4) for name in list(held)[::4]]
    assert len(held) == 8


def test_a_class_that_lost_its_training_videos_gets_one_back() -> None:
    held = {"a0": "val", "a1": "val", "b0": "val"}
    videos = [AnnotatedVideo(name, "", class_name=name[0], split="train") for name in ("a0", "a1", "b0", "b1")]
    holding_out.keep_learnable(videos, held)
    assert held == {"a1": "val", "b0": "val"}
