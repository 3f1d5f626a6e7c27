"""Progress of a long stage: a bar on a terminal, and lines now and then in a log file or a job."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_S = 10.0
"""Seconds between two lines, where there is no bar."""


def info(name: str, message: str) -> None:
    """Print a line of a stage, above the bar if there is one."""
    with tqdm.external_write_mode():
        print(f"[{name}] {message}", flush=True)


def on_terminal() -> bool:
    """Return whether stderr, where bars are drawn, is a terminal that says how wide it is."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


class ProgressBar:
    """How far a phase of a stage is: what is done, its rate, details such as the loss, and the remaining time.

    On a terminal it is a bar on stderr, removed at the end. Elsewhere `advance` prints a line every `LINE_S` seconds;
    `move_to` prints none, since its caller has lines of its own. `advance` prints the last line in both cases.

    Args:
        name: the stage.
        label: what is done to the items, such as `probed`.
        total: items in all.
        unit: what they are, in the plural.
    """

    def __init__(self, name: str, label: str, total: int, unit: str) -> None:
        self._name, self._label, self._total, self._unit = name, label, total, unit
        self._done = 0
        self._bar: tqdm[None] | None = None
        self._started = self._printed = time.monotonic()
        if on_terminal():
            # Unless told its least number of steps, tqdm guesses one, and may not show the latest state.
            self._bar = tqdm(
                total=total, desc=f"[{name}] {label}", unit=f" {unit}", leave=False, dynamic_ncols=True, miniters=1
            )

    @property
    def visible(self) -> bool:
        """Whether there is a bar; TQDM_DISABLE=1 in the environment turns it off."""
        return self._bar is not None and not self._bar.disable

    def advance(self, details: str = "") -> None:
        """Count one more item; `details` says what else there is to see, such as the number of rejects."""
        self._show(self._done + 1, details)
        now = time.monotonic()
        if self._done == self._total or (not self.visible and now - self._printed > LINE_S):
            self._printed = now
            rate = self._done / (now - self._started)
            speed = f"{rate:.1f} a second" if rate >= 1 else f"{60 * rate:.1f} a minute"
            also = f", {details}" if details else ""
            info(self._name, f"{self._label} {self._done} of {self._total} {self._unit}, {speed}{also}")

    def move_to(self, done: int, details: str = "") -> None:
        """Set the number of items done; less than before where workers resume from a checkpoint.

        What the first call finds done does not count towards the rate.
        """
        if self._bar is not None and self._done == 0:
            self._bar.reset()
            self._bar.initial = self._bar.n = self._bar.last_print_n = self._done = done
            self._bar.set_postfix_str(details)
        self._show(done, details)

    def _show(self, done: int, details: str) -> None:
        step, self._done = done - self._done, done
        if self._bar is not None:
            self._bar.set_postfix_str(details, refresh=False)
            self._bar.update(step)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
