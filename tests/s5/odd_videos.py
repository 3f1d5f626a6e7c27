"""Videos as they are found in the wild: joined, damaged, with several streams, with hidden frames, and so on.

Frame i shows i, as in `tests.s5.videos.write_coded`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from tests.s5.videos import blocks, silence

FPS = 25
REFRESH = {"x264-params": "intra-refresh=1:keyint=30:bframes=0"}
MATRICES = {
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "turned by 90": (0, 1, -1, 0),
    "turned by 180": (-1, 0, 0, -1),
    "turned by 270": (0, -1, 1, 0),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}
"""The numbers a, b, c, d of display matrices: a point (x, y) is shown at (a x + c y, b x + d y)."""


def encoded(
    codec: str, shown: Sequence[int], size: tuple[int, int] = (64, 64), options: dict[str, str] | None = None
) -> tuple[Any, list[bytes]]:
    """Return an encoder and its packets, one a frame without reordering; `shown` are the numbers that frames show."""
    context: Any = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt = *size, "yuv420p"
    context.framerate, context.time_base, context.bit_rate = FPS, Fraction(1, FPS), 2_000_000
    context.options = {"g": "30", "bf": "0"} | (options or {})
    packets = []
    for place, number in enumerate(shown):
        frame = av.VideoFrame.from_ndarray(blocks(number, size), format="rgb24")
        frame.pts, frame.time_base = place, Fraction(1, FPS)
        packets += context.encode(frame)
    return context, [bytes(packet) for packet in packets + context.encode(None)]


def mux(path: Path, codec: str, packets: Iterable[tuple[bytes, int, bool]], size: tuple[int, int] = (64, 64)) -> str:
    """Write packets, each with its time in milliseconds and whether it is a key frame, and return the file's name."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        container.start_encoding()
        for data, time_ms, key in packets:
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = time_ms
            packet.is_keyframe = key
            container.mux(packet)
    return str(path)


def write_hidden(path: Path, frames: int, every: int) -> str:
    """Write VP8 with a hidden frame before every `every`-th, as two-pass encoders do: it shows what the next one shows.

    The bit of the frame header that shows a frame (RFC 6386, section 9.1) is cleared in the first of two equal frames.
    """
    shown = [number for number in range(frames) for _ in range(2 if number % every == every - 1 else 1)]
    _, packets = encoded("libvpx", shown)
    written = []
    for place, (number, data) in enumerate(zip(shown, packets, strict=True)):
        hidden = place + 1 < len(shown) and shown[place + 1] == number
        data = bytes([data[0] & ~0x10]) + data[1:] if hidden else data
        written.append((data, 1000 * number // FPS - hidden, not data[0] & 1))
    return mux(path, "libvpx", written)


def write_changing(path: Path, sizes: Sequence[tuple[int, int]], frames: int) -> str:
    """Write VP8 whose picture has one size after the other, for `frames` frames each."""
    written = []
    for part, size in enumerate(sizes):
        numbers = range(part * frames, (part + 1) * frames)
        _, packets = encoded("libvpx", numbers, size)
        written += [
            (data, 1000 * number // FPS, not data[0] & 1) for number, data in zip(numbers, packets, strict=True)
        ]
    return mux(path, "libvpx", written, sizes[0])


def write_joined(path: Path, codec: str, frames: int, starts: Sequence[int]) -> str:
    """Write parts of `frames` frames after each other, byte by byte; their clocks start at `starts`, in frames."""
    parts = []
    for number, start in enumerate(starts):
        part = path.with_name(f"part{number}{path.suffix}")
        options = {"output_ts_offset": str(start / FPS)}
        with av.open(str(part), "w", options=options) as container:
            _add_film(container, codec, range(number * frames, (number + 1) * frames), (64, 64))
        parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))
    return str(path)


def write_streams(path: Path, films: Sequence[tuple[tuple[int, int], int]], frames: int) -> str:
    """Write several video streams of a size each; the second number is what the first frame of the stream shows."""
    with av.open(str(path), "w") as container:
        streams = []
        for size, _ in films:
            stream = container.add_stream("libx264", rate=FPS, options={"g": "30", "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            streams.append(stream)
        for index in range(frames):
            for stream, (size, first) in zip(streams, films, strict=True):
                container.mux(stream.encode(_frame(first + index, index, size)))
        for stream in streams:
            container.mux(stream.encode())
    return str(path)


def write_late_sound(path: Path) -> str:
    """Write 6 MB without sound, and then a part with 2 s of sound and one without, of 250, 50 and 50 frames."""
    parts, start = [], 0
    for number, (frames, sound_s) in enumerate([(250, 0), (50, 2), (50, 0)]):
        part = path.with_name(f"part{number}{path.suffix}")
        # Program streams start half a second late, and transport streams a frame, unless told otherwise.
        offset_s = start / FPS + (0.54 if path.suffix == ".mpg" else 0.04) * bool(start)
        with av.open(str(part), "w", options={"output_ts_offset": str(offset_s)}) as container:
            _add_film(container, "mpeg2video", range(start, start + frames), (208, 208), sound_s, noise=100)
        parts.append(part.read_bytes())
        start += frames
    path.write_bytes(b"".join(parts))
    return str(path)


def damage(path: str, first: int, end: int, value: int, kept: float = 0.0) -> str:
    """Overwrite packets of a file, from the first to before the end, but for a share that is kept; return its name."""
    content = bytearray(Path(path).read_bytes())
    with av.open(path) as container:
        places = [(packet.pos or 0, packet.size) for packet in container.demux(video=0) if packet.size]
    for place, size in places[first:end]:
        begin = place + int(kept * size)
        content[begin : place + size] = bytes([value]) * (place + size - begin)
    Path(path).write_bytes(content)
    return path


def set_matrix(path: str, name: str) -> None:
    """Set the display matrix of an mp4's track header (ISO 14496-12, 8.3.2)."""
    a, b, c, d = MATRICES[name]
    content = bytearray(Path(path).read_bytes())
    place = content.find(b"tkhd") + 44
    one = 1 << 16
    content[place : place + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    Path(path).write_bytes(content)


def displayed(picture_HWC: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.uint8]:
    """Return a stored picture as a display matrix shows it, pixel by pixel: the slow reference."""
    a, b, c, d = MATRICES[name]
    height, width = picture_HWC.shape[:2]
    points = {(a * x + c * y, b * x + d * y): picture_HWC[y, x] for y in range(height) for x in range(width)}
    left, top = min(x for x, _ in points), min(y for _, y in points)
    shown = np.zeros((height, width, 3) if a else (width, height, 3), np.uint8)
    for (x, y), pixel in points.items():
        shown[y - top, x - left] = pixel
    return shown


def _add_film(
    container: Any, codec: str, numbers: range, size: tuple[int, int], sound_s: int = 0, noise: int = 0
) -> None:
    stream = container.add_stream(codec, rate=FPS, options={"g": "30", "bf": "0", "b": "50000000"})
    stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
    sound = container.add_stream("mp2", rate=16000, layout="mono") if sound_s else None
    for place, number in enumerate(numbers):
        container.mux(stream.encode(_frame(number, place, size, noise)))
    container.mux(stream.encode())
    for _ in range(sound_s):
        container.mux(sound.encode(silence()))


def _frame(number: int, place: int, size: tuple[int, int], noise: int = 0) -> av.VideoFrame:
    picture = blocks(number % 256, size)
    if noise:
        picture = picture // 2 + np.random.default_rng(number).integers(0, noise, picture.shape, np.uint8) + 20
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    frame.pts, frame.time_base = place, Fraction(1, FPS)
    return frame
