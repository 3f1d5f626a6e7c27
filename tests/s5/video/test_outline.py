"""Files that look joined, cut or jumping, and are not: live, in fragments, with further boxes, or with pauses."""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from s5.errors import VideoError
from s5.video.containers.outline import has_index
from s5.video.containers.scan import scan
from s5.video.reading import probe, read_clips
from tests.s5.odd_videos import FPS
from tests.s5.videos import blocks, code, write_coded

FRAMES = range(90)


class Pipe(io.RawIOBase):
    """What cannot be sought, as a live recording is written to."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.content += data
        return len(data)


def write(path: Path, kind: str, starts: Iterable[int] = FRAMES, bframes: int = 0, fragments: bool = False) -> bytes:
    """Write frames that come on screen at `starts`, in frames, into a pipe; return what is then in the file."""
    codec, pipe = "wmv2" if kind == "asf" else "libx264", Pipe()
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"} if fragments else {}
    # Only mp4 without fragments needs a file.
    target: Any = str(path) if kind == "mp4" and not fragments else pipe
    with av.open(target, "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=FPS, options={"g": "30", "bf": str(bframes), "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 2_000_000
        for index, start in enumerate(starts):
            frame = av.VideoFrame.from_ndarray(blocks(index, (64, 64)), format="rgb24")
            frame.pts, frame.time_base = start, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if target is pipe:
        path.write_bytes(pipe.content)
    return path.read_bytes()


def boxes(content: bytes) -> list[bytes]:
    """Return the top-level boxes of an mp4 file."""
    found = []
    while content:
        size = int.from_bytes(content[:4], "big")
        found.append(content[:size])
        content = content[size:]
    return found


def parts(content: bytes) -> tuple[bytes, list[bytes]]:
    """Return the header of an mp4 file in fragments, and the fragments."""
    kept = [box for box in boxes(content) if box[4:8] in (b"ftyp", b"moov", b"moof", b"mdat")]
    return b"".join(kept[:2]), [moof + mdat for moof, mdat in zip(kept[2::2], kept[3::2], strict=True)]


def assert_reads(path: Path, shown: Iterable[int] = FRAMES, starts: Iterable[int] | None = None) -> None:
    """Each frame is read at its time, by name and from an open file; `starts` are in frames."""
    shown = list(shown)
    starts_T = np.array(shown if starts is None else list(starts))
    times_T = (starts_T - starts_T[0] + 0.5) / FPS
    facts = probe(str(path))
    assert facts.num_frames == len(shown)
    (frames,) = read_clips(str(path), [times_T], 64, (64, 64), facts.decoder)
    assert [code(frame) for frame in frames] == shown
    with path.open("rb") as file:
        (frames,) = read_clips(file, [times_T], 64)
    assert [code(frame) for frame in frames] == shown


@pytest.mark.parametrize("kind", ["asf", "flv", "matroska"])
def test_live_recordings_do_not_state_their_length(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    write(path, kind)
    assert_reads(path)


def test_boxes_behind_the_film_are_not_looked_into(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    content = write(path, "mp4", bframes=2)
    (header,) = [box for box in boxes(content) if box[4:8] == b"moov"]
    endless = (1).to_bytes(4, "big") + b"free" + (1 << 62).to_bytes(8, "big")
    # A header again, without pictures; one of no kind; one of the largest size; and what is no box at all.
    for behind in (header, bytes(8), endless, endless + b"abc", b"abc"):
        path.write_bytes(content + behind)
        assert_reads(path)
    path.write_bytes(content + content)
    with pytest.raises(VideoError, match="2 videos were joined byte by byte"):
        probe(str(path))


@pytest.mark.parametrize(
    ("name", "codec", "bframes"),
    [
        ("a.mp4", "libx264", 3),
        ("a.mp4", "libx265", 3),
        ("a.mp4", "libvpx-vp9", 0),
        ("a.mp4", "libsvtav1", 0),
        ("a.mov", "mpeg4", 2),
        ("a.mov", "mjpeg", 0),
        ("a.mov", "prores_ks", 0),
        ("a.mp4", "mpeg2video", 2),
        ("a.mkv", "libx264", 3),
    ],
)
def test_packets_of_an_open_mp4_file_are_known_without_reading_them(
    tmp_path: Path, name: str, codec: str, bframes: int
) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    starts = [index + index // 10 for index in range(60)]
    path = write_coded(tmp_path / name, codec, 60, size=(128, 96), bframes=bframes, starts=starts, options=options)
    read = scan(path)
    with open(path, "rb") as file:
        skips = has_index(file)
        known = scan(file)
    assert skips == (Path(path).suffix != ".mkv")
    np.testing.assert_array_equal(known.starts_N, read.starts_N)
    assert (known.display_size, known.codec, known.rate) == (read.display_size, read.codec, read.rate)


@pytest.mark.parametrize("bframes", [0, 2])
def test_fragments_of_a_stream(tmp_path: Path, bframes: int) -> None:
    path = tmp_path / "a.mp4"
    header, (first, second, third) = parts(write(path, "mp4", bframes=bframes, fragments=True))
    # As players of HTTP Live Streaming save them: with the header again, or from the middle on.
    path.write_bytes(header + first + header + second + third)
    assert_reads(path)
    path.write_bytes(header + second + third)
    assert_reads(path, range(30, 90))


@pytest.mark.parametrize(("kind", "fragments"), [("mp4", False), ("mp4", True), ("matroska", False)])
@pytest.mark.parametrize("bframes", [0, 3])
def test_a_pause_before_the_last_frames(tmp_path: Path, kind: str, fragments: bool, bframes: int) -> None:
    """The file states the length of decoding, which such frames lie beyond."""
    starts = [*range(40), *range(1040, 1043)]
    path = tmp_path / f"a.{kind}"
    write(path, kind, starts, bframes, fragments)
    assert_reads(path, range(43), starts)


def test_frames_without_times(tmp_path: Path) -> None:
    path = tmp_path / "a.mpegts"
    content = bytearray(write(path, "mpegts"))
    assert_reads(path)
    place, number = 0, -1
    while (place := content.find(b"\0\0\1\xe0", place + 1)) >= 0:
        # The flags of a packet's header (ISO 13818-1, 2.4.3.7): every fourth frame states no time.
        number += 1
        content[place + 7] &= 0x3F if number % 4 == 2 else 0xFF
    path.write_bytes(content)
    with pytest.raises(VideoError, match="22 frames have no time in the file; have a program write it with new times"):
        probe(str(path))
