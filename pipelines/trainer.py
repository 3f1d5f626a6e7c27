"""Ray Train around the training loop: the context of a worker, and the only TorchTrainer.

Nothing here knows what is trained: a stage hands in a function that builds the `Fit` of one worker.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from pipelines import storage
from pipelines.cluster import check_cluster
from pipelines.config import DataConfig, ScaleConfig, UserError
from pipelines.mailbox import Mailbox
from pipelines.stage import CHECKPOINTS, Stage, StageError, StoppedError, signals_received
from s5.checkpoint import CheckpointError
from s5.config import LoopConfig
from s5.context import NotFiniteError, TrainingError
from s5.loop import Fit, FitResult
from s5.video import Failure, VideoError

ERROR = "error.txt"
NOT_FINITE = "not_finite.json"
POLL_SECONDS = 0.5
# Errors that come back the same however often the workers are restarted.
LASTING = (TrainingError, CheckpointError, VideoError, UserError, ValueError, FloatingPointError)


class RayContext:
    """`s5.loop.WorkerContext` inside a Ray Train worker."""

    def __init__(self, mailbox: Any, decode_tasks: int, out: str) -> None:
        train = ray.train.get_context()
        self.rank = train.get_world_rank()
        self.world_size = train.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.decode_tasks = max(1, decode_tasks // self.world_size)
        self._mailbox = mailbox
        self._out = out

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module under DDP; running statistics are already the same on all workers."""
        if self.world_size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send a row to the driver without waiting for it."""
        self._mailbox.put.remote(dict(metrics), step)

    def reject(self, failures: list[Failure]) -> None:
        """Send videos that could not be read to the driver."""
        self._mailbox.reject.remote(failures)

    def save(self, folder: Path | None, metrics: Mapping[str, float]) -> None:
        """Store a checkpoint; waits until it is on storage."""
        checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
        ray.train.report(dict(metrics), checkpoint=checkpoint)

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """Give the checkpoint that Ray Train hands on, if any, as a local folder."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def keep_file(self, file: Path, name: str) -> None:
        """Store a file below --out."""
        storage.write_bytes(storage.join(self._out, name), file.read_bytes())

    def stop_requested(self) -> bool:
        """Ask the driver's mailbox; rank 0 alone, the loop tells the others."""
        return self.rank == 0 and bool(ray.get(self._mailbox.stop_requested.remote()))

    def beat(self, phase: str) -> None:
        """Do nothing yet."""


@dataclass(frozen=True)
class Outcome:
    """What a training run left behind."""

    fit: FitResult
    latest: str
    """Path or URI of the last checkpoint."""
    best: str
    """Path or URI of the best one by the validation metric, the last one where there is none."""
    best_score: float | None = None
    """That metric's value at the best checkpoint."""


BuildFit = Callable[[Any, RayContext], Fit]
OnRow = Callable[[int, dict[str, float]], None]


def launch(
    stage: Stage,
    build: BuildFit,
    payload: Any,
    *,
    scale: ScaleConfig,
    data: DataConfig | None,
    loop: LoopConfig,
    best: tuple[str, str] | None = None,
    report: Sequence[OnRow] = (),
) -> Outcome:
    """Train with Ray Train until done, and return the checkpoints.

    Args:
        stage: the running stage; metrics go to its tracker and terminal.
        build: makes one worker's `Fit` from `payload` and its context; it has to pickle.
        payload: what `build` needs, such as the config and the manifest's rows.
        scale: workers.
        data: decoding, which shares the cluster's CPUs with the workers; None where nothing is decoded.
        loop: length and rhythm.
        best: name of the validation metric that picks the best checkpoint, and `max` or `min`.
        report: called in turn on the driver with every row of metrics.

    Raises:
        UserError: workers and decoding do not fit the cluster.
        StageError: training failed; the message is the worker's.
        StoppedError: a signal asked for a stop; the checkpoint is there.
    """
    tasks = check_cluster(scale, data)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(scale.start_timeout_s)
    mailbox = _mailbox()
    trainer = ray.train.torch.TorchTrainer(
        _work,  # type: ignore[arg-type]
        train_loop_config={
            "build": build,
            "payload": payload,
            "mailbox": mailbox,
            "decode_tasks": tasks,
            "out": stage.out,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=scale.num_workers,
            use_gpu=scale.gpus_per_worker > 0,
            resources_per_worker=_resources(scale),
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if scale.gpus_per_worker > 0 else "gloo"),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=stage.out,
            failure_config=ray.train.FailureConfig(
                max_failures=scale.max_failures,
                controller_failure_limit=2,  # type: ignore[call-arg]
            ),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=loop.keep_checkpoints,
                checkpoint_score_attribute=best[0] if best else None,
                checkpoint_score_order=best[1] if best else "max",
            ),
        ),
    )
    if storage.exists(stage.path(CHECKPOINTS)):
        stage.recall_rejects()
        stage.progress("resuming from the last checkpoint")
    decoding = f" and up to {tasks} decode tasks" if data else ""
    stage.progress(f"starting {scale.num_workers} training worker{'s' * (scale.num_workers > 1)}{decoding}")
    result = _drive(trainer, mailbox, stage, report)
    return _outcome(result, ray.get(mailbox.failure.remote()), best)


def _work(config: dict[str, Any]) -> FitResult | None:
    """Run in every worker: build the loop and run it; an error that would come back is noted instead of retried."""
    mailbox = config["mailbox"]
    if ray.get(mailbox.failure.remote()):
        return None
    context = RayContext(mailbox, config["decode_tasks"], config["out"])
    try:
        return config["build"](config["payload"], context).run()  # type: ignore[no-any-return]
    except NotFiniteError as error:
        path = storage.join(config["out"], NOT_FINITE)
        if context.rank == 0:
            storage.write_json(path, [step._asdict() for step in error.skipped])
        ray.get(mailbox.fail.remote(f"{error}; the videos of all these steps are in {path}"))
        raise
    except LASTING as error:
        ray.get(mailbox.fail.remote(str(error)))
        raise


def _mailbox() -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()


def _resources(scale: ScaleConfig) -> dict[str, float]:
    resources = {"CPU": scale.cpus_per_worker}
    return resources | {"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else resources


def _drive(
    trainer: ray.train.torch.TorchTrainer,
    mailbox: Any,
    stage: Stage,
    report: Sequence[OnRow],
) -> Any:
    """Run the trainer in a thread; the main thread takes rows, and signals, on which `fit` itself would abort."""
    ended: list[Any] = []

    def fit() -> None:
        try:
            ended.append(trainer.fit())
        except Exception as error:  # noqa: BLE001  handed to the caller below, whatever it is
            ended.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    asked = False
    with signals_received(stage, "saving a checkpoint first") as received:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if received and not asked:
                asked = True
                mailbox.request_stop.remote()
            _pass_on(mailbox, stage, report)
        _pass_on(mailbox, stage, report)
    outcome = ended[0]
    if isinstance(outcome, Exception):
        failure = ray.get(mailbox.failure.remote())
        if not failure:
            storage.write_bytes(stage.path(ERROR), f"{outcome}\n".encode())
            raise StageError(f"training failed: {_cause(outcome)}; all of it is in {stage.path(ERROR)}") from outcome
        raise StageError(failure)
    fit_result: FitResult | None = outcome.return_value
    if received and fit_result is not None and fit_result.stopped:
        raise StoppedError(
            f"stopped at step {fit_result.step} as asked; the checkpoint is kept, and the same command resumes",
            128 + received[0],
        )
    return outcome


def _pass_on(mailbox: Any, stage: Stage, report: Sequence[OnRow]) -> None:
    rows, rejects = ray.get(mailbox.take.remote())
    for step, row in rows:
        stage.tracker.log(row, step=step)
        for tell in report:
            tell(step, row)
    if rejects:
        stage.reject(rejects)


def _cause(error: BaseException) -> str:
    """Return the last line of what went wrong in a worker."""
    failures = getattr(error, "worker_failures", None)
    text = str(next(iter(failures.values()))) if failures else str(error)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _outcome(result: Any, failure: str, best: tuple[str, str] | None) -> Outcome:
    if failure or result.return_value is None:
        raise StageError(failure or "training ended without a result")
    if result.checkpoint is None:
        raise StageError("training ended without a checkpoint")
    latest = checkpoint_uri(result.checkpoint)
    scored = [(m[best[0]], c) for c, m in result.best_checkpoints or [] if best and best[0] in m]
    if not best or not scored:
        return Outcome(result.return_value, latest, latest)
    score, chosen = (max if best[1] == "max" else min)(scored, key=lambda item: item[0])
    return Outcome(result.return_value, latest, checkpoint_uri(chosen), score)


def checkpoint_uri(checkpoint: ray.train.Checkpoint) -> str:
    """Return the path or URI of a checkpoint."""
    scheme = checkpoint.filesystem.type_name if checkpoint.filesystem else "local"
    return checkpoint.path if scheme == "local" else f"{scheme}://{checkpoint.path}"
