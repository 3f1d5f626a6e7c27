"""Which pictures of a wmv file (ASF) are not there whole: FFmpeg passes over lost ones, and the one before stays.

A file's data is packets of one size; each holds payloads, which are parts of *media objects*, such as a frame. The
objects of a stream are numbered, and each states its size (ASF specification 1.20.03, sections 3.2 and 5.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, NamedTuple

from s5.video.containers.outline import ASF_DATA, ASF_DATA_HEADER_BYTES, ASF_HEADER, asf_object, opened_file, parts_of
from s5.video.reader import Source

FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
FLAGS_PLACE, PACKET_SIZE_PLACE, HEADER_OBJECT_BYTES, OBJECT_HEADER_BYTES = 88, 92, 30, 24
NUMBERS = 256
"""Objects are numbered from 0 to 255, then from 0 again, where numbers have a byte, as in all files that are known."""
REPLICATED_BYTES = 8
"""Least length of the data that states an object's size; payloads that hold several small objects have a byte."""
BROADCAST = 1
"""Flag of a recording whose header states no sizes."""


class Payload(NamedTuple):
    """A part of an object."""

    stream: int
    number: int
    offset: int
    """Where it begins in the object."""
    size: int
    """Bytes of this part."""
    object_size: int
    """Bytes of the whole object."""


def missing_share(source: Source) -> float:
    """Return the share of a wmv file's data that its header states and that is not there; 0 where it states nothing."""
    about = _Properties(0, False)
    with opened_file(source) as file:
        for guid, start, end in parts_of(file, asf_object):
            if guid == ASF_HEADER:
                about = _properties(file, start, end)
            elif guid == ASF_DATA and about.states_sizes:
                file.seek(start)
                _, size = asf_object(file.read(OBJECT_HEADER_BYTES))
                return 1 - (end - start) / size if size else 0.0
    return 0.0


def lost_objects(source: Source, stream: int) -> int:
    """Return how many objects of a stream are lost or incomplete between its first and its last one.

    Args:
        source: a wmv file.
        stream: number of the stream, as FFmpeg gives it (`id`).
    """
    lost, number, missing = 0, -1, 0
    with opened_file(source) as file:
        for payload in _payloads(file):
            # A recording may begin within an object.
            if payload.stream != stream or (number < 0 and payload.offset):
                continue
            if payload.number != number:
                step = (payload.number - number) % NUMBERS if number >= 0 else 1
                lost += (step - 1) + (missing > 0)
                number, missing = payload.number, payload.object_size
            missing -= payload.size
    return lost


def _payloads(file: IO[bytes]) -> Iterator[Payload]:
    """Yield the payloads of a file in order; packets that cannot be read have none, nor do files of another kind."""
    size = 0
    for guid, start, end in parts_of(file, asf_object):
        if guid == ASF_HEADER:
            size = _properties(file, start, end).packet_size
        elif guid == ASF_DATA and size:
            file.seek(start + ASF_DATA_HEADER_BYTES)
            for _ in range((end - start - ASF_DATA_HEADER_BYTES) // size):
                try:
                    found = list(_Packet(file.read(size)).payloads())
                except IndexError:
                    continue
                if any(payload.object_size < 0 for payload in found):
                    return
                yield from found


class _Properties(NamedTuple):
    """What the header of a file says."""

    packet_size: int
    """Bytes of all packets; 0 where it does not say it."""
    states_sizes: bool
    """Whether the sizes that it states are right."""


def _properties(file: IO[bytes], start: int, end: int) -> _Properties:
    place = start + HEADER_OBJECT_BYTES
    while place + OBJECT_HEADER_BYTES <= end:
        file.seek(place)
        data = file.read(PACKET_SIZE_PLACE + 8)
        guid, size = asf_object(data)
        if guid == FILE_PROPERTIES and len(data) == PACKET_SIZE_PLACE + 8:
            least, most = data[PACKET_SIZE_PLACE : PACKET_SIZE_PLACE + 4], data[PACKET_SIZE_PLACE + 4 :]
            states_sizes = not data[FLAGS_PLACE] & BROADCAST
            return _Properties(int.from_bytes(least, "little") if least == most else 0, states_sizes)
        if size < OBJECT_HEADER_BYTES:
            break
        place += size
    return _Properties(0, False)


class _Packet:
    """Reads a data packet from its start; `IndexError` where it is damaged."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def payloads(self) -> Iterator[Payload]:
        """Yield the payloads."""
        if (first := self._data[0]) & 0x80:
            # Error correction data.
            self._place = 1 + (first & 0x0F)
        lengths, properties = self._number(1), self._number(1)
        if properties >> 6 != 1:
            raise IndexError("stream numbers have one byte in all files")
        self._coded(lengths >> 5)
        self._coded(lengths >> 1)
        padding = self._coded(lengths >> 3)
        self._skip(6)
        end = len(self._data) - padding
        if not lengths & 1:
            yield self._payload(properties, None, end)
            return
        flags = self._number(1)
        for _ in range(flags & 0x3F):
            yield self._payload(properties, flags >> 6, end)

    def _payload(self, properties: int, length_kind: int | None, end: int) -> Payload:
        stream = self._number(1) & 0x7F
        number = self._coded(properties >> 4)
        offset = self._coded(properties >> 2)
        replicated = self._coded(properties)
        object_size = int.from_bytes(self._data[self._place : self._place + 4], "little")
        self._skip(replicated)
        size = end - self._place if length_kind is None else self._coded(length_kind)
        self._skip(size)
        return Payload(stream, number % NUMBERS, offset, size, -1 if replicated < REPLICATED_BYTES else object_size)

    def _coded(self, kind: int) -> int:
        """Return a number of 0, 1, 2 or 4 bytes."""
        return self._number((0, 1, 2, 4)[kind & 3])

    def _number(self, size: int) -> int:
        place = self._place
        self._skip(size)
        return int.from_bytes(self._data[place : self._place], "little")

    def _skip(self, size: int) -> None:
        self._place += size
        if size < 0 or self._place > len(self._data):
            raise IndexError("beyond the end of the packet")
