"""Files of features of other programs: formats, and which are refused."""

from __future__ import annotations

import errno
import importlib.util
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipelines import storage
from pipelines.data.features.arrays import FORMATS, check_formats, open_array
from pipelines.data.features.cache import (
    ShardWriter,
)
from pipelines.errors import UserError
from s5.errors import VideoError
from tests.pipelines.data.features.imported import (
    WIDTH,
    frames,
    imported,
    manifest,
    stored,
    video,
    write,
)


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
