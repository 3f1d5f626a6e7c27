"""Reading frames by time, and saying what is wrong with a file."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from s5.video import VideoError, probe, read_clips, read_frames, scaled
from tests.s5.videos import numbers, truncate, write_audio, write_video


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


@pytest.mark.parametrize(
    ("codec", "suffix"), [("mpeg4", ".avi"), ("libvpx-vp9", ".webm"), ("mpeg2video", ".mpg"), ("libx264", ".ts")]
)
def test_other_codecs_and_containers(tmp_path: Path, codec: str, suffix: str) -> None:
    path = write_video(tmp_path / f"a{suffix}", 50, fps=25, codec=codec)
    assert probe(path).num_frames == 50
    assert numbers(read_frames(path, np.array([0.0, 0.4, 1.0]), 64)) == [0, 10, 25]


def test_one_pass_over_two_clips_equals_two_reads(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 48, fps=8, width=80, height=64)
    long_T, short_T = np.linspace(0, 5.8, 8), np.linspace(2, 3, 8)
    long, short = read_clips(path, [long_T, short_T], 32)
    np.testing.assert_array_equal(long, read_frames(path, long_T, 32))
    np.testing.assert_array_equal(short, read_frames(path, short_T, 32, (80, 64)))


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
    import av

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
        case "zeroed end":
            content = Path(write_video(path, 48)).read_bytes()
            path.write_bytes(content[:-400] + bytes(400))
        case "folder":
            path.mkdir()
    return str(path)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "file not found"),
        ("folder", "file not found"),
        ("empty", "empty"),
        ("text", "not a video"),
        ("audio", "no video stream"),
        ("truncated", "decoder cannot open|fails to decode|not a video"),
        ("zeroed end", "frame.*fails to decode"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, kind: str, reason: str) -> None:
    with pytest.raises(VideoError, match=reason):
        probe(_broken(kind, tmp_path))


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "audio", "truncated"])
def test_reading_a_broken_video_raises_a_video_error(tmp_path: Path, kind: str) -> None:
    with pytest.raises(VideoError):
        read_frames(_broken(kind, tmp_path), np.array([0.0, 5.9]), 32, (64, 64))


def test_the_module_imports_without_decoders() -> None:
    code = "import s5.video, sys; sys.exit('decord' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
