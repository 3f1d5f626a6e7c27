"""What the driver does while workers train: it forwards their updates, and turns signals into stop requests.

The driver is the process of the stage, or of one trial of a sweep. It alone talks to MLflow and to the terminal.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from pipelines import storage
from pipelines.errors import StageError, StoppedError, last_line
from pipelines.running.stage import Stage, in_thread, signals_received
from pipelines.training.run_monitor import STACKS, RunStatus, Updates
from s5.checkpoints.history import CheckpointHistory, checkpoint_name
from s5.training.loop import TrainingResult

ERROR = "error.txt"
POLL_SECONDS = 0.25

OnRow = Callable[[int, dict[str, float]], None]
"""Called with the step and a row of metrics."""


@dataclass(frozen=True)
class Outcome:
    """What a training run produced."""

    fit: TrainingResult
    latest: str
    """Path or URI of the last checkpoint."""
    best: str
    """Path or URI of the checkpoint with the best validation metric; the last one where there is no such metric."""
    best_score: float | None = None
    """The metric's value at the best checkpoint."""


def drive(
    train: Callable[[], TrainingResult | None],
    monitor: Any,
    stage: Stage,
    on_row: Sequence[OnRow],
    checkpoints: CheckpointHistory,
    here: bool,
) -> Outcome:
    """Train to the end.

    Args:
        train: trains, and returns what rank 0 does. It runs in a thread: in the main thread, a signal would abort it
            before the workers can save.
        monitor: the actor handle of the run's `RunMonitor`.
        stage: the running stage.
        on_row: each is called with every row of metrics. What they raise ends the run.
        checkpoints: those of the run.
        here: `train` trains in this process, and ends before this function does, whatever happens.

    Raises:
        StageError: training failed; the message is the worker's, or the monitor's.
        StoppedError: a signal requested a stop, and the workers saved a checkpoint.
    """
    with signals_received(stage, "saving a checkpoint first") as received:
        training = in_thread(train)
        requested = False
        try:
            while not training.done():
                wait([training], POLL_SECONDS)
                if received and not requested:
                    requested = True
                    monitor.request_stop.remote()
                forward(ray.get(monitor.take.remote()), stage, on_row)
        except ray.exceptions.RayActorError as error:
            raise StageError(
                f"the process of the run's monitor was lost ({last_line(str(error))}): run the same command again to "
                "resume"
            ) from error
        finally:
            if here and len(received) < 2 and not training.done():
                # Such as the end of a trial that Tune stops early: this process may run another one.
                monitor.request_stop.remote()
                wait([training])
        # What arrived between the last call and the end.
        forward(ray.get(monitor.take.remote()), stage, on_row)
    fit = _result(training, monitor, stage)
    if received and fit.stopped:
        raise StoppedError(
            f"stopped at step {fit.step} as requested; the checkpoint is saved, and the same command resumes from it",
            128 + received[0],
        )
    return _outcome(fit, checkpoints)


def forward(updates: Updates, stage: Stage, on_row: Sequence[OnRow]) -> None:
    """Send the workers' updates to the tracker, the terminal, and the files below --out."""
    for step, row in updates.rows:
        stage.tracker.log(row, step=step)
        if skipped := row.get("train/skipped_steps"):
            stage.info(
                f"WARNING: {skipped:.0f} step(s) skipped up to step {step}: loss or gradient not finite; the run ends "
                "after more than loop.max_skipped in a row"
            )
        for call in on_row:
            call(step, row)
    if updates.rejects:
        stage.reject(updates.rejects)
    if updates.stacks:
        path = stage.path(STACKS)
        earlier = [storage.read_bytes(path).decode()] if storage.exists(path) else []
        storage.write_bytes(path, "\n\n".join([*earlier, *updates.stacks]).encode())
    for message in updates.messages:
        stage.info(message)


def _result(training: Future[TrainingResult | None], monitor: Any, stage: Stage) -> TrainingResult:
    """Return what rank 0 returned; where training failed, raise the monitor's reason, or else Ray Train's."""
    status: RunStatus = ray.get(monitor.status.remote())
    error = training.exception()
    if status.failure:
        raise StageError(status.failure)
    if error is not None:
        storage.write_bytes(stage.path(ERROR), "".join(traceback.format_exception(error)).encode())
        raise StageError(f"training failed: {_cause(error)}; see {stage.path(ERROR)} for all of it") from error
    if (result := training.result()) is None:
        raise StageError("training ended without a result")
    return result


def _cause(error: BaseException) -> str:
    """Return the last line of what went wrong in the first of the failed workers."""
    failures = getattr(error, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else error
    return last_line(str(cause)) or type(cause).__name__


def _outcome(fit: TrainingResult, checkpoints: CheckpointHistory) -> Outcome:
    metas = checkpoints.metas()
    latest = checkpoint_name(fit.step)
    uri = checkpoints.backend.path(latest)
    if latest not in metas:
        raise StageError(
            f"training ended, but {uri!r} cannot be seen from here: --out has to be a folder that all machines share, "
            "or in an object store"
        )
    best = checkpoints.best_of(metas)
    return Outcome(fit, uri, checkpoints.backend.path(best[0]), best[1]) if best else Outcome(fit, uri, uri)
