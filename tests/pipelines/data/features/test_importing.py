"""Features of other programs: formats, names of files, times, and what is refused; without Ray."""

from __future__ import annotations

import errno
import importlib.util
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
from pipelines.config import FeaturesConfig, FinetuneConfig, override
from pipelines.data.features.arrays import FORMATS, check_formats, open_array
from pipelines.data.features.cache import IMPORTED, FeatureMeta, ShardWriter, check_fresh, finish, with_imported
from pipelines.data.features.importing import (
    common_shape,
    files_digest,
    import_shard,
    list_files,
    plan,
    segment_frames,
)
from pipelines.data.features.reader import FeatureReader
from pipelines.data.manifest import SCHEMA
from pipelines.errors import UserError
from s5.config import BackboneConfig, ModelConfig
from s5.errors import VideoError
from s5.models.video_model import VideoModel

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
    index = finish(str(out), meta_of(fps), shards[-1] + 1, np.zeros((TOKENS, WIDTH), np.float16))
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
        ("a.npy", np.zeros((3, 2), np.int64), "its features are int64 numbers, not floating-point ones"),
        ("a.npy", np.zeros((2, 3, 4, 5), np.float32), r"its features have the shape \(2, 3, 4, 5\), not \(T, N, D\)"),
        ("a.npy", np.zeros((0, 3, 4), np.float32), r"its features have the shape \(0, 3, 4\)"),
    ],
)
def test_files_that_hold_no_features_are_named(name: str, content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(VideoError, match=message), open_array(str(tmp_path / name), name.partition(".")[2]):
        pass


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
    write(folder / "twice.npy", good)
    write(folder / "sub" / "twice.npz", good)
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


# --- models on them -------------------------------------------------------------------------------------------------


def features_folder(tmp_path: Path) -> str:
    storage.write_json(str(tmp_path / "features.json"), meta_of().__dict__)
    return str(tmp_path)


def test_imported_features_stand_in_for_the_frame_encoder(tmp_path: Path) -> None:
    folder = features_folder(tmp_path)
    config = with_imported(BackboneConfig(name="vit-l", frozen=True), folder)
    assert (config.tokens, config.width) == (TOKENS, WIDTH)
    model = VideoModel(ModelConfig(backbone=config), 4)
    assert not any(name.startswith("backbone") for name in model.state_dict())
    assert model(torch.zeros(2, 5, TOKENS, WIDTH).half()).logits_BC.shape == (2, 4)
    with pytest.raises(ValueError, match=r"frames are given: the model reads imported features of 'vit-l'; give those"):
        model(torch.zeros(1, 5, 224, 224, 3, dtype=torch.uint8))
    check_fresh(folder, meta_of(), config, "", "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "swin"}, r"imported from 'vit-l', not 'swin'; give --model.backbone.name vit-l, or other features"),
        ({"tokens": TOKENS, "width": 9}, r"model.backbone.width is 8 there, not 9; give 8"),
        ({"cls_token": True}, r"imported features are taken as they are; give --model.backbone.no-cls-token"),
    ],
)
def test_features_of_another_kind_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": "vit-l", "frozen": True}
    with pytest.raises(UserError, match=message):
        with_imported(BackboneConfig(**(settings | changes)), features_folder(tmp_path))


def test_another_manifest_and_missing_features_are_refused(tmp_path: Path) -> None:
    folder = features_folder(tmp_path)
    with pytest.raises(UserError, match=r"from another manifest, or it has changed since"):
        check_fresh(folder, meta_of(), BackboneConfig(name="vit-l", frozen=True), "", "other")
    changes = {"model.backbone.frozen": True, "model.backbone.tokens": 3, "model.backbone.width": 8}
    with pytest.raises(UserError, match=r"backbone.tokens is 3: imported features stand in for the frame encoder then"):
        override(FinetuneConfig(), changes)
    with pytest.raises(UserError, match=r"backbone is '': name what made the features of --import"):
        override(FeaturesConfig(), {"import_": folder})
