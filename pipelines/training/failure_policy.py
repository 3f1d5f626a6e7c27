"""Judges the loss of workers: which one failed or hung, which only waited for it, and whether the run restarts.

Pure: what was last heard from each worker goes in, a decision and a sentence come out, without Ray, clock or I/O. It
runs in the process of the `RunMonitor` actor, and imports no torch, so that this process stays small.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from s5.training.watchdog import Hang

PHASES = ("waiting for the first batch", "waiting for data", "training", "evaluating", "saving")
"""Phases of a step, in order, as `s5.training.loop` names them."""
SILENT_S = 10.0
"""Seconds after which a worker that sends two pulses a second counts as silent."""


@dataclass(frozen=True)
class Loss:
    """Why Ray Train lost a worker."""

    kind: Literal["died", "node", "unresponsive", "raised"]
    """Its process died, its node was lost or cannot be reached, it fails Ray Train's health check, or it raised."""
    reason: str
    """Ray's reason, or the error, on one line."""


@dataclass(frozen=True)
class WorkerState:
    """What a worker says about itself in each pulse."""

    place: str
    """Its node and process."""
    phase: str = "starting"
    """Step and phase, such as "step 7: training"."""
    hang: Hang | None = None
    """Set when its watchdog found that it hangs; its process is about to end."""
    preempted: str = ""
    """Why it has to leave: its process received SIGTERM, or its node is being drained."""
    node_id: str = ""
    """Ray's name of its node."""


@dataclass
class WorkerGroup:
    """The workers of one start of Ray Train, by rank, as last heard from."""

    id: str = ""
    size: int = 0
    states: dict[int, WorkerState] = field(default_factory=dict)
    heard_at: dict[int, float] = field(default_factory=dict)
    """Seconds, on the clock that `diagnose` is given."""

    def names(self, ranks: Sequence[int]) -> str:
        """Return ranks and places, such as "worker 1 (node 10.0.0.7, process 4711) of 2"."""
        known = [f"{rank} ({self.states[rank].place})" if rank in self.states else str(rank) for rank in ranks]
        return f"worker{'s' * (len(ranks) > 1)} {', '.join(known)} of {self.size}"

    def phase(self, rank: int) -> str:
        """Return the last known phase of a worker, in words."""
        return during(self.states[rank].phase if rank in self.states else "starting")


@dataclass(frozen=True)
class Diagnosis:
    """What happened to a group of workers."""

    summary: str
    """The workers at fault and what they did, without a full stop."""
    is_failure: bool
    """Whether it counts towards `max_failures`; preemption and the loss of a node do not."""


@dataclass(frozen=True)
class Decision:
    """What is done after a loss."""

    restart: bool
    message: str
    """A sentence for the user: why the run ends, or from where it resumes."""


class FailurePolicy:
    """Counts failures and decides whether the run restarts.

    Args:
        max_failures: how often workers may fail or hang; the next failure ends the run.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._failures = 0

    def decide(self, diagnosis: Diagnosis, checkpoint_step: int) -> Decision:
        """Return whether a new group starts, and what the user reads.

        Args:
            diagnosis: what happened.
            checkpoint_step: step of the last checkpoint; 0 where there is none.
        """
        self._failures += diagnosis.is_failure
        if self._failures > self._max_failures:
            limit = f"scale.max_failures, {self._max_failures}, allows no more failures"
            start = f"resume from the checkpoint of step {checkpoint_step}" if checkpoint_step else "start over"
            return Decision(False, f"{diagnosis.summary}; {limit}: run the same command again to {start}")
        count = f" (failure {self._failures} of {self._max_failures})" if diagnosis.is_failure else ""
        return Decision(True, f"{diagnosis.summary}; {resuming(checkpoint_step)}{count}")


def resuming(checkpoint_step: int) -> str:
    """Return from where new workers train, in words."""
    if checkpoint_step:
        return f"resuming from the checkpoint of step {checkpoint_step}"
    return "restarting from the beginning"


def diagnose(group: WorkerGroup, losses: Mapping[int, Loss], now: float, silent_s: float = SILENT_S) -> Diagnosis:
    """Return what happened, by the first of these that applies: preemption, loss of a node, hang, death, error.

    One lost worker takes the others with it: those that wait for it in a collective raise errors or hang too. So the
    rarer and more specific cause wins over what usually follows from it.

    Args:
        group: the workers as last heard from.
        losses: what Ray Train reports, by rank.
        now: the present time, in seconds on the clock of `group.heard_at`.
        silent_s: seconds without a pulse after which a worker counts as silent.
    """
    preempted = [rank for rank, state in group.states.items() if state.preempted]
    if preempted:
        verb = "was" if len(preempted) == 1 else "were"
        reason = group.states[preempted[0]].preempted
        return Diagnosis(f"{group.names(preempted)} {verb} preempted ({reason})", is_failure=False)
    on_lost_nodes = [rank for rank, loss in losses.items() if loss.kind == "node"]
    if on_lost_nodes:
        return Diagnosis(f"{group.names(on_lost_nodes)} lost: a node failed or cannot be reached", is_failure=False)
    hung = find_hung(group, losses, now, silent_s)
    if hung:
        return Diagnosis(_describe_hang(group, hung, now, silent_s), is_failure=True)
    for kind, verb in (("died", "died"), ("unresponsive", "stopped responding"), ("raised", "failed")):
        ranks = [rank for rank, loss in losses.items() if loss.kind == kind]
        if ranks:
            reason = losses[ranks[0]].reason
            return Diagnosis(f"{group.names(ranks)} {verb} {group.phase(ranks[0])} ({reason})", is_failure=True)
    return Diagnosis("the workers were lost", is_failure=True)


def find_hung(group: WorkerGroup, losses: Mapping[int, Loss], now: float, silent_s: float = SILENT_S) -> list[int]:
    """Return the ranks that hang, without those that only wait for them; none where nothing hangs.

    1. Silent workers: a worker that waits still sends pulses, but one that is stopped, or hangs while it holds Python's
       lock, does not.
    2. Where every worker sends pulses and none reports a hang: those that fail Ray Train's health check.
    3. Where some report a hang: of the workers that are furthest behind, those that do not wait in a collective; if all
       of them may wait, all of them.
    """
    silent = [rank for rank in group.states if _is_silent(group, rank, now, silent_s)]
    if silent:
        return silent
    if not any(state.hang for state in group.states.values()):
        return [rank for rank, loss in losses.items() if loss.kind == "unresponsive" and rank in group.states]
    furthest_behind = min(position(state.phase) for state in group.states.values())
    last = [rank for rank, state in group.states.items() if position(state.phase) == furthest_behind]
    at_fault = [rank for rank in last if (hang := group.states[rank].hang) and not hang.waits]
    return at_fault or last


def position(phase: str) -> tuple[int, int]:
    """Return the step and the place in `PHASES` of a phase, for comparison: (7, 2) for "step 7: training".

    (0, -1) before the first step; an unknown phase comes after all known ones of its step.
    """
    found = re.fullmatch(r"step (\d+): (.*)", phase)
    if found is None:
        return 0, -1
    return int(found[1]), PHASES.index(found[2]) if found[2] in PHASES else len(PHASES)


def during(phase: str) -> str:
    """Return a phase as part of a sentence: "in step 7: training", or "while starting"."""
    return f"in {phase}" if phase.startswith("step ") else f"while {phase}"


def _is_silent(group: WorkerGroup, rank: int, now: float, silent_s: float) -> bool:
    # A worker that reported a hang has ended itself: that it sends nothing more means nothing.
    return group.states[rank].hang is None and now - group.heard_at[rank] > silent_s


def _describe_hang(group: WorkerGroup, hung: Sequence[int], now: float, silent_s: float) -> str:
    if len(hung) > 1:
        return f"{group.names(hung)} make no progress (it is unknown which of them hangs)"
    state = group.states[hung[0]]
    verb = "stopped responding" if _is_silent(group, hung[0], now, silent_s) else "hangs"
    return f"{group.names(hung)} {verb} {during(state.phase)} (see stacks.txt for the stacks of its threads, if any)"
