"""Kinds of files that people have, and decoders read wrongly in silence: each is right, or refused with the reason."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from s5.errors import VideoError
from s5.video import pyav_reader
from s5.video.choice import stream_of
from s5.video.containers.scan import scan
from s5.video.pyav_reader import PyAVReader
from s5.video.reading import probe, read_clips
from tests.s5.odd_videos import (
    FPS,
    MATRICES,
    displayed,
    encoded,
    mux,
    set_matrix,
    write_changing,
    write_hidden,
    write_joined,
    write_late_sound,
    write_streams,
)
from tests.s5.videos import blocks, code, write_coded


def alone(path: str, times_s: list[float]) -> list[int]:
    """Return the codes of frames that are read alone."""
    facts = probe(path)
    size = facts.width, facts.height
    return [code(read_clips(path, [np.array([time])], 48, size, facts.decoder)[0][0]) for time in times_s]


def together(path: str, times_T: np.ndarray) -> list[int]:
    """Return the codes of frames that are read in one pass."""
    facts = probe(path)
    (frames,) = read_clips(path, [times_T], 48, (facts.width, facts.height), facts.decoder)
    return [code(frame) for frame in frames]


# --- frames, packets and times --------------------------------------------------------------------------------------


def test_hidden_frames_are_no_frames(tmp_path: Path) -> None:
    path = write_hidden(tmp_path / "a.webm", 120, 17)
    with av.open(path) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 127
    assert probe(path).num_frames == 120
    assert together(path, (np.arange(120) + 0.5) / FPS) == list(range(120))
    assert alone(path, [index / FPS for index in (16, 17, 33, 34, 35, 118)]) == [16, 17, 33, 34, 35, 118]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("bframes", [0, 3])
def test_a_refresh_has_no_key_frames(tmp_path: Path, suffix: str, bframes: int) -> None:
    options = {"x264-params": f"intra-refresh=1:keyint=30:bframes={bframes}"}
    path = write_coded(tmp_path / f"a.{suffix}", bframes=bframes, options=options)
    assert len(scan(path).keys) > 1
    assert probe(path).decoder == "pyav"
    assert alone(path, [index / FPS for index in range(25, 75)]) == list(range(25, 75))
    reader = PyAVReader(path, (64, 64))
    assert code(reader.read(np.array([2.8]))[0]) == 70
    assert not reader.seekable


def test_key_frames_that_a_file_makes_up(tmp_path: Path) -> None:
    """Without its table of key frames, every frame of an mp4 counts as one (ISO 14496-12, 8.6.2)."""
    path = Path(write_coded(tmp_path / "a.mp4"))
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    assert probe(str(path)).decoder == "pyav"
    assert alone(str(path), [index / FPS for index in range(20, 45)]) == list(range(20, 45))


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
@pytest.mark.parametrize("starts", [(0, 0), (25000, 0), (0, 25000), (0, 60)])
def test_a_clock_that_jumps(tmp_path: Path, suffix: str, starts: tuple[int, int]) -> None:
    codec = "mpeg2video" if suffix == "mpg" else "libx264"
    with pytest.raises(VideoError, match=r"the times jump from 3\.5"):
        probe(write_joined(tmp_path / f"a.{suffix}", codec, 90, starts))


@pytest.mark.parametrize(
    ("suffix", "codec", "reason"),
    [
        ("mkv", "libx264", "the times jump from 3.5"),
        ("flv", "libx264", "cannot be read"),
        ("mp4", "libx264", "2 videos were joined"),
        ("mov", "mpeg4", "2 videos were joined"),
        ("wmv", "wmv2", "2 videos were joined"),
        ("mxf", "mpeg2video", "90 of 180 frames have the time of the next one"),
    ],
)
def test_other_containers_that_were_joined(tmp_path: Path, suffix: str, codec: str, reason: str) -> None:
    for starts in ((0, 0), (0, 25000)):
        with pytest.raises(VideoError, match=reason):
            probe(write_joined(tmp_path / f"a.{suffix}", codec, 90, starts))


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("wmv", "wmv2")])
def test_an_open_file_is_read_like_a_path(tmp_path: Path, suffix: str, codec: str) -> None:
    path = write_coded(tmp_path / f"a.{suffix}", codec, 90)
    with open(path, "rb") as file:
        assert probe(file).num_frames == probe(path).num_frames == 90


def test_parts_whose_clocks_continue(tmp_path: Path) -> None:
    path = write_joined(tmp_path / "a.ts", "libx264", 90, (0, 90))
    assert together(path, (np.arange(180) + 0.5) / FPS) == list(range(180))


@pytest.mark.parametrize("suffix", ["avi", "mkv"])
@pytest.mark.parametrize(
    ("codec", "bframes"), [("mpeg4", 0), ("mpeg4", 2), ("libx264", 0), ("libx264", 3), ("mpeg2video", 2)]
)
def test_frames_that_were_dropped(tmp_path: Path, suffix: str, codec: str, bframes: int) -> None:
    starts = [*range(60), *range(110, 170)]
    path = write_coded(tmp_path / f"a.{suffix}", codec, 120, bframes=bframes, starts=starts)
    assert probe(path).duration_s == pytest.approx(6.8, rel=0.01)
    shown = [int(np.searchsorted(starts, place, side="right")) - 1 for place in range(170)]
    assert together(path, (np.arange(170) + 0.5) / FPS) == shown
    assert alone(path, [index / FPS for index in (59, 60, 109, 110, 111, 169)]) == [59, 59, 59, 60, 61, 119]


@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video"])
def test_program_streams_that_state_few_times(tmp_path: Path, codec: str) -> None:
    path = str(tmp_path / "a.mpg")
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"g": "12", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 50_000
        for index in range(250):
            frame = av.VideoFrame.from_ndarray(blocks(index, (64, 64)), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert together(path, (np.arange(250) + 0.5) / FPS) == list(range(250))


@pytest.mark.parametrize("fps", [240, 500, 1000])
@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mp4"), ("libx264", "mkv"), ("libx265", "mp4")])
def test_short_frames(tmp_path: Path, codec: str, suffix: str, fps: int) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_coded(tmp_path / f"a.{suffix}", codec, 60, fps, options=options)
    assert together(path, np.arange(60) / fps) == list(range(60))
    assert together(path, (np.arange(60) + 0.5) / fps) == list(range(60))


def test_a_stream_that_appears_late(tmp_path: Path) -> None:
    for suffix in ("mpg", "ts"):
        path = write_late_sound(tmp_path / f"a.{suffix}")
        facts = probe(path)
        assert facts.num_frames == 350
        times = np.array([0.02, 9.98, 10.02, 12.02, 13.98])
        (frames,) = read_clips(path, [times], 64, (208, 208), facts.decoder)
        assert [code(frame) for frame in frames] == [index % 256 for index in (0, 249, 250, 300, 349)]


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_a_still_with_a_long_sound_track(tmp_path: Path, suffix: str, frames: int) -> None:
    path = write_coded(tmp_path / f"a.{suffix}", frames=frames, sound_s=60)
    if (suffix, frames) == ("ts", 1):
        with pytest.raises(VideoError, match="neither times of the frames nor a frame rate"):
            probe(path)
        return
    facts = probe(path)
    assert (facts.num_frames, facts.duration_s) == (frames, pytest.approx(frames / FPS, rel=0.1))
    assert alone(path, [0.0, 59.0]) == [0, frames - 1]


# --- streams and pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("film", [0, 1])
def test_of_several_streams_the_largest_is_read_everywhere(tmp_path: Path, suffix: str, film: int) -> None:
    small, large = ((64, 48), 0), ((128, 96), 100)
    path = write_streams(tmp_path / f"a.{suffix}", [large, small] if film == 0 else [small, large], 60)
    facts = probe(path)
    assert (facts.width, facts.height, facts.decoder, stream_of(facts.decoder)) == (128, 96, f"pyav:{film}", film)
    assert alone(path, [index / FPS for index in (0, 31, 59)]) == [100, 131, 159]
    # What `transcode` opens.
    reader = PyAVReader(path)
    assert (reader.stream, code(next(reader.pictures())[1])) == (film, 100)
    with pytest.raises(VideoError, match="stream 7 of the file"):
        PyAVReader(path, stream=7)


def test_of_equally_large_streams_the_first_is_read(tmp_path: Path) -> None:
    assert alone(write_streams(tmp_path / "a.mp4", [((64, 64), 100), ((64, 64), 0)], 40), [1.0]) == [125]


@pytest.mark.parametrize("name", list(MATRICES))
def test_pictures_are_turned_and_mirrored(tmp_path: Path, name: str) -> None:
    path = write_coded(tmp_path / "a.mp4", size=(96, 64))
    with av.open(path) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][37]
    set_matrix(path, name)
    facts, expected = probe(path), displayed(stored, name)
    assert (facts.height, facts.width) == expected.shape[:2]
    assert facts.decoder == ("decord" if name.startswith("turned") else "pyav")
    (shown,) = read_clips(path, [np.array([37 / FPS])], 64, (facts.width, facts.height), facts.decoder)[0]
    top, left = (facts.height - 64) // 2, (facts.width - 64) // 2
    np.testing.assert_allclose(shown.astype(int), expected[top : top + 64, left : left + 64].astype(int), atol=8)


def test_pictures_that_change_their_shape(tmp_path: Path) -> None:
    path = write_changing(tmp_path / "a.webm", [(64, 64), (128, 48)], 45)
    with pytest.raises(VideoError, match="the shape of the picture changes, from 64 x 64 to 128 x 48"):
        probe(path)
    reader = PyAVReader(path, (64, 64))
    assert code(reader.read(np.array([1.0]))[0]) == 25
    with pytest.raises(VideoError, match=r"the shape of the picture changes, to 128 x 48 at 2\.00 s"):
        reader.read(np.array([2.0]))


def test_pictures_that_change_their_size_but_not_their_shape(tmp_path: Path) -> None:
    path = write_changing(tmp_path / "a.webm", [(64, 64), (128, 128)], 45)
    assert together(path, (np.arange(90) + 0.5) / FPS) == list(range(90))


@pytest.mark.parametrize(
    ("name", "codec", "tag", "unknown", "told"),
    [
        ("a.mp4", "libx264", b"avc1", b"zzz9", ", tag 'zzz9'"),
        ("a.avi", "mpeg4", b"FMP4", b"zzz9", ", tag 'zzz9'"),
        ("a.mkv", "libx264", b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/ZZZ", ", whose name FFmpeg does not know"),
    ],
)
def test_a_codec_that_nobody_decodes(
    tmp_path: Path, name: str, codec: str, tag: bytes, unknown: bytes, told: str
) -> None:
    path = Path(write_coded(tmp_path / name, codec))
    path.write_bytes(path.read_bytes().replace(tag, unknown))
    with pytest.raises(VideoError, match=f"no decoder for its codec{told}"):
        probe(str(path))


# --- seeking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["libx265", "libsvtav1"])
def test_fragments_are_skipped_and_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    flags = "frag_keyframe+empty_moov+default_base_moof+global_sidx"
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w", options={"movflags": flags}) as container:
        options = {"g": "25"} | ({"x265-params": "log-level=none"} if codec == "libx265" else {})
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for index in range(250):
            frame = av.VideoFrame.from_ndarray(blocks(index, (64, 64)), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    decoded = []
    timed = pyav_reader.timed

    def counting(*arguments: object) -> object:
        for place, frame in timed(*arguments):  # type: ignore[arg-type]
            decoded.append(place)
            yield place, frame

    monkeypatch.setattr(pyav_reader, "timed", counting)
    reader = PyAVReader(path, (64, 64))
    assert [code(frame) for frame in reader.read(np.array([1.0, 5.02, 9.9]))] == [25, 125, 247]
    assert len(decoded) < 120


def test_a_film_without_pictures_has_no_frames(tmp_path: Path) -> None:
    _, packets = encoded("libvpx", range(10))
    hidden = [(bytes([data[0] & ~0x10]) + data[1:], 40 * place, not data[0] & 1) for place, data in enumerate(packets)]
    with pytest.raises(VideoError, match="no frames"):
        probe(mux(tmp_path / "a.webm", "libvpx", hidden))


def test_without_decord_pyav_reads_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Arm, for which decord has no wheel."""
    monkeypatch.setitem(sys.modules, "decord", None)
    path = write_coded(tmp_path / "a.mp4")
    assert probe(path).decoder == "pyav"
    assert code(read_clips(path, [np.array([1.0])], 64, (64, 64), "decord")[0][0]) == 25
