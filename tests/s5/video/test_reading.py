"""Reading frames by time, and saying what is wrong with a file."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from s5.errors import VideoError
from s5.video.reading import Decoder, probe, read_clips, read_frames, scaled
from tests.s5.videos import code, numbers, truncate, write_audio, write_coded, write_video


def test_facts_of_a_video(tmp_path: Path) -> None:
    facts = probe(write_video(tmp_path / "a.mp4", 24, fps=8, width=96, height=64))
    assert (facts.num_frames, facts.width, facts.height, facts.codec) == (24, 96, 64, "h264")
    assert facts.duration_s == pytest.approx(3.0)
    assert facts.fps == pytest.approx(8.0)


def test_a_video_of_one_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 1)
    assert probe(path).duration_s == pytest.approx(1 / 8)
    assert numbers(read_frames(path, np.array([0.0, 5.0]), 32)) == [0, 0]


def test_a_time_takes_the_frame_on_screen(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 24, fps=8)
    times = np.array([0.0, 0.1, 0.125, 0.24, 1.0, 2.875, 99.0])
    assert numbers(read_frames(path, times, 64)) == [0, 0, 1, 1, 8, 23, 23]


def test_every_frame_of_a_constant_rate_is_found_at_its_own_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 50, fps=30)
    assert numbers(read_frames(path, np.arange(50) / 30, 64)) == list(range(50))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_of_a_variable_rate_are_found_by_their_own_times(tmp_path: Path, suffix: str) -> None:
    starts = [0.0, 0.1, 0.2, 1.0, 1.1, 3.0]
    path = write_video(tmp_path / f"a{suffix}", 6, fps=10, starts=starts)
    assert numbers(read_frames(path, np.array([0.15, 0.9, 1.05, 2.9, 3.0]), 64)) == [1, 2, 3, 4, 5]


def test_one_pass_over_two_clips_equals_two_reads(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 48, fps=8, width=80, height=64)
    long_T, short_T = np.linspace(0, 5.8, 8), np.linspace(2, 3, 8)
    long, short = read_clips(path, [long_T, short_T], 32)
    np.testing.assert_array_equal(long, read_frames(path, long_T, 32))
    np.testing.assert_array_equal(short, read_frames(path, short_T, 32))


def test_times_may_repeat_and_fall(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 24, fps=8)
    assert numbers(read_frames(path, np.array([1.0, 1.0, 0.5, 2.0]), 64)) == [8, 8, 4, 16]


# 16, 24 and 48 are the widths that decord's own scaling fails on.
@pytest.mark.parametrize("size", [16, 24, 32, 48, 64, 96, 112, 224])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (176, 144), (64, 114)])
def test_any_frame_size(tmp_path: Path, size: int, width: int, height: int) -> None:
    path = write_video(tmp_path / "a.mp4", 8, width=width, height=height)
    frames = read_frames(path, np.array([0.0, 0.5]), size)
    assert frames.shape == (2, size, size, 3)
    assert frames.dtype == np.uint8
    assert numbers(frames) == [0, 4]


def test_scaling_keeps_the_aspect_ratio() -> None:
    assert scaled((1280, 720), 224) == (398, 224)
    assert scaled((720, 1280), 224) == (224, 398)
    assert scaled((100, 1), 64) == (6400, 64)


def test_the_crop_is_the_centre(tmp_path: Path) -> None:
    path = str(tmp_path / "a.mp4")
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 32:96] = 200
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    frame = read_frames(path, np.zeros(1), 64)[0]
    assert abs(float(frame[:, 2:-2].mean()) - 200) < 4


def test_a_rotated_video_is_read_as_it_is_displayed(tmp_path: Path) -> None:
    path = Path(write_video(tmp_path / "a.mp4", 8, width=96, height=64))
    content = bytearray(path.read_bytes())
    # The display matrix of the track header (ISO 14496-12, 8.3.2): a quarter turn.
    matrix = content.find(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    facts = probe(str(path))
    assert (facts.width, facts.height) == (64, 96)
    assert numbers(read_frames(str(path), np.array([0.25]), 32)) == [2]


def test_names_with_spaces_and_other_alphabets(tmp_path: Path) -> None:
    path = write_video(tmp_path / "Ünï code ☃ 视频.mp4", 8)
    assert probe(path).num_frames == 8
    assert numbers(read_frames(path, np.array([0.5]), 64)) == [4]


def _broken(kind: str, folder: Path) -> str:
    path = folder / "broken.mp4"
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("this is not a video\n" * 100)
        case "audio":
            write_audio(path)
        case "truncated":
            truncate(write_video(path, 48))
        case "only a header":
            content = Path(write_video(path, 48)).read_bytes()
            path.write_bytes(content[: content.find(b"mdat") + 4])
        case "zeroed end":
            content = Path(write_video(path, 48)).read_bytes()
            path.write_bytes(content[:-400] + bytes(400))
        case "folder":
            path.mkdir()
        case "link to itself":
            path.symlink_to(path)
        case "no index":
            content = Path(write_coded(folder / "a.mov")).read_bytes()
            path.write_bytes(content[: content.find(b"moov") - 4])
    return str(path)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "file not found"),
        ("link to itself", "file not found"),
        ("folder", "a folder, not a file"),
        ("empty", "empty"),
        ("text", "not a video"),
        ("no index", "not a video file, or a truncated one"),
        ("audio", "no video stream"),
        ("truncated", "truncated: .* of the 6.0 s"),
        ("only a header", "no frame"),
        ("zeroed end", "frame.*fails to decode"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path: Path, kind: str, reason: str) -> None:
    with pytest.raises(VideoError, match=reason) as raised:
        probe(_broken(kind, tmp_path))
    assert str(tmp_path) not in raised.value.reason


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mkv"), ("mpeg4", "avi"), ("libvpx-vp9", "webm")])
def test_a_file_that_ends_before_the_length_it_states(tmp_path: Path, codec: str, suffix: str) -> None:
    path = write_coded(tmp_path / f"a.{suffix}", codec)
    assert probe(path).num_frames == 90
    with pytest.raises(VideoError, match=r"truncated: .* of the 3\.6 s that the file states"):
        probe(truncate(path, 0.6))


def test_a_transport_stream_states_no_length_and_may_be_cut(tmp_path: Path) -> None:
    path = truncate(write_coded(tmp_path / "a.ts"), 0.6)
    facts = probe(path)
    assert 0 < facts.num_frames < 90
    assert code(read_frames(path, np.array([1.0]), 64)[0]) == 25


def test_a_damaged_middle(tmp_path: Path) -> None:
    path = Path(write_coded(tmp_path / "a.mp4"))
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = next(packet for packet in container.demux(video=0) if packet.pts == 50 * packet.duration)
        content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(content)
    with pytest.raises(VideoError, match="fails to decode"):
        read_clips(str(path), [np.arange(90) / 25], 64, (64, 64), "pyav")
    # Nothing depends on the damaged frame in the groups of pictures before and after it.
    assert [code(frame) for frame in read_frames(str(path), np.array([0.8, 2.8]), 64)] == [20, 70]


def test_a_playlist_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.m3u8"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://localhost:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(VideoError):
        probe(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = Path(write_video(tmp_path / "a.mp4", 8))
    path.chmod(0)
    with pytest.raises(VideoError, match="no permission"):
        probe(str(path))


@pytest.mark.parametrize("name", ["a b.mp4", "a\nb.mp4", "日本.mp4", "a:b.mp4", "%20.mp4", "-a.mp4", "a'\"b.mp4"])
def test_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = write_video(tmp_path / name, 8)
    monkeypatch.chdir(tmp_path)
    for form in (path, name):
        facts = probe(form)
        assert facts.decoder == "decord"
        for decoder in ("decord", "pyav"):
            assert numbers(read_clips(form, [np.array([0.5])], 64, (64, 64), decoder)[0]) == [4]


@pytest.mark.parametrize("decoder", [None, "decord", "pyav"])
@pytest.mark.parametrize("kind", ["missing", "empty", "text", "audio", "truncated"])
def test_reading_a_broken_video_raises_a_video_error(tmp_path: Path, kind: str, decoder: Decoder | None) -> None:
    with pytest.raises(VideoError):
        read_clips(_broken(kind, tmp_path), [np.array([0.0, 5.9])], 32, (64, 64), decoder)


def test_the_module_imports_without_decoders() -> None:
    code = "import s5.video, sys; sys.exit('decord' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
