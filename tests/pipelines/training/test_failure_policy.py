"""Which workers are named after a loss, what counts as a failure, and when the run restarts."""

from __future__ import annotations

from itertools import permutations

import pytest

from pipelines.training.failure_policy import (
    PHASES,
    SILENT_S,
    Diagnosis,
    FailurePolicy,
    Loss,
    WorkerGroup,
    WorkerState,
    diagnose,
    find_hung,
    position,
)
from s5.training.watchdog import Hang

NOW = 1000.0
RAISED = Loss("raised", "RuntimeError: connection closed by peer")
DIED = Loss("died", "end of file")
NODE = Loss("node", "the node has died")
UNRESPONSIVE = Loss("unresponsive", "no answer")
TRAINING = "step 7: training"


def worker(rank: int, phase: str = TRAINING, hang: str = "", preempted: str = "") -> WorkerState:
    """Return a worker's state; `hang` is "" for none, "alone", or "waits" in a collective."""
    found = Hang(phase, 60.0, "the stack", waits=hang == "waits") if hang else None
    return WorkerState(f"node {rank}", phase, found, preempted)


def group_of(*states: WorkerState, silent: tuple[int, ...] = ()) -> WorkerGroup:
    """Return a group in which the `silent` ranks were last heard from a minute ago, the others now."""
    heard_at = {rank: NOW - 60.0 * (rank in silent) for rank in range(len(states))}
    return WorkerGroup("g", len(states), dict(enumerate(states)), heard_at)


# --- who is at fault --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "summary"),
    [
        ({0: RAISED, 1: DIED}, "worker 1 (node 1) of 2 died in step 7: training (end of file)"),
        ({0: RAISED}, "worker 0 (node 0) of 2 failed in step 7: training (RuntimeError: connection closed by peer)"),
        ({0: DIED, 1: DIED}, "workers 0 (node 0), 1 (node 1) of 2 died in step 7: training (end of file)"),
        ({0: UNRESPONSIVE, 5: DIED}, "worker 0 (node 0) of 2 hangs in step 7: training (see stacks.txt"),
        ({5: DIED}, "worker 5 of 2 died while starting (end of file)"),
        ({}, "the workers were lost"),
    ],
)
def test_the_worker_at_fault_is_named_and_counts(losses: dict[int, Loss], summary: str) -> None:
    diagnosis = diagnose(group_of(worker(0), worker(1)), losses, NOW)
    assert diagnosis.summary.startswith(summary)
    assert diagnosis.is_failure


def test_preemption_and_lost_nodes_do_not_count_even_where_others_fail_or_hang() -> None:
    hanging = worker(0, hang="alone")
    preempted = group_of(hanging, worker(1, preempted="its process received SIGTERM"))
    assert diagnose(preempted, {0: RAISED, 1: NODE}, NOW) == Diagnosis(
        "worker 1 (node 1) of 2 was preempted (its process received SIGTERM)", is_failure=False
    )
    assert diagnose(group_of(hanging, worker(1)), {0: DIED, 1: NODE}, NOW) == Diagnosis(
        "worker 1 (node 1) of 2 lost: a node failed or cannot be reached", is_failure=False
    )


@pytest.mark.parametrize(
    ("states", "silent", "hung", "summary"),
    [
        # One waits for data, the other for it in a collective that was started on the device: no wait is seen.
        (
            [worker(0, "step 7: waiting for data", "alone"), worker(1)],
            (),
            [0],
            "worker 0 (node 0) of 2 hangs in step 7: waiting for data",
        ),
        # Both in the same phase: the one that does not wait is at fault.
        ([worker(0, hang="waits"), worker(1, hang="alone")], (), [1], "worker 1 (node 1) of 2 hangs in"),
        # Without a pulse it cannot report its hang.
        (
            [worker(0, hang="waits"), worker(1)],
            (1,),
            [1],
            "worker 1 (node 1) of 2 stopped responding in step 7: training",
        ),
        ([worker(0), worker(1)], (1,), [1], "worker 1 (node 1) of 2 stopped responding in"),
        # The one that is behind hangs, although only the other's watchdog has noticed so far.
        ([worker(0), worker(1, "step 8: training", "alone")], (), [0], "worker 0 (node 0) of 2 hangs in step 7"),
        # Nothing tells them apart.
        (
            [worker(0, hang="waits"), worker(1, hang="waits")],
            (),
            [0, 1],
            "workers 0 (node 0), 1 (node 1) of 2 make no progress (it is unknown which of them hangs)",
        ),
        # A worker that reported its hang has ended: its silence means nothing.
        ([worker(0, hang="alone"), worker(1, hang="waits")], (0, 1), [0], "worker 0 (node 0) of 2 hangs in"),
    ],
)
def test_the_worker_that_hangs_is_told_from_those_that_wait(
    states: list[WorkerState], silent: tuple[int, ...], hung: list[int], summary: str
) -> None:
    group = group_of(*states, silent=silent)
    losses = {rank: DIED for rank, state in enumerate(states) if state.hang}
    assert find_hung(group, losses, NOW) == hung
    diagnosis = diagnose(group, losses, NOW)
    assert diagnosis.summary.startswith(summary)
    assert diagnosis.is_failure


def test_the_verdict_does_not_depend_on_ranks() -> None:
    states = [worker(0, "step 8: training", "waits"), worker(1, hang="waits"), worker(2, hang="alone"), worker(3)]
    for order in permutations(range(4)):
        group = group_of(*(states[i] for i in order))
        assert find_hung(group, {}, NOW) == [order.index(2)]


def test_a_worker_is_silent_only_after_the_time_it_is_given() -> None:
    group = group_of(worker(0), worker(1))
    group.heard_at[1] = NOW - SILENT_S
    assert find_hung(group, {}, NOW) == []
    assert find_hung(group, {}, NOW + 0.1) == [1]
    assert find_hung(group, {}, NOW + 0.1, silent_s=20.0) == []


def test_phases_are_ordered() -> None:
    steps = [f"step {step}: {phase}" for step in (9, 10) for phase in (*PHASES, "a phase of a later version")]
    positions = [position(phase) for phase in ("starting", *steps)]
    assert positions == sorted(set(positions))


# --- whether the run restarts -----------------------------------------------------------------------------------------


def test_the_failure_after_the_last_one_allowed_ends_the_run() -> None:
    policy, died = FailurePolicy(2), Diagnosis("worker 1 of 2 died", is_failure=True)
    first = policy.decide(died, checkpoint_step=0)
    assert first.restart
    assert first.message == "worker 1 of 2 died; restarting from the beginning (failure 1 of 2)"
    second = policy.decide(died, checkpoint_step=6)
    assert second.restart
    assert second.message == "worker 1 of 2 died; resuming from the checkpoint of step 6 (failure 2 of 2)"
    last = policy.decide(died, checkpoint_step=6)
    assert not last.restart
    assert last.message == (
        "worker 1 of 2 died; scale.max_failures, 2, allows no more failures: run the same command again to resume from "
        "the checkpoint of step 6"
    )


def test_what_is_no_failure_restarts_the_run_however_often() -> None:
    policy, drained = FailurePolicy(0), Diagnosis("worker 1 of 2 was preempted (drained)", is_failure=False)
    for _ in range(3):
        decision = policy.decide(drained, checkpoint_step=6)
        assert decision.restart
        assert decision.message == "worker 1 of 2 was preempted (drained); resuming from the checkpoint of step 6"
    last = policy.decide(Diagnosis("worker 1 of 2 died", is_failure=True), checkpoint_step=0)
    assert not last.restart
    assert last.message.endswith("run the same command again to start over")
