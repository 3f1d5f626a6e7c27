"""Does the process that reads a video make progress? A decoder that hangs reads nothing more; a slow one reads on.

The system counts what a process reads and writes on disks. It does not count what is read from memory or a store, so
each such read writes a byte to where it is lost.
"""

from __future__ import annotations

import io
import os
import time
from multiprocessing.connection import Connection
from typing import IO

LOOK_S = 0.25
"""Seconds between two looks at a process."""
PIECE_BYTES = 1 << 15
"""Bytes of a read from memory, as FFmpeg reads from disks: larger pieces may take seconds to decode."""


def progress_of(pid: int) -> int | None:
    """Return a number that grows while a process reads; None where the system does not say."""
    try:
        with open(f"/proc/{pid}/io") as file:
            counts = dict(line.split(": ") for line in file)
        return int(counts["rchar"]) + int(counts["wchar"])
    except (OSError, KeyError, ValueError):
        return None


def stalled_at(connection: Connection, pid: int, deadline: float, stalled_s: float) -> int | None:
    """Wait for a message of a process, and return its progress once that has not grown for `stalled_s` seconds.

    Returns None at the message, at the deadline (of `time.monotonic`), and where the system does not tell progress.
    """
    place, since = progress_of(pid), time.monotonic()
    while (left_s := deadline - time.monotonic()) > 0 and not connection.poll(min(LOOK_S, left_s)):
        if (now_at := progress_of(pid)) != place:
            place, since = now_at, time.monotonic()
        elif place is not None and time.monotonic() - since > stalled_s:
            return place
    return None


class Counted:
    """An open file whose reads count as progress of this process, with all that FFmpeg and `outline` ask of one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._most = PIECE_BYTES if isinstance(file, io.BytesIO) else None
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes."""
        with open(os.devnull, "wb", buffering=0) as lost:
            lost.write(b"\0")
        return self._file.read(min(size, self._most or size))
