"""Open a video file with PyAV (FFmpeg), choose its video stream, and read that stream's packets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from s5.errors import VideoError
from s5.video.reader import Source

if TYPE_CHECKING:
    import av

MAX_RATE = 1000
"""Highest frame rate that is believed where only the base rate is stated."""
BUFFER_BYTES = 1 << 18
"""Bytes per read of an open file."""


def opened(source: Source) -> av.container.InputContainer:
    """Open a video file; raise `VideoError` if it is none."""
    import av

    if not isinstance(source, str):
        source.seek(0)
    try:
        # A playlist must not make this process fetch what it names.
        options = {"protocol_whitelist": "file"}
        return av.open(source, "r", options=options, metadata_errors="replace", buffer_size=BUFFER_BYTES)
    except av_error() as error:
        raise VideoError(f"not a video file, or a truncated one{short_reason(error)}") from None


def films(container: av.container.InputContainer) -> list[Any]:
    """Return the video streams that are no cover images."""
    import av

    still = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    return [stream for stream in container.streams.video if not stream.disposition & still]


def video_stream(container: av.container.InputContainer, index: int | None = None) -> Any:
    """Return the video stream of a file that is read, set to one thread.

    It is the one with the largest pictures among those that are no cover images and that FFmpeg can decode, and of
    equally large ones the first.

    Args:
        container: an open file.
        index: place of the stream among all streams of the file, where it has been chosen before.

    Raises:
        VideoError: there is none.
    """
    streams = films(container)
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise VideoError(f"no decoder for {_tag(container)}" if streams else "no video stream in the file")
    if index is None:
        chosen = max(known, key=lambda stream: stream.codec_context.width * stream.codec_context.height)
    else:
        chosen = next((stream for stream in known if stream.index == index), None)
    if chosen is None:
        raise VideoError(f"stream {index} of the file is no video any more; index it again")
    chosen.codec_context.thread_count = 1
    return chosen


def packets_of(container: av.container.InputContainer, stream: Any = None) -> Iterator[Any]:
    """Yield the packets of a stream, or of all streams, that hold data.

    PyAV raises IndexError at the end of a file in which a stream appears late.
    """
    packets = container.demux(stream) if stream else container.demux()
    while True:
        try:
            packet = next(packets, None)
        except IndexError:
            return
        if packet is None:
            return
        if packet.size:
            yield packet


def rate_of(stream: Any) -> Fraction:
    """Return the frames per second that a file states for a video stream; 0 if it states none."""
    # Without a rate, FFmpeg's base rate is that of the clock.
    base = stream.base_rate if (stream.base_rate or 0) <= MAX_RATE else None
    return stream.average_rate or stream.codec_context.framerate or base or Fraction(0)


@contextmanager
def complaints(container: av.container.InputContainer) -> Iterator[list[tuple[int, str, str]]]:
    """Collect what FFmpeg logs as errors, such as lost blocks, which it otherwise passes over.

    Each is a level, the name of the part of FFmpeg and a text. Only Matroska's are collected: other containers state
    where each packet is.
    """
    import av

    if not container.format.name.startswith("matroska"):
        yield []
        return
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as logs:
            yield logs
    finally:
        av.logging.set_level(level)


def _tag(container: Any) -> str:
    """Return what the file says about the codec of its first video stream."""
    import av

    level = av.logging.get_level()
    # PyAV takes the text from FFmpeg's log.
    av.logging.set_level(av.logging.INFO)
    try:
        found = re.search(r"Video: (\S+)(?: \((\S+) / (\S+)\))?", container.dumps_format())
    finally:
        av.logging.set_level(level)
    if not found or found[1] == "none,":
        return "its codec, whose name FFmpeg does not know"
    return f"its codec, tag {found[2]!r} ({found[3]})" if found[2] else f"its codec {found[1]!r}"


def av_error() -> type[Exception]:
    """Return the exception that PyAV raises for errors of FFmpeg."""
    import av

    return av.FFmpegError


def short_reason(error: Exception) -> str:
    """Return FFmpeg's message without the file name."""
    said = getattr(error, "strerror", None)
    return f" ({said})" if said else ""
