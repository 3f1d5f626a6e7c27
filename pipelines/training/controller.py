"""What runs in Ray Train's controller, the actor that starts, watches and replaces groups of workers.

Ray Train calls it through two extension points: the backend of `TorchConfig`, once for each new group, and
`UserCallback`, once for each loss. Both send what they see to the run monitor.
"""

from __future__ import annotations

import socket
import time
import uuid
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch

from pipelines.errors import StageError, last_line
from pipelines.training.failure_policy import Loss
from pipelines.training.heartbeat import enter_group

# Time for the monitor to miss the worker for which a failed one was waiting: each sends two pulses a second.
MISSING_PULSE_SECONDS = 3.0
CONNECT_SECONDS = 2.0
# At most this much of Ray's explanation is shown.
REASON_CHARACTERS = 200


@dataclass
class MonitoredTorchConfig(ray.train.torch.TorchConfig):
    """Settings of the process group, and the monitor to which each new group of workers is reported."""

    monitor: Any = None

    @property
    def backend_cls(self) -> type:
        """The backend that Ray Train starts."""
        return MonitoredTorchBackend


class MonitoredTorchBackend(ray.train.torch.TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's torch backend, which also names each new group of workers."""

    def on_start(self, worker_group: Any, backend_config: MonitoredTorchConfig) -> None:
        """Report the group to the monitor and to its workers, then set up the process group."""
        group = uuid.uuid4().hex
        ray.get(backend_config.monitor.begin.remote(group, len(worker_group)))
        # Runs in the main thread of each worker.
        worker_group.execute(enter_group, group)
        super().on_start(worker_group, backend_config)


class LossReporter(ray.train.UserCallback):
    """Reports lost workers to the monitor, and ends the run if the monitor decides so."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Report the losses; raise `StageError`, which ends the run, where no new workers are to start."""
        losses = {rank: classify(error) for rank, error in worker_exceptions.items()}
        if all(loss.kind == "raised" for loss in losses.values()):
            # What they raise may follow from the loss of a node, which Ray takes half a minute to see.
            time.sleep(MISSING_PULSE_SECONDS)
            missing = ray.get(self._monitor.missing.remote(MISSING_PULSE_SECONDS - 1))
            losses |= {rank: Loss("node", "no answer") for rank, node in missing.items() if not node_answers(node)}
        if not ray.get(self._monitor.lost.remote(losses)):
            raise StageError("the run monitor starts no new workers")


def node_answers(node_id: str) -> bool:
    """Return whether the Ray process of a node accepts a connection."""
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["NodeID"] == node_id:
            try:
                with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), CONNECT_SECONDS):
                    return True
            except OSError:
                return False
    return False


def classify(error: Exception) -> Loss:
    """Return what an error that Ray Train reports of a worker means."""
    cause = getattr(error, "health_check_failure", error)
    if isinstance(cause, ray.exceptions.RayActorError):
        text = " ".join(str(cause).split())
        # The node reports the death of a process at once; Ray learns of a lost node only after half a minute.
        unreachable = cause.preempted or isinstance(cause, ray.exceptions.ActorUnavailableError)
        node = unreachable or "node has died" in text or "node was terminated" in text
        # Ray's detail stands between a page about the actor and a list of common causes.
        detail = text.rpartition("Worker exit detail: ")[2].partition(". Some common causes")[0]
        return Loss("node" if node else "died", detail[:REASON_CHARACTERS])
    if type(cause).__name__ == "WorkerHealthCheckTimeoutError":
        return Loss("unresponsive", "no answer to Ray Train's health check")
    return Loss("raised", f"{type(cause).__name__}: {last_line(str(cause))}".removesuffix(": "))
