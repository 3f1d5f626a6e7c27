"""Notice that this process hangs, tell with the stacks of its threads where, and end it, so that others can go on.

Two lines of defence, since a hang may hold Python's lock (GIL):

    a thread            no beat for `timeout_s`: takes the stacks, hands them on, ends the process
    faulthandler's own  that thread itself did not run for `timeout_s`: stacks into a file, ends the process
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
"""With which the thread ends a process that hangs; faulthandler's status is 1."""
TICK_S = 0.5
WAITING = (os.path.join("torch", "distributed", ""), os.path.join("torch", "autograd", "graph.py"))
"""Parts of the names of files whose functions wait for other processes: collectives, and DDP's in a backward pass."""


@dataclass(frozen=True)
class Hang:
    """A process that gave no beat for too long."""

    phase: str
    """Its last beat."""
    seconds: float
    """Time since then."""
    stacks: str
    """What all of its threads were doing."""
    waits: bool
    """Whether the thread that gave the beats may have been in a collective, waiting for another process. On a GPU the
    device waits, which is not seen here."""


class Watchdog:
    """Watches the beats of one thread of this process from another one.

    Args:
        timeout_s: seconds without a beat after which the process is ended; 0 for never.
        on_hang: told of the hang before that; it may take `patience_s` seconds.
        on_tick: called with the last beat twice a second while the thread runs; it must not take `timeout_s`.
        key: names the run in the file for the stacks of a process whose Python does not run any more (`leftovers`).
        patience_s: time after which the process is ended though `on_hang` has not come back.
    """

    def __init__(
        self,
        timeout_s: float,
        on_hang: Callable[[Hang], None],
        on_tick: Callable[[str], None],
        key: str,
        patience_s: float = 30.0,
    ) -> None:
        self._timeout_s, self._patience_s = timeout_s, patience_s
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
        """Take note that the watched thread is alive, and what it does next."""
        self._beat = (phase, time.monotonic())

    def stop(self) -> None:
        """Watch no longer."""
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
                # Counts down in C: reached only where this thread is kept from setting it anew.
                faulthandler.dump_traceback_later(self._timeout_s + TICK_S, exit=True, file=file)
            phase, since = self._beat
            silent = time.monotonic() - since
            if self._timeout_s and silent > self._timeout_s:
                self._end(phase, silent)
            self._on_tick(phase)

    def _end(self, phase: str, silent: float) -> None:
        # What is told may not arrive either.
        faulthandler.dump_traceback_later(self._patience_s, exit=True, file=sys.__stderr__ or 2)
        try:
            self._on_hang(Hang(phase, silent, stacks(self._watched), self._waits()))
        finally:
            os._exit(EXIT_STATUS)

    def _waits(self) -> bool:
        frame = sys._current_frames().get(self._watched)
        return frame is not None and any(part in frame.f_code.co_filename for part in WAITING)


def stacks(first: int) -> str:
    """Return what all threads of this process but the calling one are doing, a certain one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != first)
    parts = [
        f"Thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in frames
        if ident != threading.get_ident()
    ]
    return "\n".join(parts)


def leftovers(key: str) -> list[str]:
    """Return, once, the stacks that ended processes of a run have left on this machine."""
    found = []
    for path in sorted(_folder().glob(f"{_prefix(key)}*.txt")):
        if _runs(int(path.stem.removeprefix(_prefix(key)))):
            continue
        try:
            if text := path.read_text():
                found.append(text)
            path.unlink()
        except FileNotFoundError:
            continue  # Another process of this machine took it.
    return found


def _folder() -> Path:
    return Path(tempfile.gettempdir())


def _prefix(key: str) -> str:
    return f"s5_stacks_{key}_"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
