"""Both decoders: seeking, clocks, rates and sizes. `test_table` covers codecs and containers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import IO, Any, cast

import av
import numpy as np
import numpy.typing as npt
import pytest

from s5.errors import VideoError
from s5.video.containers import opening
from s5.video.containers.scan import scan
from s5.video.decord_reader import DecordReader
from s5.video.pyav_reader import PyAVReader
from s5.video.reader import FrameArray
from s5.video.reading import Decoder, probe, read_clips, read_frames
from tests.s5.videos import code, numbers, write_coded, write_video

FRAMES, FPS = 90, 25
OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=30:min-keyint=30:bframes=3:b-adapt=0:scenecut=0"}


class Counted:
    """A file that counts the bytes that are read of it."""

    def __init__(self, file: Any) -> None:
        self.bytes_read = 0
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        content: bytes = self._file.read(size)
        self.bytes_read += len(content)
        return content


def shown(path: str, times_T: npt.NDArray[np.float64], decoder: Decoder) -> list[int]:
    """Return the codes of the frames of one pass."""
    return [code(frame) for frame in read_clips(path, [times_T], 64, (64, 64), decoder)[0]]


def test_frames_before_the_key_frame_that_they_are_stored_behind(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a.mp4", options=OPEN_GROUPS)
    assert scan(path).open_groups
    assert probe(path).decoder == "pyav"
    for index in range(FRAMES):
        assert shown(path, np.array([index / FPS]), "pyav") == [index]


@pytest.mark.parametrize(
    ("codec", "bframes", "suffix"),
    [
        ("libx264", 3, "mp4"),
        ("libx264", 3, "mkv"),
        ("libx264", 3, "ts"),
        ("libx264", 3, "flv"),
        ("libsvtav1", 0, "webm"),
        ("mpeg4", 2, "mkv"),
        ("wmv2", 0, "wmv"),
    ],
)
def test_frames_far_apart(tmp_path: Path, codec: str, bframes: int, suffix: str) -> None:
    """Key frames are 15 s apart, so that PyAV seeks in every container."""
    path = write_coded(tmp_path / f"a.{suffix}", codec, FRAMES, 2, bframes=bframes)
    rng = np.random.default_rng(0)
    for _ in range(12):
        clip = np.sort(rng.permutation(FRAMES)[:3])
        assert shown(path, (clip + 0.5) / 2, "pyav") == clip.tolist()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_what_lies_between_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = Path(write_coded(tmp_path / f"a.{suffix}", frames=250, fps=2, noise=100))
    monkeypatch.setattr(opening, "BUFFER_BYTES", 4096)
    with path.open("rb", buffering=0) as file:
        counted = Counted(file)
        frame = PyAVReader(cast(IO[bytes], counted)).read(np.array([120.0]))[0]
    assert code(frame) == 240
    assert counted.bytes_read < 0.4 * path.stat().st_size, path.stat()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_clock_that_does_not_start_at_zero(tmp_path: Path, suffix: str) -> None:
    path = write_coded(tmp_path / f"a.{suffix}", starts=[50 + index for index in range(FRAMES)])
    facts = probe(path)
    assert facts.duration_s == pytest.approx(FRAMES / FPS, rel=1e-3)
    assert shown(path, np.array([0.0, 1.02, 3.0, 99.0]), facts.decoder) == [0, 25, 75, 89]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_variable_rate(tmp_path: Path, suffix: str) -> None:
    codec = "mpeg4" if suffix == "avi" else "libx264"
    starts = np.cumsum(np.random.default_rng(0).integers(1, 12, FRAMES)) - 1
    path = write_coded(tmp_path / f"a.{suffix}", codec, starts=(starts - starts[0]).tolist())
    begin = (starts - starts[0]) / FPS
    for decoder in (probe(path).decoder, "pyav"):
        assert shown(path, begin, decoder) == list(range(FRAMES))
        assert shown(path, begin[1:] - 0.02, decoder) == list(range(FRAMES - 1))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_sound_that_outlasts_the_pictures(tmp_path: Path, suffix: str) -> None:
    path = write_coded(tmp_path / f"a.{suffix}", "mpeg4", 20, sound_s=8)
    facts = probe(path)
    assert facts.num_frames == 20
    assert facts.duration_s == pytest.approx(0.8, rel=0.1)
    assert shown(path, np.array([0.41, 7.0]), facts.decoder) == [10, 19]


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_one_frame(tmp_path: Path, decoder: Decoder) -> None:
    assert shown(write_coded(tmp_path / "a.mp4", frames=1), np.array([0.0, 1.0]), decoder) == [0, 0]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_both_decoders_turn_a_video_as_it_is_displayed(tmp_path: Path, rotation: int, suffix: str) -> None:
    path = write_coded(tmp_path / f"a.{suffix}", frames=40, size=(96, 64), rotation=rotation)
    facts = probe(path)
    assert (facts.width, facts.height) == ((96, 64) if rotation == 180 else (64, 96))
    # decord leaves Matroska's rotation out.
    assert facts.decoder == ("decord" if suffix == "mp4" else "pyav")
    frames = read_clips(path, [np.array([0.2, 1.48])], 64, (facts.width, facts.height), facts.decoder)[0]
    upright = PyAVReader(path, (facts.width, facts.height)).read(np.array([0.2, 1.48]))
    turned = [np.rot90(frame, -rotation // 90) for frame in upright]
    assert [code(frame) for frame in turned] == [5, 37]
    crop = [frame[16:80] if rotation != 180 else frame[:, 16:80] for frame in upright]
    np.testing.assert_allclose(frames.astype(int), np.stack(crop).astype(int), atol=6)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a.mp4", size=(64, 64), pixel_aspect=Fraction(2))
    facts = probe(path)
    assert (facts.width, facts.height) == (128, 64)
    for decoder in ("decord", "pyav"):
        (frame,) = read_clips(path, [np.array([15 / FPS])], 64, (128, 64), decoder)[0]
        # Bits 1 and 2 of each row of four fill the square crop.
        assert [frame[16, column].mean() > 115 for column in (16, 48)] == [True, True]
        assert frame[48].max() < 60
    np.testing.assert_array_equal(read_frames(path, np.array([0.0]), 64).shape, (1, 64, 64, 3))


@pytest.mark.parametrize("size", [(95, 63), (63, 95), (33, 35)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_coded(tmp_path / "a.avi", "mpeg4", size=size)
    facts = probe(path)
    assert (facts.width, facts.height) == size
    readers = DecordReader(path, *size), PyAVReader(path, size)
    first, second = (reader.read(np.array([1.0]))[0].astype(int) for reader in readers)
    assert first.shape == second.shape == (*size[::-1], 3)
    assert code(first) == code(second) == 25


def test_both_decoders_give_nearly_the_same_pictures(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a.mp4", size=(160, 120))
    times = np.array([0.4, 2.2])
    first, second = (
        read_clips(path, [times], 48, (160, 120), decoder)[0].astype(int) for decoder in ("decord", "pyav")
    )
    assert np.abs(first - second).mean() < 1


def test_an_open_file_is_read_like_its_name(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a.mp4", bframes=2)
    times = np.array([0.1, 1.9, 3.4])
    with Path(path).open("rb") as file:
        facts = probe(file)
        assert (facts.num_frames, facts.decoder) == (FRAMES, "pyav")
        read = read_clips(file, [times], 64, (64, 64), "pyav")[0]
        assert not file.closed
    np.testing.assert_array_equal(read, read_clips(path, [times], 64, (64, 64), "pyav")[0])


def test_pyav_takes_over_where_decord_fails(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a.webm", "libsvtav1")
    with pytest.raises(VideoError, match="decord cannot open"):
        DecordReader(path, 64, 64)
    assert shown(path, np.array([1.0]), "decord") == [25]


def frames_by_hand(path: str, indices: list[int]) -> FrameArray:
    """Return frames of a video by number, decoded from the start."""
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([frames[index] for index in indices])


def test_pictures_are_those_of_a_plain_decoding(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 24, fps=8)
    read = PyAVReader(path).read(np.array([0.5, 2.0]))
    np.testing.assert_array_equal(np.stack(read), frames_by_hand(path, [4, 16]))
    assert numbers(np.stack(read)) == [4, 16]
