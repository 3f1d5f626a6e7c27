"""The monitor's messages: what the driver takes, what workers learn from a pulse, and what the controller is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.training.failure_policy import Loss, WorkerState
from pipelines.training.run_monitor import Reply, RunMonitor, RunStatus, Updates
from s5.errors import Failure
from s5.training.watchdog import Hang

RAISED = Loss("raised", "RuntimeError: connection closed by peer")
DIED = Loss("died", "end of file")
TRAINING = "step 7: training"


class Clock:
    """A clock that moves only where a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def monitor(clock: Clock) -> RunMonitor:
    """Return the monitor of a run that may fail twice, with two workers in step 7 and a checkpoint of step 6."""
    running = RunMonitor(max_failures=2, clock=clock)
    begin(running, "g")
    running.checkpoint_at(6)
    return running


def begin(monitor: RunMonitor, group: str, size: int = 2) -> None:
    monitor.begin(group, size)
    for rank in range(size):
        assert monitor.pulse(group, rank, WorkerState(f"node {rank}", TRAINING)).in_run


def test_a_worker_without_pulses_is_missing(monitor: RunMonitor, clock: Clock) -> None:
    clock.now += 2.5
    monitor.pulse("g", 0, WorkerState("node 0", TRAINING, node_id="a"))
    monitor.pulse("g", 1, WorkerState("node 1", TRAINING, node_id="b"))
    clock.now += 1.5
    monitor.pulse("g", 0, WorkerState("node 0", TRAINING, node_id="a"))
    clock.now += 1
    assert monitor.missing(2.0) == {1: "b"}
    begin(monitor, "h")
    assert monitor.missing(2.0) == {}


def test_a_loss_counts_once_until_new_workers_start(monitor: RunMonitor) -> None:
    assert monitor.lost({0: RAISED, 1: DIED})
    assert monitor.take().messages == [
        "worker 1 (node 1) of 2 died in step 7: training (end of file); resuming from the checkpoint of step 6 "
        "(failure 1 of 2)"
    ]
    assert monitor.lost({0: RAISED}), "the same loss once more"
    assert monitor.take() == Updates()
    for restarts in (True, False):
        assert not monitor.status().failure
        begin(monitor, "g")
        assert monitor.lost({0: RAISED}) == restarts
    assert "scale.max_failures, 2, allows no more failures" in monitor.status().failure
    assert len(monitor.take().messages) == 1, "the driver raises the last one"


def test_a_silent_worker_is_found_by_the_time_of_its_last_pulse(monitor: RunMonitor, clock: Clock) -> None:
    clock.now += 60
    monitor.pulse("g", 0, WorkerState("node 0", TRAINING))
    assert monitor.lost({0: RAISED})
    (message,) = monitor.take().messages
    assert message.startswith("worker 1 (node 1) of 2 stopped responding in step 7: training")


def test_the_stacks_of_a_hang_are_taken_once(monitor: RunMonitor) -> None:
    state = WorkerState("node 1", TRAINING, Hang(TRAINING, 60.0, "the stack", waits=False))
    for _ in range(2):
        monitor.pulse("g", 1, state)
    assert monitor.take().stacks == ["worker 1 (node 1) of 2 in step 7: training for 60 s\nthe stack"]
    assert monitor.lost({1: DIED})
    (message,) = monitor.take().messages
    assert message.startswith("worker 1 (node 1) of 2 hangs in step 7: training")


def test_workers_of_an_earlier_group_are_no_part_of_the_run(monitor: RunMonitor) -> None:
    state = WorkerState("node 0", "step 7: saving", preempted="its process received SIGTERM")
    assert monitor.pulse("g", 0, state) == Reply(in_run=True, stop=False)
    monitor.request_stop()
    assert monitor.pulse("g", 0, state) == Reply(in_run=True, stop=True)
    begin(monitor, "h", size=1)
    assert monitor.take().messages == ["1 worker instead of 2, resuming from the checkpoint of step 6"]
    assert monitor.pulse("g", 0, state) == Reply(in_run=False, stop=True)
    assert monitor.lost({0: RAISED})
    assert "preempted" not in monitor.take().messages[0]


def test_a_permanent_error_ends_the_run(monitor: RunMonitor) -> None:
    monitor.fail("give another --out")
    monitor.fail("and what followed from it")
    assert not monitor.lost({0: RAISED})
    assert monitor.status() == RunStatus(stop=False, failure="give another --out")
    assert monitor.take() == Updates()


def test_the_driver_takes_updates_once_and_in_order(monitor: RunMonitor) -> None:
    unreadable = Failure("v1", "/v1.mp4", "file not found")
    monitor.report(Updates(rows=[(1, {"train/loss": 2.0})], messages=["first"]))
    monitor.report(Updates(rows=[(2, {"train/loss": 1.0})], rejects=[unreadable], messages=["second"], stacks=["s"]))
    rows = [(1, {"train/loss": 2.0}), (2, {"train/loss": 1.0})]
    assert monitor.take() == Updates(rows, [unreadable], ["first", "second"], ["s"])
    assert monitor.take() == Updates()


def test_the_actors_process_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, pipelines.training.run_monitor; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
