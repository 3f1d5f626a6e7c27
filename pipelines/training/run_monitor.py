"""What the workers of a run, Ray Train's controller and the driver send each other: an actor on the driver's node.

The actor's process imports this module and what it imports; none of it imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from pipelines.training.failure_policy import (
    SILENT_S,
    FailurePolicy,
    Loss,
    WorkerGroup,
    WorkerState,
    diagnose,
    during,
    resuming,
)
from s5.errors import Failure

STACKS = "stacks.txt"
"""File below --out with what the threads of workers that hang were doing."""


@dataclass(frozen=True)
class Updates:
    """News for the driver: from a worker, and all of it since the driver last asked."""

    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Metrics, with their steps."""
    rejects: list[Failure] = field(default_factory=list)
    """Videos that could not be read."""
    messages: list[str] = field(default_factory=list)
    """Sentences for the user: what happened to workers and checkpoints."""
    stacks: list[str] = field(default_factory=list)
    """What the threads of workers that hang were doing."""

    def extend(self, later: Updates) -> None:
        """Append later updates."""
        self.rows.extend(later.rows)
        self.rejects.extend(later.rejects)
        self.messages.extend(later.messages)
        self.stacks.extend(later.stacks)


class Reply(NamedTuple):
    """What a worker learns from a pulse."""

    in_run: bool
    """Whether its group is the run's present one; otherwise its process has to end."""
    stop: bool
    """Whether the driver requests a stop."""


class RunStatus(NamedTuple):
    """Whether a run is to end."""

    stop: bool
    """The driver requests a stop: the workers save and end."""
    failure: str
    """Why the run cannot succeed even with new workers; empty where it can."""


class RunMonitor:
    """Actor that collects updates for the driver, passes its stop request to the workers, and judges lost workers.

    Messages come from the driver (`take`, `request_stop`), from Ray Train's controller (`begin`, `missing`, `lost`) and
    from the workers (`pulse`, `report`, `checkpoint_at`, `fail`); `status` is for all.

    Args:
        max_failures: how often workers may fail or hang; preemption and the loss of a node do not count.
        silent_s: seconds without a pulse after which a worker counts as silent.
        clock: returns the present time in seconds.
    """

    def __init__(
        self, max_failures: int, silent_s: float = SILENT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._policy = FailurePolicy(max_failures)
        self._silent_s, self._clock = silent_s, clock
        self._updates = Updates()
        self._stop = False
        self._failure = ""
        self._group = WorkerGroup()
        self._group_is_lost = False
        self._checkpoint_step = 0

    def status(self) -> RunStatus:
        """Return whether a stop is requested, and why the run has failed if it has."""
        return RunStatus(self._stop, self._failure)

    # --- from the driver ----------------------------------------------------------------------------------------------

    def take(self) -> Updates:
        """Return the updates since the last call."""
        taken, self._updates = self._updates, Updates()
        return taken

    def request_stop(self) -> None:
        """Have the workers save and end."""
        self._stop = True

    # --- from the controller ------------------------------------------------------------------------------------------

    def begin(self, group: str, size: int) -> None:
        """Record that a group of `size` workers starts; workers of earlier groups no longer belong to the run."""
        before = self._group.size
        self._group, self._group_is_lost = WorkerGroup(group, size), False
        if before and before != size:
            workers = f"{size} worker{'s' * (size > 1)}"
            self._updates.messages.append(f"{workers} instead of {before}, {resuming(self._checkpoint_step)}")

    def missing(self, seconds: float) -> dict[int, str]:
        """Return the node of each worker of the present group that has sent no pulse for so long, by rank."""
        states, heard_at, now = self._group.states, self._group.heard_at, self._clock()
        return {rank: state.node_id for rank, state in states.items() if now - heard_at[rank] > seconds}

    def lost(self, losses: dict[int, Loss]) -> bool:
        """Judge what Ray Train lost of the present group; return whether new workers start.

        Ray Train reports the same loss several times while it drains a node: the first one counts.
        """
        if self._failure:
            return False
        if self._group_is_lost:
            return True
        self._group_is_lost = True
        diagnosis = diagnose(self._group, losses, self._clock(), self._silent_s)
        decision = self._policy.decide(diagnosis, self._checkpoint_step)
        if decision.restart:
            self._updates.messages.append(decision.message)
        else:
            self._failure = decision.message
        return decision.restart

    # --- from the workers ---------------------------------------------------------------------------------------------

    def pulse(self, group: str, rank: int, state: WorkerState) -> Reply:
        """Record that a worker is alive, and its state."""
        if group != self._group.id:
            return Reply(in_run=False, stop=True)
        before = self._group.states.get(rank)
        self._group.states[rank], self._group.heard_at[rank] = state, self._clock()
        if state.hang and not (before and before.hang):
            head = f"{self._group.names([rank])} {during(state.hang.phase)} for {state.hang.seconds:.0f} s"
            self._updates.stacks.append(f"{head}\n{state.hang.stacks}")
        return Reply(in_run=True, stop=self._stop)

    def report(self, updates: Updates) -> None:
        """Store a worker's updates for the driver."""
        self._updates.extend(updates)

    def checkpoint_at(self, step: int) -> None:
        """Record the step of the last checkpoint: it was just saved, or the workers resumed from it."""
        self._checkpoint_step = step

    def fail(self, message: str) -> None:
        """Record an error that new workers would meet again; the first one counts."""
        self._failure = self._failure or message
