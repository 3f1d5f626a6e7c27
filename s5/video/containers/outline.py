"""The outline of mp4, mov and wmv files: are they fragmented, and were several joined byte by byte? FFmpeg plays the
first of these alone, and says nothing.

An mp4 file without fragments says of each packet when it is shown and where it is: they need not be read (`Hollow`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

from s5.video.reader import Source

HEADER_BYTES = 24
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
ASF_DATA_HEADER_BYTES = 50


class Outline(NamedTuple):
    """What the top level of a file shows."""

    parts: int = 1
    """Videos that it holds one after the other; 1 for containers that are not looked into."""
    fragmented: bool = False
    """It is an mp4 file of fragments, whose stated length counts from time 0."""
    packets: tuple[tuple[int, int], ...] = ()
    """Where packets lie that need not be read to know of them: first byte and the one after the last, of each range."""


def outline(source: Source, container: str) -> Outline:
    """Return the outline of a file, by FFmpeg's name of its format."""
    if container != "asf" and not container.startswith("mov"):
        return Outline()
    with opened_file(source) as file:
        found = list(parts_of(file, asf_object if container == "asf" else _iso))
    kinds = Counter(kind for kind, _, _ in found)
    if container == "asf":
        return Outline(max(1, kinds[ASF_HEADER]))
    # A header that is repeated, for fragments or in another place, brings no pictures of its own.
    fragmented = kinds[b"moof"] > 0
    packets = () if fragmented else tuple((start, end) for kind, start, end in found if kind == b"mdat")
    return Outline(1 if fragmented else max(1, min(kinds[b"moov"], kinds[b"mdat"])), fragmented, packets)


def has_index(file: IO[bytes]) -> bool:
    """Return whether an open file is an mp4 or mov file without fragments, of which little need be read to probe it."""
    with opened_file(file):
        kinds = {kind for kind, _, _ in parts_of(file, _iso)}
    return {b"moov", b"mdat"} <= kinds and b"moof" not in kinds


class Hollow:
    """An open file that yields zeros in place of packets, without reading them, once `packets` says where they are."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.packets: tuple[tuple[int, int], ...] = ()

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes."""
        place = self._file.tell()
        for start, end in self.packets:
            if start <= place < end:
                size = min(size, end - place)
                self._file.seek(place + size)
                return bytes(size)
            if place < start:
                size = min(size, start - place)
        return self._file.read(size)


@contextmanager
def opened_file(source: Source) -> Iterator[IO[bytes]]:
    """Open a path; leave an open file, which FFmpeg is reading, where it stands."""
    if isinstance(source, str):
        with open(source, "rb") as file:
            yield file
        return
    place = source.tell()
    yield source
    source.seek(place)


def parts_of(file: IO[bytes], read: Callable[[bytes], tuple[bytes, int]]) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, begin and end of each top-level box or object, up to one that has no length of its own."""
    end, place = file.seek(0, os.SEEK_END), 0
    while place < end:
        file.seek(place)
        kind, size = read(file.read(HEADER_BYTES))
        yield kind, place, min(place + size, end) if size >= 8 else end
        if size < 8:
            return
        place += size


def _iso(header: bytes) -> tuple[bytes, int]:
    """Kind and size of a box (ISO 14496-12, 4.2)."""
    size = int.from_bytes(header[:4], "big")
    return header[4:8], int.from_bytes(header[8:16], "big") if size == 1 else size


def asf_object(header: bytes) -> tuple[bytes, int]:
    """GUID and size of an object (ASF specification, 2.1); a live recording does not state the size of its data."""
    guid, size = header[:16], int.from_bytes(header[16:24], "little")
    return guid, 0 if guid == ASF_DATA and size <= ASF_DATA_HEADER_BYTES else size
