"""Features of other programs: formats, names of files, times, and what is refused; without Ray."""

from __future__ import annotations

import errno
import importlib.util
import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from pipelines import storage
from pipelines.data.features.arrays import FORMATS, check_formats, open_array
from pipelines.data.features.cache import (
    IMPORTED,
    FeatureMeta,
    ShardWriter,
    finish,
)
from pipelines.data.features.importing import (
    FeatureFile,
    common_shape,
    files_digest,
    import_shard,
    list_files,
    match,
    plan,
    segment_frames,
)
from pipelines.data.features.reader import FeatureReader
from pipelines.data.manifest import SCHEMA
from pipelines.errors import UserError
from s5.errors import VideoError

Array = npt.NDArray[Any]
TOKENS, WIDTH = 3, 8


def frames(count: int, seed: int = 0, tokens: int = TOKENS, width: int = WIDTH) -> Array:
    return np.random.default_rng(seed).standard_normal((count, tokens, width)).astype(np.float32)


def write(path: Path, array: Array, file_format: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match file_format or path.suffix[1:]:
        case "npy":
            np.save(path, array)
        case "npz":
            np.savez_compressed(path, labels=np.zeros(2), features=array)
        case "pt":
            torch.save({"features": torch.from_numpy(array), "fps": 1.0}, path)
        case "safetensors":
            save_arrays({"x": array}, path)
        case "h5":
            h5py = pytest.importorskip("h5py")
            with h5py.File(path, "w") as file:
                file["features"] = array


def video(name: str, seconds: float, start_s: float = 0.0, end_s: float | None = None, uri: str = "") -> dict[str, Any]:
    facts = {"duration_s": seconds, "fps": 25.0, "num_frames": 1, "width": 1, "height": 1, "split": "train"}
    end = seconds if end_s is None else end_s
    return facts | {"video_id": name, "uri": uri or f"/videos/{name}.mp4", "start_s": start_s, "end_s": end}


def manifest(*videos: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(videos), SCHEMA)


def meta_of(fps: float = 1.0, name: str = "vit-l") -> FeatureMeta:
    return FeatureMeta(
        backbone={"name": name},
        weights=f"{IMPORTED}0",
        mean=[],
        std=[],
        precision="",
        frames_per_second=fps,
        manifest="m",
        tokens=TOKENS,
        width=WIDTH,
        chunk_frames=4,
    )


def imported(
    folder: Path, out: Path, videos: pa.Table, shard_bytes: float = 1e9, fps: float = 1.0
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Import all shards here, in this process; return the rows of the index and the files of no video."""
    files, _ = list_files(str(folder), "auto")
    rows, strangers = plan(videos, files, str(folder), shard_bytes)
    shards = rows["shard"].to_pylist()
    for shard in range(shards[-1] + 1):
        import_shard(rows.slice(shards.index(shard), shards.count(shard)), str(out), meta_of(fps))
    index = finish(str(out), meta_of(fps), videos, shards[-1] + 1, np.zeros((TOKENS, WIDTH), np.float16))
    return index.to_pylist(), strangers


def stored(out: Path, name: str, count: int) -> Array:
    tokens = np.empty((count, TOKENS, WIDTH), np.float16)
    FeatureReader(str(out)).read(name, np.arange(count), tokens)
    return tokens


# --- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_gives_the_array_that_was_written(file_format: str, tmp_path: Path) -> None:
    """Chunks of 4 of 10 frames, the last one of 2."""
    array = frames(10)
    write(tmp_path / "in" / f"a.{file_format}", array)
    (row,), strangers = imported(tmp_path / "in", tmp_path / "out", manifest(video("a", 10.0)))
    assert (row["frames"], row["reason"], strangers) == (10, "", [])
    np.testing.assert_array_equal(stored(tmp_path / "out", "a", 10), array.astype(np.float16))


def test_one_token_a_frame_and_other_float_types(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", frames(6)[:, 0].astype(np.float64))
    save_file({"x": torch.from_numpy(frames(6)).bfloat16()}, tmp_path / "b.safetensors")
    with open_array(str(tmp_path / "a.npy"), "npy") as array:
        assert array.shape == (6, 1, WIDTH)
        np.testing.assert_array_equal(array.tokens(2, 4), frames(6)[2:4, :1].astype(np.float16))
    with open_array(str(tmp_path / "b.safetensors"), "safetensors") as array:
        np.testing.assert_array_equal(array.tokens(0, 6), torch.from_numpy(frames(6)).bfloat16().half().numpy())


def test_a_segment_of_a_compressed_file_skips_what_comes_before(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.npz", frames(20))
    cut = video("a@5-9", 20.0, 5.0, 9.0, uri="/videos/a.mp4")
    (row,), _ = imported(tmp_path / "in", tmp_path / "out", manifest(cut))
    assert (row["frames"], row["start_s"]) == (4, 5.0)
    np.testing.assert_array_equal(stored(tmp_path / "out", "a@5-9", 4), frames(20)[5:9].astype(np.float16))


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "touched",)

    torch.save({"features": Harmful()}, tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", np.array([Harmful()], object))
    for name in ("pt", "npy"):
        with pytest.raises(VideoError), open_array(str(tmp_path / f"a.{name}"), name):
            pass
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"not an array", "its file cannot be read"),
        ("a.npz", b"not an archive", "its file is damaged or of another format"),
        ("a.pt", b"not a tensor", "its file"),
        ("a.safetensors", b"not tensors", "its file"),
        ("a.npy", np.zeros((3, 2), np.int64), "its features are int64 numbers, not float16, float32"),
        ("a.npy", np.zeros((2, 3, 4, 5), np.float32), r"its features have the shape \(2, 3, 4, 5\), not \(T, N, D\)"),
        ("a.npy", np.zeros((0, 3, 4), np.float32), r"its features have the shape \(0, 3, 4\)"),
        ("a.npy", np.float32(1), r"its features have the shape \(\)"),
        ("a.pt", b"hello, this is text", r"its file cannot be read \(it is not one that torch.save wrote\)"),
        ("a.pt", b"", r"its file cannot be read \(it is not one that torch.save wrote\)"),
        ("a.pt", b"\x80\x02e.", "its file is damaged or of another format$"),
    ],
)
def test_files_that_hold_no_features_are_named(name: str, content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(VideoError, match=message), open_array(str(tmp_path / name), name.partition(".")[2]):
        pass


@pytest.mark.parametrize("ending", FORMATS)
def test_files_with_another_ending_than_theirs_are_rejects(ending: str, tmp_path: Path) -> None:
    if ending == "h5":
        pytest.importorskip("h5py")
    for file_format in sorted({"npy", "npz", "pt", "safetensors"} - {ending}):
        write(tmp_path / f"a.{file_format}", frames(10))
        with pytest.raises(VideoError, match="its file"), open_array(str(tmp_path / f"a.{file_format}"), ending):
            pass


def test_damage_anywhere_is_a_reject(tmp_path: Path) -> None:
    """Whatever the libraries stumble over, the import goes on."""
    generator = np.random.default_rng(0)
    rejects = dict.fromkeys(("npy", "npz", "pt", "safetensors"), 0)
    for file_format in rejects:
        path = tmp_path / f"a.{file_format}"
        write(path, frames(6))
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(100):
            damaged = whole.copy()
            damaged[generator.integers(0, min(400, len(whole)), 3)] = generator.integers(0, 256, 3)
            path.write_bytes(damaged.tobytes())
            try:
                with open_array(str(path), file_format) as array, np.errstate(all="ignore"):
                    array.tokens(0, 1)
            except VideoError:
                rejects[file_format] += 1
    assert all(rejects.values())


def test_tensors_that_are_no_features_are_rejects(tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    save_file({"x": torch.tensor(1.0)}, path)
    with pytest.raises(VideoError, match=r"its features have the shape \(\)"), open_array(path, "safetensors"):
        pass
    torch.save(torch.eye(4).to_sparse(), tmp_path / "a.pt")
    with pytest.raises(VideoError, match="its tensor is sparse"), open_array(str(tmp_path / "a.pt"), "pt"):
        pass
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "about")
    with pytest.raises(VideoError, match="its file has no array"), open_array(str(tmp_path / "a.npz"), "npz"):
        pass


@pytest.mark.parametrize("file_format", ["npy", "npz", "h5"])
def test_the_order_of_bytes_does_not_matter(file_format: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{file_format}", frames(6).astype(">f4"))
    with open_array(str(tmp_path / f"a.{file_format}"), file_format) as array:
        np.testing.assert_array_equal(array.tokens(0, 6), frames(6).astype(np.float16))


def test_several_arrays_without_a_name_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=frames(2), two=frames(2))
    message = r"2 arrays \(one, two\) and none is named 'features'"
    with pytest.raises(VideoError, match=message), open_array(str(tmp_path / "a.npz"), "npz"):
        pass


def test_a_disk_that_is_full_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(writer: ShardWriter, *chunk: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "in" / "a.npy", frames(10))
    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(OSError, match="No space left"):
        imported(tmp_path / "in", tmp_path / "out", manifest(video("a", 10.0)))


class Store:
    """An object store whose files fail to open, or to be read to their ends."""

    def __init__(self, opening: OSError | None = None) -> None:
        self.opening = opening

    def open_input_stream(self, name: str) -> io.RawIOBase:
        if self.opening:
            raise self.opening
        return Broken()


class Broken(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        raise OSError("connection reset")


def test_a_network_that_fails_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import stops and can be resumed; only a file that is gone is a reject."""

    def opened(store: Store) -> None:
        monkeypatch.setattr(storage, "filesystem", lambda path: (store, path))
        with open_array("s3://bucket/a.npy", "npy"):
            pass

    with pytest.raises(OSError, match="connection reset"):
        opened(Store())
    with pytest.raises(OSError, match="timed out"):
        opened(Store(OSError("timed out")))
    with pytest.raises(VideoError, match=r"its file cannot be read \(it is not there\)"):
        opened(Store(FileNotFoundError("no such key")))


def test_a_file_that_ends_early_is_a_reject(tmp_path: Path) -> None:
    """Found where it is opened, or at the part that is missing."""
    for name in ("a.npy", "b.npz", "c.safetensors", "d.pt"):
        write(tmp_path / "in" / name, frames(10))
        path = tmp_path / "in" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    rows, _ = imported(tmp_path / "in", tmp_path / "out", manifest(*(video(name, 10.0) for name in "abcd")))
    assert all(row["reason"].startswith("its file ") for row in rows)


def test_a_missing_h5py_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_formats({"npy"})
    with pytest.raises(UserError, match=r"format is 'h5': the package h5py is missing; install it"):
        check_formats({"npy", "h5"})


# --- names and times ------------------------------------------------------------------------------------------------


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
