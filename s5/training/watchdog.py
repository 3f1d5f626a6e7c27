"""Detect that this process hangs, report where with the stacks of its threads, and end it, so that it can be replaced.

Two threads watch, since a hang may hold Python's lock (GIL):

    the watchdog's   no beat for `timeout_s`: calls `on_hang` with the stacks, ends the process
    faulthandler's   the watchdog's thread itself did not run for `timeout_s`: writes stacks to a file, ends the process
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

EXIT_STATUS = 70
"""Exit status with which the watchdog's thread ends a process that hangs; faulthandler's is 1."""
TICK_S = 0.5
WAITING_FILES = (os.path.join("torch", "distributed", ""), os.path.join("torch", "autograd", "graph.py"))
"""Parts of the names of files whose functions wait for other processes: collectives, and DDP's in a backward pass."""


@dataclass(frozen=True)
class Hang:
    """A process without a beat for too long."""

    phase: str
    """The phase that its last beat named."""
    seconds: float
    """Time since that beat."""
    stacks: str
    """The stacks of all of its threads."""
    waits: bool
    """Whether the watched thread may have been in a collective, waiting for another process. On a GPU the device waits,
    which is not seen here."""


class Watchdog:
    """Watches the beats of one thread of this process from another one.

    Args:
        timeout_s: seconds without a beat after which the process is ended; 0 for never.
        on_hang: called with the hang before the process is ended.
        on_tick: called with the phase of the last beat, twice a second; it must take less than `timeout_s`.
        key: names the run in the file for the stacks of a process that cannot run Python any more (`leftover_stacks`).
        grace_s: seconds after which the process is ended although `on_hang` has not returned.
    """

    def __init__(
        self,
        timeout_s: float,
        on_hang: Callable[[Hang], None],
        on_tick: Callable[[str], None],
        key: str,
        grace_s: float = 30.0,
    ) -> None:
        self._timeout_s, self._grace_s = timeout_s, grace_s
        self._on_hang, self._on_tick = on_hang, on_tick
        self._path = _folder() / f"{_prefix(key)}{os.getpid()}.txt"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watched = threading.get_ident()
        self._beat = ("starting", time.monotonic())

    def start(self) -> None:
        """Watch the calling thread."""
        self._watched = threading.get_ident()
        self.beat("starting")
        self._thread.start()

    def beat(self, phase: str) -> None:
        """Record that the watched thread is alive, and which phase it enters."""
        self._beat = (phase, time.monotonic())

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _watch(self) -> None:
        with self._path.open("w") as file:
            try:
                self._watch_until_stopped(file)
            finally:
                faulthandler.cancel_dump_traceback_later()

    def _watch_until_stopped(self, file: IO[str]) -> None:
        while not self._stopped.wait(TICK_S):
            if self._timeout_s:
                # Counts down in C; it expires only where this thread cannot run to reset it.
                faulthandler.dump_traceback_later(self._timeout_s + TICK_S, exit=True, file=file)
            phase, since = self._beat
            seconds = time.monotonic() - since
            if self._timeout_s and seconds > self._timeout_s:
                self._end(phase, seconds)
            self._on_tick(phase)

    def _end(self, phase: str, seconds: float) -> None:
        # The report may hang too.
        faulthandler.dump_traceback_later(self._grace_s, exit=True, file=sys.__stderr__ or 2)
        try:
            self._on_hang(Hang(phase, seconds, thread_stacks(self._watched), self._waits()))
        finally:
            os._exit(EXIT_STATUS)

    def _waits(self) -> bool:
        frame = sys._current_frames().get(self._watched)
        return frame is not None and any(part in frame.f_code.co_filename for part in WAITING_FILES)


def thread_stacks(first: int) -> str:
    """Return the stacks of all threads of this process except the calling one; that of the thread `first` leads."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != first)
    parts = [
        f"Thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in frames
        if ident != threading.get_ident()
    ]
    return "\n".join(parts)


def leftover_stacks(key: str) -> list[str]:
    """Return, and delete, the stacks that ended processes of a run left on this machine."""
    found = []
    for path in sorted(_folder().glob(f"{_prefix(key)}*.txt")):
        if _is_alive(int(path.stem.removeprefix(_prefix(key)))):
            continue
        try:
            if text := path.read_text():
                found.append(text)
            path.unlink()
        except FileNotFoundError:
            continue  # Another process of this machine took the file.
    return found


def _folder() -> Path:
    return Path(tempfile.gettempdir())


def _prefix(key: str) -> str:
    return f"s5_stacks_{key}_"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
