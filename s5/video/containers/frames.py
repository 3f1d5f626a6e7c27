"""The frames of a video stream in the order in which they are shown, each with its place: its time in ticks.

A place is the presentation time that the file states (`timed`), or is counted (`counted`) in files that state none that
are right: AVI, and MPEG program streams, which state few. A frame that is lost or damaged, or that needs one that is,
is yielded as None: decoders pass over such frames, and hand out others in their place. What needs them ends with the
next key frame.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from s5.video.containers.opening import av_error, rate_of
from s5.video.containers.packets import look_for

Shown = tuple[int, Any]
"""A place, and the frame (av.VideoFrame) that comes on screen there; None for one that is lost or damaged."""
RESYNC_S = 0.25
"""From this difference on, times that a program stream states prevail over those that are counted."""
MAY_PAIR = ("h264",)
"""Codecs of which two packets, with a field each, may make one frame."""
MISSING_FRAMES = 1.5
"""Frames that may pass between two without one being lost there, as times are rounded."""
CUT_FRAMES = 8
"""Frames that may lie between a packet near which some are lost and the loss."""
INTRA = (0, 1)
"""FFmpeg's picture types of frames that need no other: none stated, I."""
DEFAULT_RATE = 25
"""Frames per second of files that state neither times nor a rate."""


class Decoding:
    """A decoder that never raises: what fails to decode is remembered until the next key frame."""

    def __init__(self, stream: Any) -> None:
        self._context = stream.codec_context
        self._look = look_for(str(self._context.codec.canonical_name), self._context.extradata)
        self._damaged = False
        self._broken: set[int | None] = set()
        self.last: int | None = None
        """Place of the last frame."""
        self.cut: int | None = None
        """Time of the last packet near which some are lost, as transport streams say."""

    def decode(self, packet: Any) -> tuple[list[Any], bool, bool]:
        """Return the frames that a packet completes, whether it is ever shown, and whether decoding it failed."""
        seen = self._look(bytes(packet))
        if not seen.whole:
            self._broken.add(packet.pts)
        if packet.is_corrupt:
            self.cut = packet.pts
        shown = seen.shown and not packet.is_discard
        try:
            return packet.decode(), shown, not seen.whole
        except av_error():
            return [], shown, True

    def drain(self) -> list[Any]:
        """Return the frames that are still in the decoder."""
        try:
            return list(self._context.decode(None))
        except (av_error(), EOFError):
            return []

    def lost(self) -> None:
        """Note that a frame is lost, which the next ones need."""
        self._damaged = True

    def misses(self, place: int, length: Fraction | int) -> bool:
        """Return whether frames are lost between the last one and one at a place; `length` is that of a frame.

        Where two recordings were joined, too, packets seem lost: then no time is missing.
        """
        if self.cut is None or self.last is None or not length:
            return False
        gap = place - self.last > MISSING_FRAMES * length
        if gap or self.last - self.cut > CUT_FRAMES * length:
            self.cut = None
        if gap:
            self.lost()
        return gap

    def sound(self, frame: Any) -> Any:
        """Return the frame, or None if it or one that it needs is damaged."""
        broken = frame.is_corrupt or (bool(self._broken) and frame.pts in self._broken)
        if broken or is_entry(frame):
            self._damaged = broken
        return None if self._damaged else frame


def is_entry(frame: Any) -> bool:
    """Return whether decoding can start at a frame: key frames of streams with intra refresh are none."""
    return bool(frame.key_frame) and frame.pict_type in INTRA


def timed(stream: Any, packets: Iterator[Any], floor: int | None) -> Iterator[Shown]:
    """Yield the frames of a stream at the presentation times that the file states.

    After a seek, `floor` is the time of the key frame: frames before it lack references, and are left out.
    """
    decoding, due = Decoding(stream), list[int]()
    length = 1 / (rate * stream.time_base) if (rate := rate_of(stream)) else 0
    pairs = stream.codec_context.codec.canonical_name in MAY_PAIR
    for packet in packets:
        pts = packet.pts
        frames, shown, failed = decoding.decode(packet)
        if shown and pts is not None and (failed or not pairs) and (floor is None or pts >= floor):
            heapq.heappush(due, pts)
        for frame in frames:
            yield from _timed_frame(decoding, due, frame, floor, length)
    for frame in decoding.drain():
        yield from _timed_frame(decoding, due, frame, floor, length)
    yield from ((place, None) for place in sorted(due))


def _timed_frame(
    decoding: Decoding, due: list[int], frame: Any, floor: int | None, length: Fraction | int
) -> Iterator[Shown]:
    """Yield a frame after those that should have come before it; `due` holds the times of frames to come, as a heap."""
    place = frame.pts
    last = decoding.last
    if place is None or (last is not None and place < last):
        # Nobody knows when it is shown: what is shown then is refused.
        yield (0 if last is None else last + 1), None
        return
    if last is not None and decoding.misses(place, length):
        yield last + int(length), None
    decoding.last = place
    while due and due[0] < place:
        decoding.lost()
        yield heapq.heappop(due), None
    if due and due[0] == place:
        heapq.heappop(due)
    sound = decoding.sound(frame)
    if floor is None or place >= floor:
        yield place, sound


def counted(stream: Any, packets: Iterator[Any], by_decoding_time: bool) -> Iterator[Shown]:
    """Yield the frames of a stream at counted places, from its start or from a key frame.

    Every packet after the first few, which fill the decoder, completes a frame. With `by_decoding_time` (AVI, whose
    packets are numbered by the time at which a frame comes on screen, dropped ones left out) a frame takes the place of
    the packet that completes it. Otherwise its place is the sum of the lengths of the frames before it, from the start.
    """
    decoding, slots = Decoding(stream), _Slots(stream, by_decoding_time)
    for packet in packets:
        frames, shown, failed = decoding.decode(packet)
        slots.add(packet, shown)
        if failed:
            decoding.lost()
        if frames:
            yield from _counted_frames(decoding, slots, frames, len(frames))
    yield from _counted_frames(decoding, slots, decoding.drain(), 0, last=True)


def _counted_frames(
    decoding: Decoding, slots: _Slots, frames: list[Any], completed: int, last: bool = False
) -> Iterator[Shown]:
    """Yield frames and those that are lost before them; the last packet completes `completed` of them."""
    slots.notice(completed)
    for frame in frames:
        for place in slots.lost_before():
            decoding.lost()
            yield place, None
        yield slots.take(frame.pts), decoding.sound(frame)
    if last:
        yield from ((place, None) for place in slots.lost())


class _Slots:
    """The places of frames that are counted, one for each packet."""

    def __init__(self, stream: Any, by_decoding_time: bool) -> None:
        rate = rate_of(stream) or DEFAULT_RATE
        self._length = max(1, round(1 / (rate * stream.time_base)))
        self._resync = RESYNC_S / float(stream.time_base)
        self._by_decoding_time = by_decoding_time
        self._places: list[int] = []
        # `fill` packets complete no frame, at the start; `used` places are taken; `still` packets show nothing new.
        self._end = self._fill = self._used = self._still = 0
        # `lost` frames are missing, after `held` ones that are still in the decoder.
        self._lost = self._held = 0
        self._last, self._shift = -self._length, 0
        self._origin: int | None = None

    def add(self, packet: Any, shown: bool) -> None:
        """Take note of a packet that was decoded."""
        numbered = self._by_decoding_time and packet.dts is not None
        self._places.append(packet.dts if numbered else self._end)
        # The first packet of a stream that was cut may state half a frame.
        self._end = self._places[-1] + max(packet.duration or 0, self._length)
        self._still += not shown

    def notice(self, completed: int) -> None:
        """Compare the frames that the last packet completes with those that are due."""
        if self._used == 0:
            self._fill = len(self._places) - completed
        missing = len(self._places) - self._fill - self._used - self._lost - completed
        # Of packets that show nothing new, some complete a frame of the packet before.
        still, self._still = min(max(0, missing), self._still), 0
        for _ in range(still):
            self.take()
        if missing > still:
            # Frames that the decoder holds come before those that it has lost.
            self._lost, self._held = self._lost + missing - still, self._fill

    def lost_before(self) -> list[int]:
        """Return the places of the frames that are lost before the next one."""
        if self._lost and self._held:
            self._held -= 1
            return []
        return self.lost()

    def lost(self) -> list[int]:
        """Return the places of all frames that are lost so far."""
        count, self._lost = self._lost, 0
        return [self.take() for _ in range(count)]

    def take(self, pts: int | None = None) -> int:
        """Return the place of the next frame, whose presentation time the file may state."""
        index, self._used = self._fill + self._used, self._used + 1
        if not self._by_decoding_time:
            place = self._synchronised(self._places[index - self._fill], pts)
        elif index < len(self._places):
            place = self._places[index]
        else:
            # The decoder is being emptied.
            place = self._last + self._length
        self._last = place
        return place

    def _synchronised(self, place: int, pts: int | None) -> int:
        """Return a counted place, moved to where a time that the file states is far from it."""
        if pts is not None:
            self._origin = pts if self._origin is None else self._origin
            away = pts - self._origin - place
            self._shift = away if abs(away - self._shift) > self._resync else self._shift
        return place + self._shift
