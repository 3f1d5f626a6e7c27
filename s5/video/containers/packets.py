"""What the first bytes of a packet say about its frame, which containers and decoders do not: is it ever shown, does a
decoder that starts there need nothing earlier, and has it a hole, as unfinished downloads have.

Sources: RFC 6386 section 9.1 (VP8), the VP9 bitstream specification 0.6 section 6.2 and annex B, ISO 14496-2 (MPEG-4),
ISO 14496-10 section 7.3.1 (H.264), ISO 14496-15 section 5.3.3 (H.264 in mp4 and Matroska).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

HOLE, FILL = bytes(32), b"\xff" * 16
"""Codecs with start codes or arithmetic coding never write such a run of zeros, or end a packet like this."""
NOT_CODED_BYTES = 8
"""Packets of MPEG-4 up to this size say that the picture before stays."""

UNREAD = ("h264", "hevc", "av1", "vp9", "mjpeg", "prores")
"""Codecs of which every packet in an mp4 file comes on screen."""


class Seen(NamedTuple):
    """What the bytes of a packet say."""

    shown: bool = True
    """A frame of this packet comes on screen."""
    whole: bool = True
    """The packet has the form that its codec prescribes, and no hole."""
    entry: bool | None = False
    """Decoding can start here; None where the bytes do not say."""
    size: tuple[int, int] | None = None
    """Width and height in pixels of a picture from which decoding can start, where the bytes state them."""
    settings: bytes | None = None
    """Sequence parameters, size included, that come with the picture."""


Look = Callable[[bytes], Seen]
DAMAGED = Seen(whole=False)


def look_for(codec: str, extradata: bytes | None) -> Look:
    """Return what looks at the packets of a stream, by FFmpeg's name of its codec and the codec's extra data."""
    if codec == "h264":
        # avcC: the lengths of NAL units have 1 to 4 bytes.
        return partial(_h264, (extradata[4] & 3) + 1) if extradata and extradata[0] == 1 else _unknown
    return LOOKS.get(codec, _unknown_with_zeros)


def unread(codec: str) -> Look | None:
    """Return what looks at packets whose size alone is known; None for codecs of which an mp4 file says too little."""
    if codec == "mpeg4":
        return lambda data: Seen(len(data) > NOT_CODED_BYTES, True, None)
    return _unknown_with_zeros if codec in UNREAD else None


def _has_hole(data: bytes) -> bool:
    return HOLE in data or data.endswith(FILL)


def _vp8(data: bytes) -> Seen:
    shown, entry = bool(data[0] & 0x10), not data[0] & 1
    if _has_hole(data) or (entry and data[3:6] != b"\x9d\x01\x2a"):
        return DAMAGED
    if not entry:
        return Seen(shown)
    width, height = (int.from_bytes(data[place : place + 2], "little") & 0x3FFF for place in (6, 8))
    return Seen(shown, True, True, (width, height))


def _vp9(data: bytes) -> Seen:
    seen = [_vp9_frame(frame) for frame in _vp9_frames(data)]
    whole = all(frame.whole for frame in seen) and not _has_hole(data)
    return Seen(any(frame.shown for frame in seen), whole, seen[0].entry, seen[0].size) if seen else DAMAGED


def _vp9_frames(data: bytes) -> list[bytes]:
    """Return the frames of a superframe, of which all but the last are hidden."""
    last = data[-1]
    length, count = (last >> 3 & 3) + 1, (last & 7) + 1
    index = 2 + length * count
    if last & 0xE0 != 0xC0 or len(data) < index or data[-index] != last:
        return [data]
    frames, start = [], 0
    for number in range(count):
        place = len(data) - index + 1 + length * number
        size = int.from_bytes(data[place : place + length], "little")
        frames.append(data[start : start + size])
        start += size
    return [frame for frame in frames if frame]


def _vp9_frame(data: bytes) -> Seen:
    bits = int.from_bytes(data[:12].ljust(12, b"\0"), "big")

    def read(place: int, count: int = 1) -> int:
        return bits >> (96 - place - count) & (1 << count) - 1

    if read(0, 2) != 2:
        return DAMAGED
    place = 5 if read(2, 2) == 3 else 4
    if read(place):
        return Seen()
    key, shown = not read(place + 1), bool(read(place + 2))
    if not key:
        return Seen(shown)
    place += 4
    if read(place, 24) != 0x498342:
        return DAMAGED
    # Only profile 0 states the size right after 3 bits of the colour space and one of the range.
    size = read(place + 28, 16) + 1, read(place + 44, 16) + 1
    return Seen(shown, True, True, size if read(2, 2) == 0 and read(place + 24, 3) != 7 else None)


def _mpeg4(data: bytes) -> Seen:
    place = data.find(b"\0\0\1\xb6")
    if len(data) <= NOT_CODED_BYTES:
        return Seen(shown=False)
    if place < 0 or place + 4 >= len(data) or _has_hole(data):
        return DAMAGED
    return Seen(entry=data[place + 4] >> 6 == 0)


def _msmpeg4(data: bytes) -> Seen:
    return Seen(entry=data[0] >> 6 == 0) if data[0] >> 6 < 2 and not _has_hole(data) else DAMAGED


def _h264(length: int, data: bytes) -> Seen:
    place, kinds, settings, end = 0, set[int](), None, len(data)
    while place + length < end:
        begin, place = place + length, place + length + int.from_bytes(data[place : place + length], "big")
        kind = data[begin] & 31
        kinds.add(kind)
        if kind == 7:
            settings = data[begin:place]
    if place != end or _has_hole(data):
        return DAMAGED
    # 1 to 4: slices; 5: slices of a picture that nothing after it looks past.
    return Seen(not kinds.isdisjoint((1, 2, 5)), True, 5 in kinds, None, settings)


def _jpeg(data: bytes) -> Seen:
    # Zeros may pad a picture after its end.
    cut = data.endswith(FILL) or (data.endswith(HOLE) and not data.rstrip(b"\0").endswith(b"\xff\xd9"))
    return DAMAGED if cut or not data.startswith(b"\xff\xd8") else Seen(entry=True)


def _prores(data: bytes) -> Seen:
    return Seen(entry=True) if data[4:8] == b"icpf" else DAMAGED


def _unknown(data: bytes) -> Seen:
    return Seen(True, not _has_hole(data), None)


def _unknown_with_zeros(data: bytes) -> Seen:
    return Seen(True, True, None)


LOOKS: dict[str, Look] = {
    "vp8": _vp8,
    "vp9": _vp9,
    "mpeg4": _mpeg4,
    "msmpeg4v3": _msmpeg4,
    "mjpeg": _jpeg,
    "prores": _prores,
    "hevc": _unknown,
    "av1": _unknown,
}
