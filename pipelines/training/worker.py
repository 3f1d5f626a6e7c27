"""What runs in each training worker of Ray Train: the training loop's context, and the function that runs the loop.

Nothing here knows what is trained: the stage passes a function that builds the `TrainingLoop` of one worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution.context import get_train_context
from torch import nn

from pipelines import storage
from pipelines.config import DataConfig, ScaleConfig
from pipelines.errors import UserError
from pipelines.running.resources import decode_tasks_per_worker
from pipelines.running.run_folder import CHECKPOINTS
from pipelines.storage.checkpoint_backend import checkpoint_backend
from pipelines.training.heartbeat import Heartbeat
from pipelines.training.run_monitor import RunStatus, Updates
from s5.checkpoints.history import CheckpointHistory
from s5.errors import CheckpointError, Failure, NotFiniteError, TrainingError, VideoError
from s5.training.loop import TrainingLoop, TrainingResult
from s5.training.watchdog import Hang

NOT_FINITE = "not_finite.json"
# Errors that new workers would meet again: the run ends without a restart.
PERMANENT_ERRORS = (TrainingError, CheckpointError, VideoError, UserError, ValueError, FloatingPointError)


class PreemptedError(Exception):
    """The workers saved and ended, since at least one of them was preempted; the run continues with new ones."""


@dataclass(frozen=True)
class Place:
    """Where a worker stands in its group."""

    rank: int
    world_size: int
    device: torch.device
    draining: Callable[[], bool]
    """Returns whether its node is being drained."""
    on_hang: Callable[[Hang], None] | None = None
    """Called before the process is ended for a hang."""


class RayContext:
    """`s5.training.context.WorkerContext` inside a worker.

    Args:
        setup: what the worker was started with.
        place: its place in the group.
    """

    # The heartbeat knows the answer already, and the grace period of a stop may be as short as three seconds.
    poll_seconds = 0.0

    def __init__(self, setup: WorkerSetup, place: Place) -> None:
        self.rank, self.world_size, self.device = place.rank, place.world_size, place.device
        self._draining = place.draining
        self.decode_tasks, self._cpus_per_decode = (
            decode_tasks_per_worker(setup.scale, setup.data, self.world_size) if setup.data else (1, 1.0)
        )
        self.heartbeat = Heartbeat(
            setup.monitor, self.rank, setup.scale.hang_timeout_s, storage.absolute(setup.out), place.on_hang
        )
        self._monitor = setup.monitor
        self._out = setup.out
        store = checkpoint_backend(storage.join(setup.out, CHECKPOINTS))
        self.checkpoints: CheckpointHistory | None = CheckpointHistory(store, setup.keep_checkpoints, setup.best)

    def fitted(self, data: DataConfig) -> DataConfig:
        """Return the decoding settings with the CPUs per task that these workers leave free."""
        return replace(data, cpus_per_decode=self._cpus_per_decode)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module under DDP; running statistics are already the same on all workers."""
        if self.world_size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send a row of metrics to the driver, without waiting."""
        self._report(Updates(rows=[(step, dict(metrics))]))

    def reject(self, failures: list[Failure]) -> None:
        """Send the driver the videos that could not be read."""
        self._report(Updates(rejects=failures))

    def notify(self, message: str) -> None:
        """Send the driver a sentence for the user."""
        self._report(Updates(messages=[message]))

    def saved(self, step: int) -> None:
        """Report the step from which new workers would resume."""
        self._monitor.checkpoint_at.remote(step)

    def store_file(self, file: Path, name: str) -> None:
        """Store a file below --out."""
        storage.write_bytes(storage.join(self._out, name), file.read_bytes())

    def stop_requested(self) -> bool:
        """Return whether the driver requests a stop, or this worker is preempted."""
        return self.heartbeat.stop_requested(node_drains=self._draining())

    def beat(self, phase: str) -> None:
        """Record that the training thread is alive and what it does next."""
        self.heartbeat.beat(phase)

    def _report(self, updates: Updates) -> None:
        self._monitor.report.remote(updates)


BuildLoop = Callable[[Any, RayContext], TrainingLoop]


@dataclass(frozen=True)
class WorkerSetup:
    """What every worker is started with; it is pickled into Ray Train's `train_loop_config`."""

    build: BuildLoop
    """Builds the worker's training loop from `payload` and its context; it has to pickle."""
    payload: Any
    """What `build` needs, such as the config and the manifest's rows."""
    monitor: Any
    """Actor handle of the `RunMonitor`."""
    scale: ScaleConfig
    data: DataConfig | None
    out: str
    keep_checkpoints: int
    best: tuple[str, str] | None
    """Name of the validation metric that picks the best checkpoint, and `max` or `min`."""


def run_worker(config: dict[str, WorkerSetup]) -> TrainingResult | None:
    """Build the training loop and run it; Ray Train calls this in every worker.

    Returns:
        How training ended; None where the run has already failed.

    Raises:
        PreemptedError: the workers saved and ended early, and new ones are to continue.
        Exception: what the loop raises (`run_loop`).
    """
    setup, train = config["setup"], ray.train.get_context()
    status: RunStatus = ray.get(setup.monitor.status.remote())
    if status.failure:
        return None

    def draining() -> bool:
        # Ray's notice of nodes that are drained. Its public get_preemption_info makes all workers wait for each other.
        notice = get_train_context().preemption_context.preemption_info
        return notice is not None and train.get_world_rank() in notice.preempted_ranks

    place = Place(train.get_world_rank(), train.get_world_size(), ray.train.torch.get_device(), draining)
    result = run_loop(setup, place)
    status = ray.get(setup.monitor.status.remote())
    if result.stopped and not status.stop:
        raise PreemptedError
    return result


def run_loop(setup: WorkerSetup, place: Place) -> TrainingResult:
    """Build the training loop of one worker and run it, with its heartbeat.

    Raises:
        Exception: what the loop raises. One of `PERMANENT_ERRORS` is first reported to the monitor, which then starts
            no new workers.
    """
    context = RayContext(setup, place)
    try:
        with context.heartbeat.running():
            return setup.build(setup.payload, context).run()
    except NotFiniteError as error:
        path = storage.join(setup.out, NOT_FINITE)
        if context.rank == 0:
            storage.write_json(path, [step._asdict() for step in error.skipped])
        ray.get(setup.monitor.fail.remote(f"{error}; the videos of all these steps are listed in {path}"))
        raise
    except PERMANENT_ERRORS as error:
        ray.get(setup.monitor.fail.remote(str(error)))
        raise
