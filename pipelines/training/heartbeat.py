"""A training worker's line to the mailbox: that it is there, whether it is to end, and where it hangs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import ray
import ray.exceptions

from pipelines.training.run_monitor import Loss
from s5.training.watchdog import Hang, Watchdog, leftovers

# Of a process whose run is over; Python's own exit would wait for the training thread.
OUTLIVED_STATUS = 71
TELL_S = 20.0


@dataclass
class Process:
    """What the main thread of a worker's process, which is Ray Train's own, leaves for the thread that trains."""

    group: str = ""
    """The group of workers that this one was started with."""
    terminated: threading.Event = field(default_factory=threading.Event)
    """Set by SIGTERM."""


PROCESS = Process()


def prepare(group: str) -> None:
    """Take down SIGTERM instead of ending at once, as Ray's handler does; call it in the main thread."""

    def note(number: int, frame: FrameType | None) -> None:
        PROCESS.terminated.set()

    PROCESS.group = group
    signal.signal(signal.SIGTERM, note)


class Lifeline:
    """Joins a worker to its mailbox.

    Args:
        mailbox: the actor.
        rank: this worker.
        hang_timeout_s: seconds without a beat after which this process ends itself; 0 for never.
    """

    def __init__(self, mailbox: Any, rank: int, hang_timeout_s: float) -> None:
        self._mailbox, self._rank = mailbox, rank
        self._phase = ""
        self._stop = False
        # The watchdog's own thread asks, and would count as hanging.
        self._patience_s = min(TELL_S, hang_timeout_s / 2) or TELL_S
        key = mailbox._actor_id.hex()
        for text in leftovers(key):
            mailbox.add_stacks.remote(text)
        self._watchdog = Watchdog(hang_timeout_s, self._hang, self._pulse, key, TELL_S)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be heard of while the body runs; the process ends where the body hangs or the run goes on without it."""
        place = f"node {ray.util.get_node_ip_address()}, process {os.getpid()}"  # type: ignore[no-untyped-call]
        ray.get(self._mailbox.join.remote(PROCESS.group, self._rank, place))
        self._watchdog.start()
        try:
            yield
        finally:
            # The last word of a worker that fails.
            self._pulse(self._phase)
            self._watchdog.stop()

    def beat(self, phase: str) -> None:
        """Take note of what comes next."""
        self._phase = phase
        self._watchdog.beat(phase)

    def stop_requested(self, leaving: bool) -> bool:
        """Return whether the driver wants a stop, or this worker has to end: by a signal, or `leaving` its node."""
        why = "its process got SIGTERM" if PROCESS.terminated.is_set() else ""
        why = "its node is taken away" if leaving else why
        if why:
            ray.get(self._mailbox.told.remote(PROCESS.group, self._rank, why))
        return self._stop or bool(why)

    def _hang(self, hang: Hang) -> None:
        ray.get(self._mailbox.hang.remote(PROCESS.group, self._rank, hang), timeout=TELL_S)

    def _pulse(self, phase: str) -> None:
        try:
            pulse = self._mailbox.pulse.remote(PROCESS.group, self._rank, phase)
            belongs, self._stop = ray.get(pulse, timeout=self._patience_s)
        except ray.exceptions.ActorDiedError:
            belongs = False  # The driver is gone.
        except (ray.exceptions.RayError, TimeoutError):
            return  # Away for now.
        if not belongs:
            os._exit(OUTLIVED_STATUS)


def loss_of(error: Exception) -> Loss:
    """Return what an error means that Ray Train hands on of a worker."""
    cause = getattr(error, "health_check_failure", error)
    if isinstance(cause, ray.exceptions.RayActorError):
        text = " ".join(str(cause).split())
        # Where only a process has died, its node says so at once; of a lost node Ray learns after half a minute.
        gone = cause.preempted or isinstance(cause, ray.exceptions.ActorUnavailableError)
        node = gone or "node has died" in text or "node was terminated" in text
        # Behind a page on the actor, Ray's detail, and before a list of what may cause such a thing.
        detail = text.rpartition("Worker exit detail: ")[2].partition(". Some common causes")[0]
        return Loss("node" if node else "ended", detail[:200])
    if type(cause).__name__ == "WorkerHealthCheckTimeoutError":
        return Loss("silent", "no answer")
    return Loss("raised", f"{type(cause).__name__}: {last_line(cause)}")


def last_line(error: BaseException) -> str:
    """Return the last line of an error, which says what went wrong."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
