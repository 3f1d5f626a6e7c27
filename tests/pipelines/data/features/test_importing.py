"""Features of other programs: names of files, times, and what is refused; without Ray."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.features.importing import (
    FeatureFile,
    common_shape,
    files_digest,
    list_files,
    match,
    plan,
    segment_frames,
)
from pipelines.data.features.reader import FeatureReader
from pipelines.errors import UserError
from s5.errors import VideoError
from tests.pipelines.data.features.imported import (
    TOKENS,
    WIDTH,
    frames,
    imported,
    manifest,
    stored,
    video,
    write,
)


def test_each_mistake_is_one_reject_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    good = frames(10)
    write(folder / "good.npy", good)
    write(folder / "P03" / "cam01" / "tea.npy", good)  # by the path of a Breakfast video
    write(folder / "one" / "twice.npy", good)
    write(folder / "two" / "twice.npy", good)
    broken = good.copy()
    broken[7, 1, 2] = np.nan
    write(folder / "broken.npy", broken)
    huge = good.copy()
    huge[3, 0, 0] = 1e6
    write(folder / "huge.npy", huge)
    write(folder / "wide.npy", frames(10, width=WIDTH + 1))
    write(folder / "long.npy", frames(30))
    write(folder / "stranger.npy", good)
    (folder / "readme.txt").write_text("about")
    names = ("good", "twice", "broken", "huge", "wide", "long", "gone")
    tea = video("P03-cam01-tea", 10.0, uri="/videos/P03/cam01/tea.avi")
    rows, strangers = imported(folder, tmp_path / "out", manifest(*(video(n, 10.0) for n in names), tea))
    reasons = {row["video_id"]: row["reason"] for row in rows}
    assert list(reasons) == [*names, "P03-cam01-tea"]
    assert reasons["good"] == reasons["P03-cam01-tea"] == ""
    for name, words in {
        "twice": "it has 2 files of features (",
        "broken": "its features are not finite in fp16",
        "huge": "its features are not finite in fp16",
        "wide": "its features are of 3 tokens of width 9, those of most others of 3 tokens of width 8",
        "long": "its 30 frames are 30 s at 1 frames a second, but the video is 10 s long",
        "gone": "it has no file of features below",
    }.items():
        assert reasons[name].startswith(words), name
    assert [(failure.video_id, failure.reason) for failure in strangers] == [
        ("stranger", "a file of no video of the manifest")
    ]
    assert list_files(str(folder), "auto")[1] == 1
    np.testing.assert_array_equal(stored(tmp_path / "out", "good", 10), good.astype(np.float16))
    with pytest.raises(VideoError, match="no cached features: its features are not finite"):
        FeatureReader(str(tmp_path / "out")).frames("broken", np.zeros(1))


def test_a_file_that_could_be_of_two_videos_is_given_to_neither(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.npy", frames(10))
    videos = manifest(video("x/a", 10.0, uri="/x/a.mp4"), video("y/a", 10.0, uri="/y/a.mp4"))
    rows, strangers = imported(tmp_path / "in", tmp_path / "out", videos)
    assert all("may be of any of 2 videos: name it by the id of its video" in row["reason"] for row in rows)
    assert strangers == []
    write(tmp_path / "in" / "x" / "a.npy", frames(10))
    write(tmp_path / "in" / "y" / "a.npy", frames(10, 1))
    (tmp_path / "in" / "a.npy").unlink()
    rows, _ = imported(tmp_path / "in", tmp_path / "more", videos)
    np.testing.assert_array_equal(stored(tmp_path / "more", "y/a", 10), frames(10, 1).astype(np.float16))


def hits(videos: dict[str, str], *names: str) -> dict[str, list[str]]:
    """Name the files that may be of each video, given with its uri."""
    files = [FeatureFile(f"/in/{name}", name.partition(".")[0], "npy", 1, 0) for name in names]
    found, _ = match(list(videos), list(videos.values()), files)
    return {video: [file.path.removeprefix("/in/") for file in hit] for video, hit in zip(videos, found, strict=True)}


def test_files_in_the_folders_of_their_videos_are_told_apart() -> None:
    """Cameras of Breakfast give their files the same names."""
    cameras = {f"{cam}-tea": f"s3://bucket/videos/P03/{cam}/P03_tea.avi" for cam in ("cam01", "cam02")}
    both = {"cam01-tea": ["P03/cam01/P03_tea.npy"], "cam02-tea": ["P03/cam02/P03_tea.npy"]}
    assert hits(cameras, "P03/cam01/P03_tea.npy", "P03/cam02/P03_tea.npy") == both
    # Below another folder, or with fewer of them than the videos are in.
    deeper = {video: [f"features/{name}"] for video, (name,) in both.items()}
    assert hits(cameras, *(name for (name,) in deeper.values())) == deeper
    fewer = {video: [name.removeprefix("P03/")] for video, (name,) in both.items()}
    assert hits(cameras, *(name for (name,) in fewer.values())) == fewer
    # One is missing, and the other one's file is not taken for it.
    assert hits(cameras, "P03/cam01/P03_tea.npy") == {"cam01-tea": ["P03/cam01/P03_tea.npy"], "cam02-tea": []}
    # The same name in a folder of no video goes to the one video that has none.
    assert hits(cameras, "P03/cam01/P03_tea.npy", "x/P03_tea.npy")["cam02-tea"] == ["x/P03_tea.npy"]
    # A name by id counts most.
    assert hits(cameras, "P03/cam01/P03_tea.npy", "cam01-tea.npy", "cam02-tea.npy") == {
        "cam01-tea": ["cam01-tea.npy"],
        "cam02-tea": ["cam02-tea.npy"],
    }
    assert hits({"b": "/v/x/a.mp4", "a": "/v/y/b.mp4"}, "f/a.npy", "f/b.npy") == {"b": ["f/b.npy"], "a": ["f/a.npy"]}
    # A relative name with fewer folders than files have takes nothing from one with more.
    assert hits({"1": "a.mp4", "2": "x/a.mp4"}, "x/a.npy") == {"1": [], "2": ["x/a.npy"]}
    # All stretches of a video have its file, but for one with a file of its own.
    stretches = {"a@0-5": "/v/a.mp4", "a": "/v/a.mp4", "a@5-9": "/v/a.mp4"}
    assert hits(stretches, "a.npy", "a@5-9.npy") == {"a@0-5": ["a.npy"], "a": ["a.npy"], "a@5-9": ["a@5-9.npy"]}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("one/a.npy", "two/a.npy"), r"it has 2 files of features \(.*\): name them by the ids of their videos"),
        (("a.npy", "a.npz"), r"it has 2 files of features \(.*\): say by --format which endings count, or rename"),
    ],
)
def test_no_file_is_to_be_removed(names: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / name, frames(10))
    rows, strangers = plan(manifest(video("a", 10.0)), list_files(str(tmp_path), "auto")[0], "", 1e9)
    assert re.match(reason, rows["reason"][0].as_py())
    assert strangers == []


@pytest.mark.parametrize(
    ("start_s", "end_s", "count", "fps", "expected"),
    [
        (0, 100, 100, 1.0, (0, 100, 0.0)),
        (0, 100, 98, 1.0, (0, 98, 0.0)),  # within 2 frames and 2 %
        (0, 100, 104, 1.0, (0, 104, 0.0)),
        (10.5, 20.25, 100, 1.0, (10, 21, 10.0)),  # of the whole video: the frame on screen at the start comes first
        (10.5, 20.25, 200, 2.0, (21, 41, 10.5)),
        (10.5, 20.5, 10, 1.0, (0, 10, 10.5)),  # of the segment alone
        (99.5, 100, 98, 1.0, (97, 98, 97.0)),  # features end a little early
    ],
)
def test_a_segment_gets_its_frames(
    start_s: float, end_s: float, count: int, fps: float, expected: tuple[int, int, float]
) -> None:
    assert segment_frames(video("a", 100.0, start_s, end_s), count, fps) == expected


@pytest.mark.parametrize(
    ("start_s", "end_s", "count", "expected"),
    [
        (1, 9.5, 9, (0, 9, 1.0)),  # 8.5 s are closer to 9 frames than 10 s are
        (1, 9.5, 10, (1, 10, 1.0)),
        (1, 9, 9, (1, 9, 1.0)),  # as close: of the whole video, whose last frame is missing
        (0, 10, 9, (0, 9, 0.0)),
    ],
)
def test_a_segment_nearly_as_long_as_its_video(
    start_s: float, end_s: float, count: int, expected: tuple[int, int, float]
) -> None:
    assert segment_frames(video("a", 10.0, start_s, end_s), count, 1.0) == expected


def test_frames_of_another_rate_are_refused() -> None:
    with pytest.raises(
        VideoError, match=r"its 200 frames are 200 s at 1 frames a second, but the video is 100 s long$"
    ):
        segment_frames(video("a", 100.0), 200, 1.0)
    with pytest.raises(VideoError, match=r"video is 100 s long \(its segment 10 s\)"):
        segment_frames(video("a", 100.0, 10, 20), 50, 1.0)


def test_shards_are_cut_by_size(tmp_path: Path) -> None:
    sizes = (4, 4, 9, 2, 2)
    for number, count in enumerate(sizes):
        write(tmp_path / f"{number}.npy", frames(count))
    files, _ = list_files(str(tmp_path), "auto")
    videos = manifest(*(video(str(number), float(count)) for number, count in enumerate(sizes)), video("none", 1.0))
    frame = TOKENS * WIDTH * 4
    assert plan(videos, files, "", 8 * frame + 300)[0]["shard"].to_pylist() == [0, 0, 1, 2, 2, 2]
    assert common_shape(plan(videos, files, "", 1e9)[0], "") == (TOKENS, WIDTH)
    changed = files_digest(files)
    write(tmp_path / "0.npy", frames(5))
    assert files_digest(list_files(str(tmp_path), "auto")[0]) != changed


def test_folders_without_features_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"import is '.*': no file below it ends in .npy, .npz, .pt"):
        list_files(str(tmp_path), "auto")
    write(tmp_path / "a.npz", frames(2))
    rows, _ = plan(manifest(video("b", 2.0)), list_files(str(tmp_path), "auto")[0], "in", 1e9)
    with pytest.raises(UserError, match=r"import is 'in': no video has a file of its own, as 'b': it has no file of"):
        common_shape(rows, "in")
    (tmp_path / "a.npz").write_bytes(b"damaged")
    rows, _ = plan(manifest(video("a", 2.0)), list_files(str(tmp_path), "auto")[0], "in", 1e9)
    with pytest.raises(UserError, match=r"import is 'in': no file can be read, as .*a.npz: its file is damaged"):
        common_shape(rows, "in")
    with pytest.raises(UserError, match=r"no file below it ends in .npy; give one"):
        list_files(str(tmp_path), "npy")
