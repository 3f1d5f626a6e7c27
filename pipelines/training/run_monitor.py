"""What the workers of a run, Ray Train's controller and the driver tell each other.

It has a file of its own, without torch, since an actor's process imports all of its class's file.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Literal

from s5.errors import Failure
from s5.training.watchdog import Hang

PHASES = ("waiting for the first batch", "waiting for data", "training", "evaluating", "saving")
SILENT_S = 10.0
"""Seconds after which a worker that was heard of twice a second has gone silent."""


@dataclass(frozen=True)
class Loss:
    """Why Ray Train has lost a worker."""

    kind: Literal["ended", "node", "silent", "raised"]
    """Its process ended, its node was lost or cannot be reached, it does not answer, or it raised an error."""
    reason: str
    """Ray's reason or the error, in a line."""


@dataclass
class Worker:
    """A training worker as it was last heard of."""

    place: str
    """Node and process."""
    phase: str = "starting"
    heard: float = field(default_factory=time.monotonic)
    hang: Hang | None = None
    told: str = ""
    """Why it was told to end, if it was."""


@dataclass(frozen=True)
class Mail:
    """What the driver has not yet seen."""

    rows: list[tuple[int, dict[str, float]]]
    rejects: list[Failure]
    lines: list[str]
    """What has happened to the workers and to their checkpoints."""
    stacks: list[str]
    """What threads of hanging workers were doing."""


class Mailbox:
    """Actor between workers, controller and driver: rows of metrics and news one way, the wish to stop the other.

    The driver alone talks to MLflow, so that no worker needs to reach the tracking database.

    Args:
        max_failures: how often workers may fail or hang; those told to end and those lost with a node do not count.
        silent_s: seconds after which a worker that is not heard of has gone silent.
    """

    def __init__(self, max_failures: int, silent_s: float = SILENT_S) -> None:
        self._mail = Mail([], [], [], [])
        self._stop = False
        self._failure = ""
        self._left, self._max_failures, self._silent_s = max_failures, max_failures, silent_s
        self._group, self._size, self._lost = "", 0, False
        self._workers: dict[int, Worker] = {}
        self._saved = 0

    # --- to the driver ------------------------------------------------------------------------------------------------

    def put(self, metrics: dict[str, float], step: int) -> None:
        """Take a row."""
        self._mail.rows.append((step, metrics))

    def reject(self, failures: list[Failure]) -> None:
        """Take videos that could not be read."""
        self._mail.rejects.extend(failures)

    def tell(self, message: str) -> None:
        """Take a sentence for the user."""
        self._mail.lines.append(message)

    def add_stacks(self, text: str) -> None:
        """Take the stacks of a process that has ended."""
        self._mail.stacks.append(text)

    def take(self) -> Mail:
        """Hand over what has come since the last call."""
        taken, self._mail = self._mail, Mail([], [], [], [])
        return taken

    # --- to the workers -----------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Ask the workers to save and stop."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Return whether the workers are to stop."""
        return self._stop

    def fail(self, message: str) -> None:
        """Note an error that a restart of the workers would meet again."""
        self._failure = self._failure or message

    def failure(self) -> str:
        """Return the first such error, or nothing."""
        return self._failure

    # --- of the workers -----------------------------------------------------------------------------------------------

    def begin(self, group: str, size: int) -> None:
        """Take note that a group of workers starts; those of an earlier group are no part of the run any more."""
        self._group, self._lost = group, False
        self._size, before = size, self._size
        self._workers = {}
        if before and before != size:
            self._mail.lines.append(f"{_count(size)} instead of {before} from the checkpoint of step {self._saved}")

    def join(self, group: str, rank: int, place: str) -> None:
        """Take note of a worker's place."""
        if group == self._group:
            self._workers[rank] = Worker(place)

    def pulse(self, group: str, rank: int, phase: str) -> tuple[bool, bool]:
        """Hear of a worker; return whether it belongs to the run, and whether it is to stop."""
        if group != self._group:
            return False, True
        if worker := self._workers.get(rank):
            worker.phase, worker.heard = phase, time.monotonic()
        return True, self._stop

    def at(self, step: int) -> None:
        """Take note that a checkpoint of that step exists: it was saved, or the workers started from it."""
        self._saved = step

    def told(self, group: str, rank: int, why: str) -> None:
        """Take note that a worker was told to end."""
        if group == self._group and rank in self._workers:
            self._workers[rank].told = why

    def hang(self, group: str, rank: int, hang: Hang) -> None:
        """Take note that a worker got no further and ends itself."""
        if group == self._group and (worker := self._workers.get(rank)):
            worker.phase, worker.heard, worker.hang = hang.phase, time.monotonic(), hang
            head = f"worker {rank} of {self._size} ({worker.place}) in {hang.phase} for {hang.seconds:.0f} s"
            self.add_stacks(f"{head}\n{hang.stacks}")

    def lost(self, losses: dict[int, Loss]) -> bool:
        """Take note of what Ray Train has lost; return whether the workers are to start again."""
        if self._lost:
            return not self._failure  # Told again, as Ray Train does while a node is drained.
        self._lost = True
        what, counts = self._what(losses)
        self._left -= counts
        if not self._failure and self._left < 0:
            self._failure = (
                f"{what}; scale.max_failures, {self._max_failures}, allows no more: the last checkpoint, of step "
                f"{self._saved}, is kept, and the same command resumes"
            )
        if self._failure:
            return False
        source = f"from the checkpoint of step {self._saved}" if self._saved else "from the beginning"
        number = f" (failure {self._max_failures - self._left} of {self._max_failures})" if counts else ""
        self._mail.lines.append(f"{what}; going on {source}{number}")
        return True

    def _what(self, losses: dict[int, Loss]) -> tuple[str, bool]:
        """Return what happened, in words, and whether it counts as a failure."""
        told = {rank: worker.told for rank, worker in self._workers.items() if worker.told}
        if told:
            return f"{self._names(list(told))} had to end, {next(iter(told.values()))}, and saved first", False
        nodes = [rank for rank, loss in losses.items() if loss.kind == "node"]
        if nodes:
            return f"{self._names(nodes)} lost, with the node or the way to it", False
        if hanging := self._hanging(losses):
            if len(hanging) > 1:
                return f"{self._names(hanging)} got no further (which of them hangs cannot be told)", True
            worker = self._workers[hanging[0]]
            silence = time.monotonic() - worker.heard
            what = "does not answer, last heard of" if not worker.hang and silence > self._silent_s else "hangs"
            return f"{self._names(hanging)} {what} in {worker.phase}; stacks, where there are any, in stacks.txt", True
        for kind, verb in (("ended", "died"), ("silent", "does not answer"), ("raised", "failed")):
            ranks = [rank for rank, loss in losses.items() if loss.kind == kind]
            if ranks:
                worker = self._workers.get(ranks[0], Worker(""))
                return f"{self._names(ranks)} {verb} in {worker.phase} ({losses[ranks[0]].reason})", True
        return "the workers were lost", True

    def _hanging(self, losses: dict[int, Loss]) -> list[int]:
        """Return the workers that hang, without those that waited for them; none where nothing hangs."""
        now = time.monotonic()
        silent = [
            rank
            for rank, worker in self._workers.items()
            if worker.hang is None and now - worker.heard > self._silent_s
        ]
        if silent:
            return silent
        if not any(worker.hang for worker in self._workers.values()):
            return [rank for rank, loss in losses.items() if loss.kind == "silent" and rank in self._workers]
        behind = min(progress(worker.phase) for worker in self._workers.values())
        last = [rank for rank, worker in self._workers.items() if progress(worker.phase) == behind]
        alone = [rank for rank in last if (hang := self._workers[rank].hang) and not hang.waits]
        return alone or last

    def _names(self, ranks: list[int]) -> str:
        known = [f"{rank} ({self._workers[rank].place})" if rank in self._workers else str(rank) for rank in ranks]
        return f"worker{'s' * (len(ranks) > 1)} {', '.join(known)} of {self._size}"


def progress(phase: str) -> tuple[int, int]:
    """Return step and part of the step of what a worker was doing, such as "step 7: training"; (0, -1) at the start."""
    found = re.fullmatch(r"step (\d+): (.*)", phase)
    if found is None:
        return 0, -1
    return int(found[1]), PHASES.index(found[2]) if found[2] in PHASES else len(PHASES)


def _count(workers: int) -> str:
    return f"{workers} worker{'s' * (workers > 1)}"
