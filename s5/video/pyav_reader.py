"""Read videos with PyAV (FFmpeg), on one thread: any codec, container and frame order, from paths and open files; and
`scan`, which finds out what is in a file from its packets.

The frames of a video are those that decoding from its start yields; each is on screen from its presentation time on.
AVI files store no presentation times: if their codec reorders frames, frames are counted and get a constant rate.

Shapes: N frames of a video, U times in ascending order, H height and W width of a picture in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from s5.errors import VideoError
from s5.video.reader import TOLERANCE_S, FloatArray, FrameArray, Source

if TYPE_CHECKING:
    import av

MISSING_SHARE, MISSING_S = 0.05, 0.5
"""A video is truncated if more than this share and this many seconds of its stated length are missing."""
WHOLE_INDEX = ("mov", "avi")
"""Prefixes of FFmpeg's names of formats whose index is complete once opened; in others it grows while reading."""
FAR_S = 10.0
"""Gap in seconds from which seeking is tried without an index."""
MAX_PIXEL_ASPECT = 4
"""A pixel aspect ratio beyond this is taken for an error in the file; pixels then count as square."""
NO_SEEKING = ("mpeg",)
"""FFmpeg's names of formats in which seeking skips frames (MPEG program streams): read from the start."""
BUFFER_BYTES = 1 << 18
"""Bytes per read of an open file."""


@dataclass(frozen=True)
class Contents:
    """What is in a video file; sizes in pixels, times in seconds after the first frame."""

    codec: str
    container: str
    """FFmpeg's name of the format."""
    display_size: tuple[int, int]
    """Width and height on screen: of square pixels and rotated."""
    rotation: int
    """Degrees by which stored pictures are rotated for display, counter-clockwise: 0, 90, 180 or 270."""
    rate: float
    """Frames per second that the container states; 0 if it states none."""
    starts_N: FloatArray
    """When each frame comes on screen, ascending."""
    counted: bool
    """Frames were counted, at a constant rate, for lack of presentation times."""
    open_groups: bool
    """Some frames are shown before the key frame that they follow in the file, and may need frames before it."""


def scan(source: Source) -> Contents:
    """Read all packets of a video file, decode its first frame, and return what is in it.

    Raises:
        VideoError: it is no video, has no video stream or frames, is truncated, or its first frame fails to decode.
    """
    with _opened(source) as container:
        stream = _video_stream(container)
        packets = _packets(container, stream)
        rate = float(stream.average_rate or stream.base_rate or 0)
        codec, name = str(stream.codec_context.codec.canonical_name), str(container.format.name)
    with closing(PyAVReader(source)) as reader:
        first, counted, size, rotation = reader.first, reader.counted, reader.display_size, reader.rotation
        time_base = reader.time_base
    ticks = range(len(packets)) if counted else sorted(pts for pts, _ in packets if pts is not None)
    starts_N = (np.array(ticks, np.float64) - first) * time_base
    # Frames before the first decodable one, as in a recording that starts in mid-stream, do not count.
    starts_N = starts_N[starts_N >= 0]
    if len(starts_N) == 0:
        raise VideoError("the times of its packets and of its frames contradict each other")
    return Contents(codec, name, size, rotation, rate, starts_N, counted, _has_open_groups(packets))


def _packets(container: av.container.InputContainer, stream: Any) -> list[tuple[int | None, bool]]:
    """Return the time in ticks and the key-frame flag of each packet that is shown, in the order of the file.

    Raises:
        VideoError: there are none, or the file ends well before the length that its header states.
    """
    packets: list[tuple[int | None, bool]] = []
    end_s = video_end_s = 0.0
    try:
        for packet in container.demux():
            time = packet.dts if packet.pts is None else packet.pts
            shown_s = float(((time or 0) + (packet.duration or 0)) * (packet.time_base or 0))
            end_s = max(end_s, shown_s)
            if packet.stream is stream and packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.is_keyframe))
                video_end_s = max(video_end_s, shown_s)
    except _error() as error:
        raise VideoError(f"the file is damaged after {end_s:.2f} s{_short_reason(error)}") from None
    if not packets:
        raise VideoError("no frames in the video stream")
    if container.format.name == "avi" and stream.average_rate:
        # If the end of the file is missing, FFmpeg estimates a duration from its size.
        stated_s, found_s = float(stream.frames / stream.average_rate), video_end_s
    elif stream.duration:
        start_s = float((stream.start_time or 0) * stream.time_base)
        stated_s, found_s = float(stream.duration * stream.time_base), video_end_s - start_s
    else:
        # Sound may continue after the last frame.
        stated_s, found_s = (container.duration or 0) / 1e6, end_s
    if stated_s - found_s > max(MISSING_S, MISSING_SHARE * stated_s):
        raise VideoError(f"truncated: {found_s:.1f} of the {stated_s:.1f} s that the file states are there")
    return packets


def _has_open_groups(packets: list[tuple[int | None, bool]]) -> bool:
    key: int | None = None
    for pts, is_key in packets:
        if is_key:
            key = pts
        elif pts is not None and key is not None and pts < key:
            return True
    return False


class PyAVReader:
    """A video opened by PyAV.

    Args:
        source: what to read.
        size: width and height in pixels of the pictures, as displayed; None for the video's own.

    Raises:
        VideoError: it cannot be opened, or its first frame fails to decode.
    """

    def __init__(self, source: Source, size: tuple[int, int] | None = None) -> None:
        self._source = source
        self._shown: Any = None
        self._next: tuple[int, Any] | None = None
        self._picture: tuple[Any, FrameArray] | None = None
        self._open()
        context = self._stream.codec_context
        # AVI stores decoding times only.
        self.counted = self._container.format.name == "avi" and bool(context.has_b_frames)
        self._start()
        if self._next is None:
            raise VideoError("no frame of the video stream can be decoded")
        frame = self._next[1]
        if frame.pts is None and not self.counted:
            self.counted = True
            self._open()
            self._start()
        rate = float(self._stream.average_rate or self._stream.base_rate or 0)
        if self.counted and not rate:
            raise VideoError("the file has neither times of the frames nor a frame rate")
        self.time_base: float = 1 / rate if self.counted else float(self._stream.time_base)
        self.first: int = 0 if self.counted else frame.pts
        self.rotation: int = round(frame.rotation / 90) * 90 % 360
        self.display_size: tuple[int, int] = _display_size(frame, self._stream.sample_aspect_ratio, self.rotation)
        self._size: tuple[int, int] = size or self.display_size

    def close(self) -> None:
        """Free the decoder; an open file that was given stays open."""
        self._decode_from(iter(()), None)
        self._picture = None
        self._container.close()

    def read(self, times_U: FloatArray) -> list[FrameArray]:
        """Return the pictures at ascending times; see `Reader`."""
        return [self._picture_of(self._at(float(time))) for time in times_U]

    def resize(self, size: tuple[int, int]) -> None:
        """Set the width and height in pixels of the pictures, as displayed."""
        self._size, self._picture = size, None

    def pictures(self) -> Iterator[tuple[int, FrameArray]]:
        """Yield the pictures of all frames from the first on, each with its time in ticks of `time_base` after it.

        Raises:
            VideoError: a frame fails to decode.
        """
        while self._next is not None:
            place, frame = self._next
            yield place - self.first, self._picture_of(frame)
            self._next = next(self._frames, None)

    def _at(self, time_s: float) -> Any:
        """Return the frame on screen at a time; times must ascend from call to call."""
        tick = int(np.floor(self.first + (time_s + TOLERANCE_S) / self.time_base))
        if self._next is not None and self._seeking_pays(self._next[0], tick):
            self._seek(tick)
        while self._next is not None and (self._next[0] <= tick or self._shown is None):
            self._shown, self._next = self._next[1], next(self._frames, None)
        if self._shown is None:
            raise VideoError(f"no frame at {time_s:.2f} s can be decoded")
        return self._shown

    def _picture_of(self, frame: Any) -> FrameArray:
        if self._picture is None or self._picture[0] is not frame:
            width, height = self._size[::-1] if self.rotation in (90, 270) else self._size
            # Bilinear, as in decord.
            picture_HWC = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR")
            self._picture = frame, np.rot90(picture_HWC, self.rotation // 90)
        return self._picture[1]

    # --- frames in order ---

    def _open(self) -> None:
        self._container = _opened(self._source)
        self._stream = _video_stream(self._container)

    def _start(self) -> None:
        """Decode from the first frame of an opened file."""
        self._decode_from(self._container.demux(self._stream), None)

    def _decode_from(self, packets: Iterator[Any], floor: int | None) -> None:
        self._frames = self._decoded(packets, floor)
        self._shown = None
        self._next = next(self._frames, None)

    def _decoded(self, packets: Iterator[Any], floor: int | None) -> Iterator[tuple[int, Any]]:
        """Yield each frame with its presentation time in ticks or, if frames are counted, its number."""
        number = 0
        try:
            for packet in packets:
                for frame in packet.decode():
                    place = number if self.counted or frame.pts is None else frame.pts
                    number += 1
                    # After a seek, frames shown before the key frame lack references.
                    if floor is None or place >= floor:
                        yield place, frame
        except _error() as error:
            raise VideoError(f"frame {number} after the last seek fails to decode{_short_reason(error)}") from None

    # --- seeking ---

    def _seeking_pays(self, position: int, tick: int) -> bool:
        """Return whether there is a key frame between the next frame and a time, as far as the container knows."""
        if self.counted or tick <= position or self._container.format.name in NO_SEEKING:
            return False
        entries = self._stream.index_entries
        place = entries.search_timestamp(tick, backward=True) if len(entries) else -1
        whole = self._container.format.name.startswith(WHOLE_INDEX)
        if 0 <= place < len(entries) - 1 or (place >= 0 and whole):
            return bool(entries[place].timestamp > position)
        return (tick - position) * self.time_base > FAR_S

    def _seek(self, tick: int) -> None:
        """Continue from a key frame at or before a time, or from the start of the file."""
        target, step = tick, 1
        while target > self.first:
            try:
                self._container.seek(target, stream=self._stream, backward=True)
                packets = self._container.demux(self._stream)
                key = next((packet for packet in packets if packet.is_keyframe and packet.pts is not None), None)
            except _error():
                break
            if key is not None and key.pts <= tick:
                self._decode_from(chain([key], packets), key.pts)
                if self._next is not None and self._next[0] <= tick:
                    return
            # Containers may seek by decoding times, or to no key frame at all: try further ahead.
            target, step = target - step, max(2 * step, int(1 / self.time_base))
        self._container.close()
        self._open()
        self._start()


def _opened(source: Source) -> av.container.InputContainer:
    """Open a video file; raise `VideoError` if it is none."""
    import av

    if not isinstance(source, str):
        source.seek(0)
    try:
        # A playlist must not make this process fetch what it names.
        options = {"protocol_whitelist": "file"}
        return av.open(source, "r", options=options, metadata_errors="replace", buffer_size=BUFFER_BYTES)
    except _error() as error:
        raise VideoError(f"not a video file, or a truncated one{_short_reason(error)}") from None


def _video_stream(container: av.container.InputContainer) -> Any:
    """Return the first video stream that is not a cover image, set to one thread."""
    import av

    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            stream.codec_context.thread_count = 1
            return stream
    raise VideoError("no video stream in the file")


def _display_size(frame: Any, aspect: Fraction | None, rotation: int) -> tuple[int, int]:
    """Return the width and height on screen of a frame whose pixels have an aspect ratio."""
    width, height = frame.width, frame.height
    if aspect and 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        width = max(1, round(width * aspect))
    return (height, width) if rotation in (90, 270) else (width, height)


def _error() -> type[Exception]:
    """Return the exception that PyAV raises for errors of FFmpeg."""
    import av

    return av.FFmpegError


def _short_reason(error: Exception) -> str:
    """Return FFmpeg's message without the file name."""
    said = getattr(error, "strerror", None)
    return f" ({said})" if said else ""
