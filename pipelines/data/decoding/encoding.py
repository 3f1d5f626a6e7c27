"""Re-encode one video so that frames at any times are cheap to read: small pictures, closed groups of pictures (GOPs).

Frame times do not change: they are written in the ticks of the old video, from 0 at the first frame. The pictures are
those that the readers return: upright, with square pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from typing import Any

import av

from pipelines.data.decoding.video_requests import EncodeRequest
from s5.errors import VideoError
from s5.video.pyav_reader import PyAVReader
from s5.video.reader import FrameArray, Source
from s5.video.reading import VideoFacts, checked, probe

# decord reads closed GOPs without B-frames correctly. The tune avoids what is slowest to decode. Key frames are placed
# below, by time, and nowhere else. The macroblock tree's AVX-512 code reads uninitialised memory: bytes would vary.
ENCODER = {
    "tune": "fastdecode",
    "bf": "0",
    "forced-idr": "1",
    "g": str(1 << 30),
    "sc_threshold": "0",
    "threads": "1",
    "mbtree": "0",
}
LARGEST_TICKS = 10_000_000
"""Ticks a second of the finest time base that is written."""
LOST_SHARE = 0.01
"""A video is rejected if more than this share of its frames cannot be decoded."""


def encode(source: Source, encoding: EncodeRequest) -> VideoFacts:
    """Write a video's pictures as H.264 in mp4, without sound, and return the facts of the new file.

    Raises:
        VideoError: the video cannot be read to its end, or too many of its frames cannot be decoded.
        OSError: the file cannot be written.
    """
    with closing(PyAVReader(checked(source))) as reader:
        size = fitted(reader.display_size, encoding.short_side)
        reader.resize(size)
        write_pictures(encoding, size, reader.time_base, reader.pictures())
    facts = probe(os.path.abspath(encoding.path))
    if facts.num_frames < (1 - LOST_SHARE) * encoding.num_frames:
        raise VideoError(f"{facts.num_frames} of its {encoding.num_frames} frames can be decoded")
    return facts


def write_pictures(
    encoding: EncodeRequest, size: tuple[int, int], time_base: float, pictures: Iterator[tuple[int, FrameArray]]
) -> None:
    """Write pictures as H.264 in mp4.

    Args:
        encoding: how, and to which file.
        size: their width and height, even numbers.
        time_base: seconds of a tick.
        pictures: each with its time in ticks, ascending; of pictures at the same time, the first is written.

    Raises:
        OSError: the file cannot be written.
        VideoError: from `pictures`.
    """
    try:
        # The file name need not end in .mp4. The index goes to the front, so that remote files open in one read.
        with av.open(encoding.path, "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream: Any = container.add_stream("libx264", _rate(encoding.fps), options=_options(encoding))
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = Fraction(time_base).limit_denominator(LARGEST_TICKS)
            _write(container, stream, pictures, encoding.gop_s / time_base)
    except av.FFmpegError as error:
        # Decoding raises VideoError, so this is about the output.
        raise OSError(error.errno, f"the new video cannot be written ({error.strerror})") from None


def _write(
    container: av.container.OutputContainer, stream: Any, pictures: Iterator[tuple[int, FrameArray]], gop_ticks: float
) -> None:
    last, key_due = -1, 0.0
    for tick, picture_HWC in pictures:
        # The encoder needs ascending times.
        if tick <= last:
            continue
        frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
        frame.pts, frame.time_base = tick, stream.codec_context.time_base
        if tick >= key_due:
            frame.pict_type = av.video.frame.PictureType.I
            key_due = tick + gop_ticks
        container.mux(stream.encode(frame))
        last = tick
    container.mux(stream.encode())


def fitted(display_size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return the width and height, even numbers, of a video scaled down to a short side, never up."""
    if min(display_size) <= short_side:
        # An odd side loses a pixel.
        width, height = (max(2, side // 2 * 2) for side in display_size)
    else:
        width, height = (2 * round(side * short_side / min(display_size) / 2) for side in display_size)
    return width, height


def _rate(fps: float) -> Fraction:
    """Return a frame rate for the encoder's bit rate control; frame times do not depend on it."""
    return max(Fraction(1, 1000), Fraction(fps).limit_denominator(1001))


def _options(encoding: EncodeRequest) -> dict[str, str]:
    return ENCODER | {"crf": str(encoding.quality), "preset": encoding.speed}
