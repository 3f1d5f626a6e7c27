"""A training worker's connection to the run monitor; runs in every worker.

It sends a pulse twice a second with the worker's state, learns from the reply whether to stop, and ends the process
where it hangs or no longer belongs to the run.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import ray
import ray.exceptions

from pipelines.training.failure_policy import WorkerState
from pipelines.training.run_monitor import Reply, Updates
from s5.training.watchdog import Hang, Watchdog, leftover_stacks

# Exit status of a process that its run has left behind; Python's own exit would wait for the training thread.
ORPHANED_STATUS = 71
REPLY_TIMEOUT_S = 20.0


@dataclass
class WorkerProcess:
    """What the main thread of a worker's process, which is Ray Train's own, shares with the training thread."""

    group: str = ""
    """The group of workers that this one was started with."""
    sigterm: threading.Event = field(default_factory=threading.Event)
    """Set once the process receives SIGTERM."""


WORKER_PROCESS = WorkerProcess()


def enter_group(group: str) -> None:
    """Record this process's group, and have SIGTERM set a flag instead of ending the process at once, as Ray's does.

    Call it in the main thread, as signal handlers need.
    """

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        WORKER_PROCESS.sigterm.set()

    WORKER_PROCESS.group = group
    signal.signal(signal.SIGTERM, on_sigterm)


class Heartbeat:
    """Connects a worker to its run's monitor.

    Args:
        monitor: the actor handle of a `RunMonitor`.
        rank: rank of this worker.
        hang_timeout_s: seconds without a beat after which this process ends itself; 0 for never.
        out: the run's folder, which names it.
        on_hang: called before this process is ended for a hang.
    """

    def __init__(
        self, monitor: Any, rank: int, hang_timeout_s: float, out: str, on_hang: Callable[[Hang], None] | None = None
    ) -> None:
        self._monitor, self._rank, self._last_words = monitor, rank, on_hang
        place = f"node {ray.util.get_node_ip_address()}, process {os.getpid()}"  # type: ignore[no-untyped-call]
        self._state = WorkerState(place, node_id=ray.get_runtime_context().get_node_id())
        self._state_lock = threading.Lock()
        self._phase = self._state.phase
        self._stop = False
        # The watchdog's own thread waits for the reply, and must not itself count as hanging.
        self._reply_timeout_s = min(REPLY_TIMEOUT_S, hang_timeout_s / 2) or REPLY_TIMEOUT_S
        key = hashlib.sha256(out.encode()).hexdigest()[:16]
        if stacks := leftover_stacks(key):
            monitor.report.remote(Updates(stacks=stacks))
        self._watchdog = Watchdog(hang_timeout_s, self._on_hang, self._pulse, key, REPLY_TIMEOUT_S)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send pulses while the body runs, and watch the calling thread for hangs."""
        self._pulse(self._phase)
        self._watchdog.start()
        try:
            yield
        finally:
            # Where the body raises, the monitor learns in which phase.
            self._pulse(self._phase)
            self._watchdog.stop()

    def beat(self, phase: str) -> None:
        """Record that the training thread is alive and what it does next."""
        self._phase = phase
        self._watchdog.beat(phase)

    def stop_requested(self, node_drains: bool) -> bool:
        """Return whether the driver requests a stop, or this worker is preempted: by SIGTERM, or with its node."""
        reason = "its process received SIGTERM" if WORKER_PROCESS.sigterm.is_set() else ""
        reason = "its node is being drained" if node_drains else reason
        if reason:
            ray.get(self._send(preempted=reason))
        return self._stop or bool(reason)

    def _on_hang(self, hang: Hang) -> None:
        if self._last_words is not None:
            self._last_words(hang)
        ray.get(self._send(phase=hang.phase, hang=hang), timeout=REPLY_TIMEOUT_S)

    def _pulse(self, phase: str) -> None:
        try:
            reply: Reply = ray.get(self._send(phase=phase), timeout=self._reply_timeout_s)
        except ray.exceptions.ActorDiedError:
            # The driver is gone, and the monitor with it; unless this process is the driver, which then says so.
            reply = Reply(in_run=self._last_words is not None, stop=True)
        except (ray.exceptions.RayError, TimeoutError):
            return  # Unreachable for now: the next pulse tries again.
        self._stop = reply.stop
        if not reply.in_run:
            os._exit(ORPHANED_STATUS)

    def _send(self, **changes: Any) -> Any:
        # Two threads send: under the lock, states arrive in the order in which they were made.
        with self._state_lock:
            self._state = replace(self._state, **changes)
            return self._monitor.pulse.remote(WORKER_PROCESS.group, self._rank, self._state)
