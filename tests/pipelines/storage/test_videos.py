"""Videos on an S3 service on this machine: which ranges of a file are fetched."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.data.decoding.decode_tasks import CANDIDATE, ClipSpec, decode_chunk, probe_chunk
from pipelines.data.decoding.video_process import _whole
from s5.config import ClipConfig
from s5.video.reading import probe, read_frames
from tests.pipelines.conftest import SECRET
from tests.s5.videos import code, write_coded


def _upload(path: str, uri: str) -> str:
    storage.write_bytes(uri, Path(path).read_bytes())
    return uri


def _rows(uri: str) -> pa.Table:
    video = {"video_id": "v", "uri": uri, "start_s": 0.0, "end_s": 3.5, "fps": 25.0, "seed": 1, "width": 64}
    return pa.table({"candidates": pa.array([[video | {"height": 64, "decoder": "pyav"}]], pa.list_(CANDIDATE))})


SPEC = ClipSpec(ClipConfig(frames=4, long_stride=0.5, short_stride=0.1), frame_size=64, timeout_s=30.0)


@pytest.mark.parametrize("name", ["a.mp4", "a b ü.mkv"])
def test_a_video_on_s3_is_read_like_a_local_one(bucket: str, tmp_path: Path, name: str) -> None:
    path = write_coded(tmp_path / name, bframes=2)
    uri = _upload(path, f"{bucket}/videos/{name}")
    (facts,) = probe_chunk(pa.table({"uri": [uri]}), 30.0).to_pylist()
    here = probe(path)
    assert facts["reason"] is None
    assert (facts["num_frames"], facts["duration_s"]) == (here.num_frames, here.duration_s)
    assert facts["decoder"] == "pyav"
    remote, local = decode_chunk(_rows(uri), SPEC), decode_chunk(_rows(path), SPEC)
    assert remote["failures"].tolist() == ["[]"]
    np.testing.assert_array_equal(remote["long"], local["long"])


def test_of_a_long_video_only_ranges_are_fetched(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_coded(tmp_path / "a.mp4", frames=250, fps=2, noise=100)
    uri = _upload(path, f"{bucket}/a.mp4")
    monkeypatch.setattr("pipelines.storage.files.WHOLE_BYTES", 0)
    with storage.open_video(uri) as source:
        assert isinstance(source, pa.NativeFile)
        assert code(read_frames(source, np.array([100.0]), 64)[0]) == 200
    with storage.open_video(uri, whole=True) as source:
        assert probe(source) == replace(probe(path), decoder="pyav")
    monkeypatch.setattr("pipelines.storage.files.WHOLE_BYTES", 100 << 20)
    with storage.open_video(uri) as source:
        assert not isinstance(source, (str, pa.NativeFile))
        assert source.read() == Path(path).read_bytes()


class Counting:
    """An open file that counts the bytes that are read of it: what an object store sends."""

    def __init__(self, file: Any) -> None:
        self._file, self.fetched = file, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        data = bytes(self._file.read(size))
        self.fetched += len(data)
        return data


def _write_large(path: Path, codec: str, movflags: str) -> str:
    """Write a video of 8 s and about 19 MB, which is not fetched as a whole for its size."""
    pictures = np.random.default_rng(0).integers(0, 255, (4, 256, 320, 3), np.uint8)
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream: Any = container.add_stream(codec, rate=25, options={"g": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 320, 256, "yuv420p", 20_000_000
        for index in range(200):
            frame = av.VideoFrame.from_ndarray(pictures[index % 4], format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "codec", "movflags"),
    [("a.mp4", "libx264", "faststart"), ("a.mp4", "mpeg4", ""), ("a.mov", "mpeg4", "")],
)
def test_a_probe_fetches_ranges_of_files_with_an_index(
    bucket: str, tmp_path: Path, name: str, codec: str, movflags: str
) -> None:
    path = _write_large(tmp_path / name, codec, movflags)
    uri = _upload(path, f"{bucket}/{name}")
    with storage.open_video(uri, _whole(None)) as source:
        assert isinstance(source, pa.NativeFile)
        counting: Any = Counting(source)
        facts = probe(counting)
    assert facts == replace(probe(path), decoder="pyav")
    # Little more of a longer one: its index, thrice, and what is decoded.
    assert counting.fetched < 6e6 < 0.4 * Path(path).stat().st_size
    # What index does: the same facts from the child.
    (row,) = probe_chunk(pa.table({"uri": [uri]}), 30.0).to_pylist()
    assert (row["num_frames"], row["duration_s"], row["reason"]) == (facts.num_frames, facts.duration_s, None)


def test_a_probe_fetches_other_files_as_a_whole(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.files.WHOLE_BYTES", 0)
    for name in ("a.mkv", "a.avi", "a.ts"):
        path = write_coded(tmp_path / name)
        with storage.open_video(_upload(path, f"{bucket}/{name}"), _whole(None)) as source:
            assert not isinstance(source, (str, pa.NativeFile))
            assert probe(source).num_frames == 90


def test_a_video_that_vanished_from_s3_is_a_failure(bucket: str) -> None:
    columns = decode_chunk(_rows(f"{bucket}/videos/gone.mp4"), SPEC)
    assert columns["video_id"].tolist() == [""]
    assert "gone.mp4" in columns["failures"][0]
    assert SECRET not in columns["failures"][0]


def test_a_local_name_is_given_as_it_is(tmp_path: Path) -> None:
    for name in (str(tmp_path / "a b.mp4"), f"file://{tmp_path}/a b.mp4"):
        with storage.open_video(name) as source:
            assert source == str(tmp_path / "a b.mp4")
