"""Find out what is in a video file: from its packets, or from all its frames where packets do not give their times.

Shapes: N frames of a video.
"""

from __future__ import annotations

from array import array
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from s5.errors import VideoError
from s5.video.containers.asf import lost_objects, missing_share
from s5.video.containers.frames import RESYNC_S
from s5.video.containers.opening import (
    av_error,
    complaints,
    films,
    opened,
    packets_of,
    rate_of,
    short_reason,
    video_stream,
)
from s5.video.containers.outline import Hollow, Outline, outline
from s5.video.containers.packets import Look, Seen, look_for, unread
from s5.video.pictures import Turn
from s5.video.pyav_reader import ASPECT_CHANGE, PyAVReader
from s5.video.reader import FloatArray, IntArray, Source

if TYPE_CHECKING:
    import av

MISSING_SHARE, MISSING_S = 0.05, 0.5
"""A video is truncated if more than this share and this many seconds of its stated length are missing."""
LARGEST_GAP_S = {"mpeg": RESYNC_S, "mpegts": 10.0}
"""By FFmpeg's name of a format, the largest gap between two frames that is no jump of the clock. Both state times every
0.7 s at least; program streams not that of each frame."""
JUMP_S, REORDERED_FRAMES = 10.0, 16
"""A larger gap that ends behind the length that the file states is a jump, in any format, if more frames follow it than
codecs show out of order: the stated length may be that of decoding."""
UNREAD_SHARE, HOLE_BYTES = 0.05, 1024
"""Largest share of an flv file behind its last packet, and largest number of bytes between two packets, whose headers
take 20 or so."""
PAIRED_FRAMES, PAIRED_SHARE = 48, 0.2
"""Frames that are decoded of a video whose packets may have a field each, and the share of packets beyond them that
says so."""
UNSHOWN_SHARE = 0.05
"""Largest share of the frames that may have the time of the next one, and so are never on screen."""


@dataclass(frozen=True)
class Contents:
    """What is in a video file; sizes in pixels, times in seconds after the first frame."""

    codec: str
    container: str
    """FFmpeg's name of the format."""
    stream: int
    """Place of the video stream among all streams of the file (`opening.video_stream`)."""
    streams: int
    """Video streams of the file that are no cover images."""
    display_size: tuple[int, int]
    """Width and height on screen: of square pixels and turned."""
    turn: Turn
    """How pictures are turned and mirrored for display."""
    rate: float
    """Frames per second that the container states; 0 if it states none."""
    starts_N: FloatArray
    """When each frame comes on screen, ascending."""
    keys: list[float]
    """When the frames of the packets that are marked as key frames come on screen; none where packets were not read."""
    decoded: bool
    """All frames were decoded to find their times."""
    open_groups: bool
    """Some frames are shown before the key frame that they follow in the file, and may need frames before it."""
    reordered: bool
    """Some frames are shown before others that they follow in the file."""
    plain: bool
    """Every packet was read, has a frame that is shown once and the form that its codec prescribes, and decoding can
    start at every key frame."""


@dataclass
class _Packets:
    """What the packets of the video stream say."""

    times: array[int] = field(default_factory=lambda: array("q"))
    """Presentation times in ticks of the frames that are shown, in the order of the file."""
    keys: list[int] = field(default_factory=list)
    untimed: int = 0
    jumps_back: bool = False
    """Decoding times do not ascend."""
    plain: bool = True
    open_groups: bool = False
    reordered: bool = False
    end_s: float = 0.0
    """When the last frame ends, on the clock of the file."""
    all_end_s: float = 0.0
    """The same for all streams."""
    end_byte: int = 0
    """Where the last packet of all streams ends in the file."""
    hole_bytes: int = 0
    """Largest number of bytes between two packets of any stream that follow each other in the file."""


def scan(source: Source) -> Contents:
    """Read all packets of a video file, decode its first frame, and return what is in it.

    Of an open mp4 file without fragments, the packets are known from its index and not read.

    Raises:
        VideoError: it is no video, has no video stream or frames, is truncated or damaged, its times jump, the shape of
            its pictures changes, or no frame can be decoded.
    """
    hollow = None if isinstance(source, str) else Hollow(source)
    with opened(source if hollow is None else cast(IO[bytes], hollow)) as container:
        about = outline(source, container.format.name)
        if about.parts > 1:
            raise VideoError(
                f"{about.parts} videos were joined byte by byte, of which the first alone is played; join them with a "
                "program that writes a new file"
            )
        stream = video_stream(container)
        packets = _packets_of(container, stream, about, hollow)
        if container.format.name == "asf":
            _check_asf(source, stream.id)
        _check_length(container, stream, packets, about.fragmented)
        rate, stated_s = float(rate_of(stream)), (container.duration or 0) / 1e6
        codec, name = str(stream.codec_context.codec.canonical_name), str(container.format.name)
        place, streams = stream.index, len(films(container))
    with closing(PyAVReader(source, stream=place)) as reader:
        first, size, turn, time_base = reader.first, reader.display_size, reader.turn, reader.time_base
        ticks_N, decoded = _ticks(reader, packets)
    starts_N = ticks_N.astype(np.float64) * time_base
    if len(starts_N) == 0:
        raise VideoError("the times of its packets and of its frames contradict each other")
    _check_clock(starts_N, name, stated_s)
    keys = [(key - first) * time_base for key in packets.keys if key >= first]
    found = packets.open_groups, packets.reordered, packets.plain and not packets.untimed
    return Contents(codec, name, place, streams, size, turn, rate, starts_N, keys, decoded, *found)


def _packets_of(container: av.container.InputContainer, stream: Any, about: Outline, hollow: Hollow | None) -> _Packets:
    """Return what the packets say, without reading them where their size alone serves."""
    codec, extradata = str(stream.codec_context.codec.canonical_name), stream.codec_context.extradata
    look = unread(codec) if hollow and about.packets else None
    if hollow and look:
        hollow.packets = about.packets
    with complaints(container) as errors:
        packets = _read(container, stream, look or look_for(codec, extradata))
    if look:
        # FFmpeg's parsers look for key frames in the bytes.
        packets.keys, packets.plain = [], False
    for _, part, text in errors:
        # A little may be missing at the end.
        if part.startswith("matroska") and "prematurely" not in text:
            raise VideoError(f"the file is damaged ({text.strip()})")
    return packets


def _ticks(reader: PyAVReader, packets: _Packets) -> tuple[IntArray, bool]:
    """Return the times (N,) of frames in ticks after the first, and whether all frames were decoded for them."""
    # AVI without B-frames has its frames in the order of its packets.
    decoded = not reader.seekable or packets.untimed > 0 or packets.jumps_back
    places = reader.places()
    shown = list(islice(places, PAIRED_FRAMES)) if reader.paired and not decoded else []
    decoded = decoded or _in_pairs(packets, reader.first, shown)
    ticks_N = np.array([*shown, *places] if decoded else packets.times, np.int64)
    # Of two fields, the second one needs no time.
    lost = 0 if reader.counted or reader.paired else packets.untimed
    if lost > UNSHOWN_SHARE * len(ticks_N):
        raise VideoError(f"{lost} frames have no time in the file; have a program write it with new times")
    if not decoded:
        # Frames before the first decodable one, as in a recording that starts in mid-stream, do not count.
        ticks_N = np.sort(ticks_N[ticks_N >= reader.first]) - reader.first
    return ticks_N, decoded


def _in_pairs(packets: _Packets, first: int, shown: list[int]) -> bool:
    """Return whether packets have a field each, and two a frame, in what is shown at first."""
    if not shown:
        return False
    timed = sum(first <= time <= first + shown[-1] for time in packets.times)
    return timed > (1 + PAIRED_SHARE) * len(shown)


def _read(container: av.container.InputContainer, stream: Any, look: Look) -> _Packets:
    """Read all packets of a file.

    Raises:
        VideoError: the video stream has none, the container is damaged, or the shape of the pictures changes.
    """
    found, shapes = _Packets(), _Shapes()
    ticks = [float(each.time_base or 0) for each in container.streams]
    by_dts = container.format.name == "avi"
    last_dts = last_place = -(1 << 62)
    try:
        for packet in packets_of(container):
            index, pts, dts = packet.stream_index, packet.pts, packet.dts
            time = dts if pts is None or by_dts else pts
            end_s = ((time or 0) + (packet.duration or 0)) * (ticks[index] if index < len(ticks) else 0.0)
            found.all_end_s = max(found.all_end_s, end_s)
            if found.end_byte:
                found.hole_bytes = max(found.hole_bytes, (packet.pos or 0) - found.end_byte)
            found.end_byte = max(found.end_byte, (packet.pos or 0) + packet.size)
            if index != stream.index:
                continue
            seen = look(bytes(packet))
            found.jumps_back |= dts is not None and dts < last_dts
            found.plain &= seen.whole and seen.shown and not packet.is_discard and (packet.pos or 0) > last_place
            last_dts, last_place = last_dts if dts is None else dts, packet.pos or 0
            if packet.is_discard or not seen.shown:
                continue
            found.end_s = max(found.end_s, end_s)
            if time is None:
                found.untimed += 1
                continue
            _place(found, time, packet.is_keyframe)
            if packet.is_keyframe:
                found.plain &= shapes.stay(seen, end_s)
                found.plain &= bool(seen.entry) and not packet.has_sidedata("new_extradata")
    except av_error() as error:
        raise VideoError(f"the file is damaged after {found.all_end_s:.2f} s{short_reason(error)}") from None
    if not found.times and not found.untimed:
        raise VideoError("no frames in the video stream")
    return found


def _place(found: _Packets, time: int, key: bool) -> None:
    """Take note of the time of a frame that is shown."""
    if key:
        found.keys.append(time)
    elif found.keys and time < found.keys[-1]:
        found.open_groups = True
    found.reordered |= bool(found.times) and time < found.times[-1]
    found.times.append(time)


class _Shapes:
    """The sizes and other settings that key frames state."""

    def __init__(self) -> None:
        self._first: tuple[int, int] | None = None
        self._settings: bytes | None = None

    def stay(self, seen: Seen, end_s: float) -> bool:
        """Return whether they are those of the first key frame; raise `VideoError` if the aspect ratio is not."""
        self._settings = self._settings or seen.settings
        if seen.size is None or 0 in seen.size:
            return seen.settings is None or seen.settings == self._settings
        size = seen.size
        self._first = first = self._first or size
        if abs(size[0] * first[1] / (size[1] * first[0]) - 1) > ASPECT_CHANGE:
            raise VideoError(
                f"the shape of the picture changes, from {first[0]} x {first[1]} to {size[0]} x {size[1]} before "
                f"{end_s:.2f} s"
            )
        return size == first


def _check_length(container: av.container.InputContainer, stream: Any, packets: _Packets, fragmented: bool) -> None:
    """Raise `VideoError` if the file ends well before the length that its header states."""
    if container.format.name == "avi" and stream.average_rate:
        # If the end of the file is missing, FFmpeg estimates a duration from its size.
        stated_s, found_s = float(stream.frames / stream.average_rate), packets.end_s
    elif container.format.name.startswith("mov") and stream.duration:
        start_s = 0.0 if fragmented else float((stream.start_time or 0) * stream.time_base)
        stated_s, found_s = float(stream.duration * stream.time_base), packets.end_s - start_s
    else:
        # Other containers state the length of the longest stream; sound may continue after the last frame.
        start_s = min(0.0, (container.start_time or 0) / 1e6)
        stated_s, found_s = (container.duration or 0) / 1e6, packets.all_end_s - start_s
    unread = container.size - packets.end_byte if container.format.name == "flv" else 0
    if unread > UNREAD_SHARE * container.size:
        raise VideoError(f"{unread} bytes at its end cannot be read, as in files that were joined byte by byte")
    if container.format.name == "flv" and packets.hole_bytes > HOLE_BYTES:
        raise VideoError(f"the file is damaged ({packets.hole_bytes} bytes in its middle cannot be read)")
    if stated_s - found_s > max(MISSING_S, MISSING_SHARE * stated_s):
        raise VideoError(f"truncated: {found_s:.1f} of the {stated_s:.1f} s that the file states are there")


def _check_asf(source: Source, stream: int) -> None:
    """Raise `VideoError` if a wmv file lacks data in its middle or at its end, which FFmpeg passes over."""
    if lost := lost_objects(source, stream):
        raise VideoError(f"the file is damaged ({lost} frames in its middle are lost or incomplete)")
    if (missing := missing_share(source)) > MISSING_SHARE:
        raise VideoError(f"truncated: {1 - missing:.0%} of the data that the file states are there")


def _check_clock(starts_N: FloatArray, container: str, stated_s: float) -> None:
    """Raise `VideoError` if the clock of a file jumps, as where two recordings were joined byte by byte."""
    gaps_N = np.diff(starts_N)
    follow_N = np.arange(len(gaps_N), 0, -1) > REORDERED_FRAMES
    beyond_N = (gaps_N > JUMP_S) & (starts_N[1:] > stated_s) & (stated_s > 0) & follow_N
    jumps = np.flatnonzero((gaps_N < 0) | (gaps_N > LARGEST_GAP_S.get(container, np.inf)) | beyond_N)
    if len(jumps):
        before, after = starts_N[jumps[0]], starts_N[jumps[0] + 1]
        raise VideoError(
            f"the times jump from {before:.2f} to {after:.2f} s, as in files that were joined byte by byte, or whose "
            "recorder paused; have a program write it with new times"
        )
    unshown = int((gaps_N == 0).sum())
    if unshown > UNSHOWN_SHARE * len(starts_N):
        raise VideoError(f"{unshown} of {len(starts_N)} frames have the time of the next one and would never be shown")
