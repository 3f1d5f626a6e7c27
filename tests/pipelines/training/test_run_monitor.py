"""What is said of workers that are lost, and which of them count as failures."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.training import run_monitor
from pipelines.training.run_monitor import Loss, Mailbox
from s5.training.watchdog import Hang

RAISED = Loss("raised", "RuntimeError: connection closed by peer")
ENDED = Loss("ended", "end of file")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give the time, which stands still."""
    times = [1000.0]
    monkeypatch.setattr(run_monitor.time, "monotonic", lambda: times[0])
    return times


def started(phases: list[str], now: list[float], max_failures: int = 2) -> Mailbox:
    """Return the mailbox of workers in certain phases, with a checkpoint of step 6."""
    box = Mailbox(max_failures)
    begin(box, phases)
    box.at(6)
    return box


def begin(box: Mailbox, phases: list[str]) -> None:
    box.begin("g", len(phases))
    for rank, phase in enumerate(phases):
        box.join("g", rank, f"node {rank}")
        box.pulse("g", rank, phase)


def test_the_one_that_died_is_named_and_counted(now: list[float]) -> None:
    box = started(["step 7: training"] * 2, now)
    assert box.lost({0: RAISED, 1: ENDED})
    (line,) = box.take().lines
    assert line == (
        "worker 1 (node 1) of 2 died in step 7: training (end of file); going on from the checkpoint of step 6 "
        "(failure 1 of 2)"
    )
    assert box.lost({0: RAISED}), "the same once more"
    assert not box.take().lines
    for goes_on in (True, False):
        assert not box.failure()
        begin(box, ["step 7: training"] * 2)
        assert box.lost({0: RAISED}) == goes_on
    assert "scale.max_failures, 2, allows no more" in box.failure()
    assert "of step 6" in box.failure()


@pytest.mark.parametrize("how", ["node", "told"])
def test_nodes_that_are_lost_and_workers_told_to_end_do_not_count(now: list[float], how: str) -> None:
    box = started(["step 7: training"] * 2, now, max_failures=0)
    for _ in range(3):
        if how == "told":
            box.told("g", 1, "its process got SIGTERM")
        assert box.lost({0: RAISED, 1: Loss("node", "gone")} if how == "node" else {0: RAISED, 1: RAISED})
        begin(box, ["step 7: training"] * 2)
    lines = box.take().lines
    assert len(lines) == 3
    assert all("1 (node 1) of 2" in line and "failure" not in line for line in lines)


@pytest.mark.parametrize(
    ("phases", "hangs", "silent", "named"),
    [
        (["step 7: waiting for data", "step 7: training"], {0: False}, [], "worker 0 (node 0) of 2 hangs in step 7: w"),
        (["step 7: training", "step 7: training"], {0: True, 1: False}, [], "worker 1 (node 1) of 2 hangs"),
        (
            ["step 7: training", "step 7: training"],
            {0: True},
            [1],
            "worker 1 (node 1) of 2 does not answer, last heard of in step 7",
        ),
        (["step 7: training", "step 8: training"], {1: False}, [], "worker 0 (node 0) of 2 hangs in step 7"),
        (["step 7: training", "step 7: training"], {0: True, 1: True}, [], "which of them hangs cannot be told"),
        (["step 7: training", "step 7: training"], {}, [1], "worker 1 (node 1) of 2 does not answer"),
    ],
)
def test_the_one_that_hangs_is_told_from_those_that_wait(
    now: list[float], phases: list[str], hangs: dict[int, bool], silent: list[int], named: str
) -> None:
    box = started(phases, now)
    now[0] += 60
    for rank, phase in enumerate(phases):
        if rank not in silent:
            box.pulse("g", rank, phase)
    for rank, waits in hangs.items():
        box.hang("g", rank, Hang(phases[rank], 60.0, "the stack", waits))
    assert box.lost(dict.fromkeys(hangs, ENDED) or dict.fromkeys(silent, Loss("silent", "no answer")))
    mail = box.take()
    assert named in mail.lines[0]
    assert "(failure 1 of 2)" in mail.lines[0]
    assert len(mail.stacks) == len(hangs)


def test_workers_of_an_earlier_group_do_not_belong_to_the_run(now: list[float]) -> None:
    box = started(["step 7: training"], now)
    box.request_stop()
    assert box.pulse("g", 0, "step 7: saving") == (True, True)
    box.begin("h", 2)
    assert box.pulse("g", 0, "step 7: saving") == (False, True)
    assert box.take().lines == ["2 workers instead of 1 from the checkpoint of step 6"]


def test_an_error_that_would_come_back_ends_the_run(now: list[float]) -> None:
    box: Any = started(["step 7: training"], now)
    box.fail("give another --out")
    assert not box.lost({0: RAISED})
    assert box.failure() == "give another --out"
    assert box.take().lines == []
