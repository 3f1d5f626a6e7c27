"""Files that were joined byte by byte, in containers of which FFmpeg plays the first part alone: mp4, mov and wmv."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from s5.video.reader import Source

HEADER_BYTES = 24
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")


def count_parts(source: Source, container: str) -> int:
    """Return how many videos a file holds, by FFmpeg's name of its format; 1 for those that are not looked into."""
    kind, read = (ASF_HEADER, _asf) if container == "asf" else (b"moov", _iso)
    if container != "asf" and not container.startswith("mov"):
        return 1
    with _file(source) as file:
        return sum(each == kind for each in _kinds(file, read))


@contextmanager
def _file(source: Source) -> Iterator[IO[bytes]]:
    """Open a path; leave an open file, which FFmpeg is reading, where it stands."""
    if isinstance(source, str):
        with open(source, "rb") as file:
            yield file
        return
    place = source.tell()
    yield source
    source.seek(place)


def _kinds(file: IO[bytes], read: Callable[[bytes], tuple[bytes, int]]) -> Iterator[bytes]:
    """Yield the kind of each top-level box or object, up to one that has no length of its own."""
    place = 0
    while True:
        file.seek(place)
        header = file.read(HEADER_BYTES)
        kind, size = read(header)
        if len(header) < HEADER_BYTES:
            return
        yield kind
        if size < 8:
            return
        place += size


def _iso(header: bytes) -> tuple[bytes, int]:
    """Kind and size of a box (ISO 14496-12, 4.2)."""
    size = int.from_bytes(header[:4], "big")
    return header[4:8], int.from_bytes(header[8:16], "big") if size == 1 else size


def _asf(header: bytes) -> tuple[bytes, int]:
    """GUID and size of an object (Advanced Systems Format specification, 2.1)."""
    return header[:16], int.from_bytes(header[16:24], "little")
