"""Ray Train around the training loop: the context of a worker, and the only TorchTrainer.

Nothing here knows what is trained: a stage hands in a function that builds the `TrainingLoop` of one worker.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution.context import get_train_context
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from pipelines import storage
from pipelines.config import DataConfig, ScaleConfig
from pipelines.errors import StageError, StoppedError, UserError
from pipelines.running.resources import SLIVER, check_cluster, shared_out
from pipelines.running.stage import CHECKPOINTS, Stage, in_thread, signals_received
from pipelines.storage.checkpoint_backend import checkpoint_backend
from pipelines.training.heartbeat import Lifeline, last_line, loss_of, prepare
from pipelines.training.run_monitor import SILENT_S, Mailbox
from s5.checkpoints.history import CheckpointHistory, checkpoint_name
from s5.config import LoopConfig
from s5.errors import CheckpointError, Failure, NotFiniteError, TrainingError, VideoError
from s5.training.loop import TrainingLoop, TrainingResult

ERROR = "error.txt"
RAY_TRAIN = "ray_train"
NOT_FINITE = "not_finite.json"
STACKS = "stacks.txt"
POLL_SECONDS = 0.25
# Time for the worker that a failed one has waited for to be missed: each is heard of twice a second.
MISSED_SECONDS = 3.0
# Of a collective, where hangs are not looked for.
NEVER_SECONDS = 10**7
# Errors that come back the same however often the workers are restarted.
LASTING = (TrainingError, CheckpointError, VideoError, UserError, ValueError, FloatingPointError)


class MovedError(Exception):
    """The workers have saved and ended, since one of them had to; the run goes on elsewhere."""


class RayContext:
    """`s5.training.context.WorkerContext` inside a Ray Train worker."""

    # The lifeline knows the answer already: the grace time of a stop may be no more than three seconds.
    poll_seconds = 0.0

    def __init__(
        self, mailbox: Any, scale: ScaleConfig, data: DataConfig | None, out: str, checkpoints: CheckpointHistory
    ) -> None:
        train = ray.train.get_context()
        self.rank = train.get_world_rank()
        self.world_size = train.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.decode_tasks, self._cpus_per_decode = shared_out(scale, data, self.world_size) if data else (1, 1.0)
        self.lifeline = Lifeline(mailbox, self.rank, scale.hang_timeout_s)
        self._mailbox = mailbox
        self._out = out
        self.checkpoints: CheckpointHistory | None = checkpoints

    def fitted(self, data: DataConfig) -> DataConfig:
        """Return the settings of decoding for the CPUs that these workers leave free."""
        return replace(data, cpus_per_decode=self._cpus_per_decode)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module under DDP; running statistics are already the same on all workers."""
        if self.world_size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send a row to the driver without waiting for it."""
        self._mailbox.put.remote(dict(metrics), step)

    def reject(self, failures: list[Failure]) -> None:
        """Send videos that could not be read to the driver."""
        self._mailbox.reject.remote(failures)

    def notify(self, message: str) -> None:
        """Send the driver a sentence for the user."""
        self._mailbox.tell.remote(message)

    def saved(self, step: int) -> None:
        """Let the mailbox know from where workers that start anew would go on."""
        self._mailbox.at.remote(step)

    def store_file(self, file: Path, name: str) -> None:
        """Store a file below --out."""
        storage.write_bytes(storage.join(self._out, name), file.read_bytes())

    def stop_requested(self) -> bool:
        """Return whether the driver wants a stop, or this worker has to end."""
        # Ray's notice of nodes that are taken away. The public get_preemption_info has all workers wait for each other.
        notice = get_train_context().preemption_context.preemption_info
        return self.lifeline.stop_requested(leaving=notice is not None and self.rank in notice.preempted_ranks)

    def beat(self, phase: str) -> None:
        """Take note of what comes next."""
        self.lifeline.beat(phase)


@dataclass(frozen=True)
class Outcome:
    """What a training run left behind."""

    fit: TrainingResult
    latest: str
    """Path or URI of the last checkpoint."""
    best: str
    """Path or URI of the best one by the validation metric, the last one where there is none."""
    best_score: float | None = None
    """That metric's value at the best checkpoint."""


BuildFit = Callable[[Any, RayContext], TrainingLoop]
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
        build: makes one worker's `TrainingLoop` from `payload` and its context; it has to pickle.
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
    _set_times(scale)
    mailbox = _mailbox(scale)
    workers = (scale.min_workers, scale.num_workers) if scale.min_workers else scale.num_workers
    trainer = ray.train.torch.TorchTrainer(
        _work,  # type: ignore[arg-type]
        train_loop_config={
            "build": build,
            "payload": payload,
            "mailbox": mailbox,
            "scale": scale,
            "data": data,
            "out": stage.out,
            "keep": loop.keep_checkpoints,
            "best": best,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]
            use_gpu=scale.gpus_per_worker > 0,
            resources_per_worker=_resources(scale),
            elastic_resize_monitor_interval_s=scale.resize_interval_s,  # type: ignore[call-arg]
        ),
        torch_config=_TorchConfig(
            backend="nccl" if scale.gpus_per_worker > 0 else "gloo",
            # The worker that hangs is to be named before those that wait for it give up.
            timeout_s=int(2 * scale.hang_timeout_s) or NEVER_SECONDS,
            mailbox=mailbox,
        ),
        run_config=ray.train.RunConfig(
            # Holds nothing but the mark by which Ray Train sees that all nodes share --out.
            name=RAY_TRAIN,
            storage_path=stage.out,
            # Failures are counted by the mailbox, which knows a lost node and a worker told to end from a failure.
            failure_config=ray.train.FailureConfig(
                max_failures=-1,
                controller_failure_limit=max(2, scale.max_failures),  # type: ignore[call-arg]
            ),
            callbacks=[_Overseer(mailbox)],  # type: ignore[list-item]
        ),
    )
    checkpoints = CheckpointHistory(checkpoint_backend(stage.path(CHECKPOINTS)), loop.keep_checkpoints, best)
    if storage.exists(stage.path(CHECKPOINTS)):
        stage.recall_rejects()
    decoding = f" and up to {tasks} decode tasks" if data else ""
    least = f"{scale.min_workers} to " if scale.min_workers else ""
    stage.progress(f"starting {least}{scale.num_workers} training worker{'s' * (scale.num_workers > 1)}{decoding}")
    result = _drive(trainer, mailbox, stage, report)
    outcome = _outcome(result, ray.get(mailbox.failure.remote()), checkpoints)
    _tell_pace(stage, outcome.fit.metrics)
    return outcome


def _tell_pace(stage: Stage, metrics: Mapping[str, float]) -> None:
    """Tell how fast the last steps were; `mfu` is the model-FLOPs utilisation."""
    if "train/step_seconds_p50" not in metrics:
        return
    known = metrics.get("train/mfu")
    stage.details["mfu"] = "unavailable" if known is None else known
    used = "unavailable, as the device's peak in this precision is not known" if known is None else f"{known:.1%}"
    stage.progress(
        f"last steps: {metrics['train/step_seconds_p50']:.3g} s (95 %: {metrics['train/step_seconds_p95']:.3g} s), "
        f"{metrics['train/data_wait_share']:.0%} waiting for data; a worker: {metrics['train/memory_gib']:.1f} GiB at "
        f"most, {metrics.get('train/model_tflops', 0):.3g} model TFLOP/s, utilisation {used}"
    )


def _work(config: dict[str, Any]) -> TrainingResult | None:
    """Run in every worker: build the loop and run it; an error that would come back is noted instead of retried."""
    mailbox = config["mailbox"]
    if ray.get(mailbox.failure.remote()):
        return None
    checkpoints = CheckpointHistory(
        checkpoint_backend(storage.join(config["out"], CHECKPOINTS)), config["keep"], config["best"]
    )
    context = RayContext(mailbox, config["scale"], config["data"], config["out"], checkpoints)
    try:
        with context.lifeline.held():
            fit: TrainingLoop = config["build"](config["payload"], context)
            result = fit.run()
    except NotFiniteError as error:
        path = storage.join(config["out"], NOT_FINITE)
        if context.rank == 0:
            storage.write_json(path, [step._asdict() for step in error.skipped])
        ray.get(mailbox.fail.remote(f"{error}; the videos of all these steps are in {path}"))
        raise
    except LASTING as error:
        ray.get(mailbox.fail.remote(str(error)))
        raise
    if result.stopped and not ray.get(mailbox.stop_requested.remote()):
        raise MovedError
    return result


@dataclass
class _TorchConfig(ray.train.torch.TorchConfig):
    """Settings of the process group, and the mailbox that hears of each group of workers."""

    mailbox: Any = None

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(ray.train.torch.TorchConfig().backend_cls):  # type: ignore[misc]
    """Sets up each new group of workers, from within Ray Train's controller."""

    def on_start(self, worker_group: Any, backend_config: _TorchConfig) -> None:
        group = uuid.uuid4().hex
        ray.get(backend_config.mailbox.begin.remote(group, len(worker_group)))
        # Runs in the main thread of each worker, as signal handlers need.
        worker_group.execute(prepare, group)
        super().on_start(worker_group, backend_config)


class _Overseer(ray.train.UserCallback):
    """Tells the mailbox of lost workers, from within Ray Train's controller, and ends the run where it says so."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        losses = {rank: loss_of(error) for rank, error in worker_exceptions.items()}
        if all(loss.kind == "raised" for loss in losses.values()):
            time.sleep(MISSED_SECONDS)
        if not ray.get(self._mailbox.lost.remote(losses)):
            raise StageError("the workers do not start again")


def _set_times(scale: ScaleConfig) -> None:
    """Set what Ray Train takes from the driver's environment."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(scale.start_timeout_s)
    # For a worker whose watchdog does not run either, such as a stopped process.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(1.25 * scale.hang_timeout_s or NEVER_SECONDS)


def _mailbox(scale: ScaleConfig) -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    silent = min(SILENT_S, scale.hang_timeout_s / 2) or SILENT_S
    return ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote(scale.max_failures, silent)


def _resources(scale: ScaleConfig) -> dict[str, float]:
    resources = {"CPU": scale.cpus_per_worker - (SLIVER if scale.min_workers else 0)}
    return resources | {"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else resources


def _drive(
    trainer: ray.train.torch.TorchTrainer,
    mailbox: Any,
    stage: Stage,
    report: Sequence[OnRow],
) -> Any:
    """Run the trainer in a thread; the main thread takes rows, and signals, on which `fit` itself would abort."""
    asked = False
    with signals_received(stage, "saving a checkpoint first") as received:
        fit = in_thread(trainer.fit)
        while not fit.done():
            wait([fit], POLL_SECONDS)
            if received and not asked:
                asked = True
                mailbox.request_stop.remote()
            _pass_on(mailbox, stage, report)
        _pass_on(mailbox, stage, report)
    error = fit.exception()
    if error is not None:
        failure = ray.get(mailbox.failure.remote())
        if not failure:
            storage.write_bytes(stage.path(ERROR), f"{error}\n".encode())
            raise StageError(f"training failed: {_cause(error)}; all of it is in {stage.path(ERROR)}") from error
        raise StageError(failure)
    result: Any = fit.result()
    fit_result: TrainingResult | None = result.return_value
    if received and fit_result is not None and fit_result.stopped:
        raise StoppedError(
            f"stopped at step {fit_result.step} as asked; the checkpoint is kept, and the same command resumes",
            128 + received[0],
        )
    return result


def _pass_on(mailbox: Any, stage: Stage, report: Sequence[OnRow]) -> None:
    mail = ray.get(mailbox.take.remote())
    for step, row in mail.rows:
        stage.tracker.log(row, step=step)
        if skipped := row.get("train/skipped_steps"):
            stage.progress(
                f"WARNING: {skipped:.0f} step(s) skipped up to step {step}: loss or gradient not finite; more than "
                "loop.max_skipped in a row end the run"
            )
        for tell in report:
            tell(step, row)
    if mail.rejects:
        stage.reject(mail.rejects)
    if mail.stacks:
        path = stage.path(STACKS)
        earlier = [storage.read_bytes(path).decode()] if storage.exists(path) else []
        storage.write_bytes(path, "\n\n".join([*earlier, *mail.stacks]).encode())
    for line in mail.lines:
        stage.progress(line)


def _cause(error: BaseException) -> str:
    """Return the last line of what went wrong in a worker."""
    failures = getattr(error, "worker_failures", None)
    return last_line(next(iter(failures.values())) if failures else error)


def _outcome(result: Any, failure: str, checkpoints: CheckpointHistory) -> Outcome:
    if failure or result.return_value is None:
        raise StageError(failure or "training ended without a result")
    fit: TrainingResult = result.return_value
    metas = checkpoints.metas()
    latest = checkpoint_name(fit.step)
    if latest not in metas:
        raise StageError(
            f"training ended, but {checkpoints.backend.path(latest)!r} cannot be seen from here: --out has to be a "
            "folder that all machines share, or in an object store"
        )
    uri = checkpoints.backend.path(latest)
    best = checkpoints.best_of(metas)
    return Outcome(fit, uri, checkpoints.backend.path(best[0]), best[1]) if best else Outcome(fit, uri, uri)
