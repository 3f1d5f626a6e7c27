"""Re-encode one video so that frames at any times are cheap to read: small pictures in short, closed groups.

Times stay what they are, in the old video's own ticks, from 0 at the first frame. Pictures are those that the readers
show: upright, of square pixels.
"""

from __future__ import annotations

import os
from contextlib import closing
from fractions import Fraction
from typing import Any

import av

from pipelines.data.video_requests import Encoding
from s5.errors import VideoError
from s5.video.pyav_reader import PyAVReader
from s5.video.reader import Source
from s5.video.reading import VideoFacts, checked, probe

# Closed groups without B-frames are what decord reads rightly. The tune leaves out what costs most to decode; the key
# frames are set here, by time. The macroblock tree's AVX-512 code reads memory that nobody has set: bytes would vary.
ENCODER = {"tune": "fastdecode", "bf": "0", "forced-idr": "1", "g": str(1 << 30), "threads": "1", "mbtree": "0"}
LARGEST_TICKS = 10_000_000
"""Ticks a second of the finest clock of a container."""
LOST_SHARE = 0.01
"""A video is refused where more than this share of its frames cannot be decoded."""


def encode(source: Source, encoding: Encoding) -> VideoFacts:
    """Write a video's pictures as H.264 in mp4, without sound, and return the facts of the new file.

    Raises:
        VideoError: the video cannot be read to its end, or what was written is not what was read.
        OSError: the file cannot be written.
    """
    with closing(PyAVReader(checked(source))) as reader:
        width, height = fitted(reader.display_size, encoding.short_side)
        reader.resize((width, height))
        time_base = Fraction(reader.time_base).limit_denominator(LARGEST_TICKS)
        try:
            # The file's name need not end in .mp4. The index goes to the front, so that remote files open in one read.
            with av.open(encoding.path, "w", format="mp4", options={"movflags": "faststart"}) as container:
                stream: Any = container.add_stream("libx264", _rate(encoding.fps), options=_options(encoding))
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base = time_base
                _write(container, stream, reader, encoding.gop_s / reader.time_base)
        except av.FFmpegError as error:
            # Errors of decoding are VideoErrors by now.
            raise OSError(error.errno, f"the new video cannot be written ({error.strerror})") from None
    facts = probe(os.path.abspath(encoding.path))
    if facts.num_frames < (1 - LOST_SHARE) * encoding.num_frames:
        raise VideoError(f"{facts.num_frames} of its {encoding.num_frames} frames can be decoded")
    return facts


def _write(container: av.container.OutputContainer, stream: Any, reader: PyAVReader, gop_ticks: float) -> None:
    last, key_due = -1, 0.0
    for tick, picture_HWC in reader.pictures():
        # Of frames at the same time only the last is ever on screen; an encoder takes none of them twice.
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
        # An odd side loses a pixel rather than gain one.
        width, height = (max(2, side // 2 * 2) for side in display_size)
    else:
        width, height = (2 * round(side * short_side / min(display_size) / 2) for side in display_size)
    return width, height


def _rate(fps: float) -> Fraction:
    """Return a frame rate for the encoder's bit rate control; it has no part in the times."""
    return max(Fraction(1, 1000), Fraction(fps).limit_denominator(1001))


def _options(encoding: Encoding) -> dict[str, str]:
    return ENCODER | {"crf": str(encoding.quality), "preset": encoding.speed}
