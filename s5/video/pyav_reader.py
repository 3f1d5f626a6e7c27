"""Read videos with PyAV (FFmpeg), on one thread: any codec, container and frame order, from paths and open files.

The frames of a video are those that decoding from its start yields (`frames`). Seeking only saves decoding: it leads to
a key frame, and is given up if that turns out to need earlier frames.

Shapes: N frames of a video, U times in ascending order, H height and W width of a picture in pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from s5.errors import VideoError
from s5.video.containers.frames import MAY_PAIR, Shown, counted, is_entry, timed
from s5.video.containers.opening import av_error, opened, packets_of, short_reason, video_stream
from s5.video.crops import Box, Cropper
from s5.video.pictures import Turn, aspect_of, display_size, turn_of
from s5.video.reader import FloatArray, FrameArray, Source, tolerance

WHOLE_INDEX = ("mov", "avi")
"""Prefixes of FFmpeg's names of formats whose index is complete once opened, except for fragments of mp4."""
FAR_S = 10.0
"""Gap in seconds from which seeking is tried without an index."""
DENSE_S = 1.0
"""An index that has an entry this close to a time knows the key frame before it."""
BY_DECODING_TIME, NO_TIMES = "avi", "mpeg"
"""FFmpeg's names of formats whose frames are counted: AVI, and MPEG program streams, which state few times."""
ASPECT_CHANGE = 0.02
"""Largest change of the aspect ratio in the middle of a video, as from rounding."""


class PyAVReader:
    """A video opened by PyAV.

    Args:
        source: what to read.
        size: width and height in pixels of the pictures, as displayed; None for the video's own.
        stream: place of the video stream among all streams of the file; None to choose (`opening.video_stream`).

    Raises:
        VideoError: it cannot be opened, or no frame can be decoded.
    """

    def __init__(self, source: Source, size: tuple[int, int] | None = None, stream: int | None = None) -> None:
        self._source, self._asked = source, stream
        self._frames: Iterator[Shown] = iter(())
        self._shown: Shown | None = None
        self._next: Shown | None = None
        self._picture: tuple[Any, FrameArray] | None = None
        # Packets that were read ahead.
        self._packets: deque[Any] = deque()
        self.first = 0
        self._open()
        self.time_base: float = float(self._stream.time_base)
        self._format = str(self._container.format.name)
        self.counted = self._format in (BY_DECODING_TIME, NO_TIMES)
        # Without B-frames, a frame of an AVI file has the decoding time of its packet.
        self.seekable: bool = not self.counted or (
            self._format == BY_DECODING_TIME and not self._stream.codec_context.has_b_frames
        )
        self._start()
        if self._next is None and not self.counted:
            self.counted, self.seekable = True, False
            self._restart()
        if self._next is None:
            raise VideoError("no frame of the video stream can be decoded")
        self.first = self._next[0]
        frame = self._next[1]
        self.stream: int = self._stream.index
        codec = str(self._stream.codec_context.codec.canonical_name)
        self.paired: bool = codec in MAY_PAIR and bool(frame.interlaced_frame)
        """Two packets, with a field each, may make one frame."""
        self.turn: Turn = turn_of(frame)
        self._stored: tuple[int, int] = frame.width, frame.height
        self._aspect: float = aspect_of(frame, self._stream.sample_aspect_ratio)
        self.display_size: tuple[int, int] = display_size(frame, self._stream.sample_aspect_ratio, self.turn)
        self._size: tuple[int, int] = size or self.display_size

    def close(self) -> None:
        """Free the decoder; an open file that was given stays open."""
        self._frames = iter(())
        self._packets.clear()
        self._shown = self._next = self._picture = None
        self._container.close()

    def read(self, times_U: FloatArray) -> list[FrameArray]:
        """Return the pictures at ascending times; see `Reader`."""
        return [self._picture_of(*self._at(float(time))) for time in times_U]

    def cropper(self, box: Box, size: int) -> Cropper:
        """Return what cuts a box, in pixels as displayed, out of the video's frames and scales it to (size, size)."""
        return Cropper(box, self.display_size, self.turn, size)

    def crop(self, time_s: float, cropper: Cropper) -> FrameArray:
        """Return what a cropper cuts out of the picture on screen at a time; times must ascend from call to call.

        Raises:
            VideoError: the frame fails to decode, or cannot be cropped.
        """
        return cropper(self._checked(*self._at(time_s)))

    def resize(self, size: tuple[int, int]) -> None:
        """Set width and height in pixels of the pictures to come, as displayed."""
        self._size, self._picture = size, None

    def pictures(self) -> Iterator[tuple[int, FrameArray]]:
        """Yield the pictures of all frames from the first on, each with its time in ticks of `time_base` after it.

        Raises:
            VideoError: a frame fails to decode.
        """
        while self._next is not None:
            place, frame = self._next
            yield place - self.first, self._picture_of(place, frame)
            self._next = next(self._frames, None)

    def places(self) -> Iterator[int]:
        """Yield the times of all frames from the first on, lost ones too, in ticks after it; decodes them all."""
        while self._next is not None:
            yield self._next[0] - self.first
            self._next = next(self._frames, None)

    def _at(self, time_s: float) -> Shown:
        """Return the place and frame on screen at a time; times must ascend from call to call."""
        tick = int(np.floor(self.first + time_s / self.time_base))
        if self._next is not None and self._next[0] < tick:
            self._approach(tick)
        while self._next is not None and (self._shown is None or self._due_s(self._next[0]) <= time_s):
            self._shown, self._next = self._next, next(self._frames, None)
        assert self._shown is not None
        return self._shown

    def _due_s(self, place: int) -> float:
        """Return the time from which the next frame is taken, a little before its place."""
        assert self._shown is not None
        length_s = (place - self._shown[0]) * self.time_base
        return (place - self.first) * self.time_base - tolerance(length_s)

    def _checked(self, place: int, frame: Any) -> Any:
        at_s = (place - self.first) * self.time_base
        if frame is None:
            raise VideoError(f"the frame at {at_s:.2f} s, or one that it needs, fails to decode")
        if (frame.width, frame.height) != self._stored and not self._keeps_shape(frame):
            raise VideoError(f"the shape of the picture changes, to {frame.width} x {frame.height} at {at_s:.2f} s")
        return frame

    def _picture_of(self, place: int, frame: Any) -> FrameArray:
        frame = self._checked(place, frame)
        if self._picture is None or self._picture[0] is not frame:
            width, height = self._size[::-1] if self.turn.transposed else self._size
            # Bilinear, as in decord.
            picture_HWC = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR")
            self._picture = frame, self.turn.applied(picture_HWC)
        return self._picture[1]

    def _keeps_shape(self, frame: Any) -> bool:
        return abs(aspect_of(frame, self._stream.sample_aspect_ratio) / self._aspect - 1) <= ASPECT_CHANGE

    # --- frames in order ---

    def _open(self) -> None:
        self._container = opened(self._source)
        self._stream = video_stream(self._container, self._asked)
        self._read_on()

    def _read_on(self) -> None:
        """Read packets from where the file stands."""
        self._file_packets = packets_of(self._container, self._stream)
        self._packets.clear()

    def _pulled(self) -> Iterator[Any]:
        while True:
            packet = self._packets.popleft() if self._packets else self._pull()
            if packet is None:
                return
            yield packet

    def _pull(self) -> Any:
        """Return the next packet of the file, or None at its end."""
        try:
            return next(self._file_packets, None)
        except av_error() as error:
            raise VideoError(f"the file is damaged{short_reason(error)}") from None

    def _start(self) -> None:
        """Decode from the first frame of an opened file; those that fail before it do not count."""
        self._decode(None)
        while self._next is not None and self._next[1] is None:
            self._next = next(self._frames, None)

    def _restart(self) -> None:
        self._container.close()
        self._open()
        self._start()

    def _decode(self, floor: int | None) -> None:
        self._frames = (
            counted(self._stream, self._pulled(), self._format == BY_DECODING_TIME)
            if self.counted
            else timed(self._stream, self._pulled(), floor)
        )
        self._shown = None
        self._next = next(self._frames, None)

    # --- seeking ---

    def _approach(self, tick: int) -> None:
        """Skip frames that need not be decoded for a time: from a key frame on, if there is one in between."""
        assert self._next is not None
        if not self.seekable:
            return
        position, entries = self._next[0], self._stream.index_entries
        place = entries.search_timestamp(tick, backward=True) if len(entries) else -1
        key = entries[place].timestamp if place >= 0 else position
        if key > position:
            self._seek(tick)
        elif self._is_known(entries, place, tick):
            return
        elif (tick - max(key, position)) * self.time_base > FAR_S:
            self._seek(tick)
        else:
            self._skip(tick)

    def _is_known(self, entries: Any, place: int, tick: int) -> bool:
        """Return whether the container's index has all key frames up to a time."""
        if not self._format.startswith(WHOLE_INDEX):
            return 0 <= place < len(entries) - 1
        near = entries.search_timestamp(tick, backward=True, any_frame=True) if len(entries) else -1
        return bool(near >= 0 and (tick - entries[near].timestamp) * self.time_base < DENSE_S)

    def _skip(self, tick: int) -> None:
        """Read packets up to a time, and decode on from the last key frame among them, if there is one."""
        read: list[Any] = []
        key: int | None = None
        while (packet := self._packets.popleft() if self._packets else self._pull()) is not None:
            if packet.is_keyframe and packet.pts is not None and self._time_of(packet) <= tick:
                key, read = self._time_of(packet), []
            read.append(packet)
            if (packet.dts if packet.dts is not None else packet.pts or 0) > tick:
                break
        self._packets.extendleft(reversed(read))
        if key is not None:
            self._stream.codec_context.flush_buffers()
            self._enter(key)

    def _enter(self, key: int) -> None:
        """Decode from a key frame, the next packet; if it needs earlier ones, read the file from its start."""
        self._decode(key)
        place, frame = self._next or (None, None)
        if place != key or frame is None or not is_entry(frame):
            self.seekable = False
            self._restart()

    def _time_of(self, packet: Any) -> int:
        """Return the place of the frame of a packet at which decoding starts."""
        return int(packet.dts if self._format == BY_DECODING_TIME else packet.pts)

    def _seek(self, tick: int) -> None:
        """Continue from a key frame at or before a time, or from the start of the file."""
        target, step = tick, 1
        while target > self.first:
            try:
                self._container.seek(target, stream=self._stream, backward=True)
            except av_error():
                break
            self._read_on()
            packets = iter(self._pull, None)
            packet = next((packet for packet in packets if packet.is_keyframe and packet.pts is not None), None)
            if packet is not None and self._time_of(packet) <= tick:
                self._packets.appendleft(packet)
                self._enter(self._time_of(packet))
                return
            # Containers may seek by decoding times, or to no key frame at all: try further ahead.
            target, step = target - step, max(2 * step, int(1 / self.time_base))
        self._restart()
