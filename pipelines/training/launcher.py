"""`launch`: what a stage calls to train on Ray. It runs in the driver, and builds the only TorchTrainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config import DataConfig, ScaleConfig
from pipelines.running.resources import RESERVED_CPUS, check_cluster
from pipelines.running.run_folder import CHECKPOINTS
from pipelines.running.stage import Stage
from pipelines.storage.checkpoint_backend import checkpoint_backend
from pipelines.training.controller import LossReporter, MonitoredTorchConfig
from pipelines.training.driver import OnRow, Outcome, drive
from pipelines.training.exported import ExportedMetrics
from pipelines.training.failure_policy import SILENT_S
from pipelines.training.own_process import train_here
from pipelines.training.run_monitor import RunMonitor
from pipelines.training.worker import BuildLoop, RayContext, WorkerSetup, run_worker
from s5.checkpoints.history import CheckpointHistory
from s5.config import LoopConfig
from s5.training.loop import TrainingResult

# All that a stage needs of this room.
__all__ = ["BuildLoop", "OnRow", "Outcome", "RayContext", "launch", "name_cluster"]

RAY_TRAIN = "ray_train"
# Timeout of a collective, where hangs are not looked for.
NEVER_SECONDS = 10**7
# Between two looks at the workers, which is how late Ray Train sees that they have ended; its own is 2.
POLL_SECONDS = "0.5"


def launch(
    stage: Stage,
    build: BuildLoop,
    payload: Any,
    *,
    scale: ScaleConfig,
    data: DataConfig | None,
    loop: LoopConfig,
    best: tuple[str, str] | None = None,
    report: Sequence[OnRow] = (),
) -> Outcome:
    """Train to the end, with Ray Train or in this process, and return the checkpoints.

    Args:
        stage: the running stage; metrics go to its tracker and terminal.
        build: builds one worker's `TrainingLoop` from `payload` and its context; it has to pickle.
        payload: what `build` needs, such as the config and the manifest's rows.
        scale: workers.
        data: decoding, which shares the cluster's CPUs with the workers; None where nothing is decoded.
        loop: length and rhythm.
        best: name of the validation metric that picks the best checkpoint, and `max` or `min`.
        report: each is called, in turn and in the driver, with every row of metrics.

    Raises:
        UserError: workers and decoding do not fit the cluster.
        StageError: training failed; the message is the worker's, or the monitor's.
        StoppedError: a signal requested a stop, and the workers saved a checkpoint.
    """
    decode_tasks = check_cluster(scale, data)
    _set_ray_timeouts(scale)
    monitor = _start_monitor(scale)
    setup = WorkerSetup(
        build=build,
        payload=payload,
        monitor=monitor,
        scale=scale,
        data=data,
        out=stage.out,
        keep_checkpoints=loop.keep_checkpoints,
        best=best,
    )
    checkpoints = CheckpointHistory(checkpoint_backend(stage.path(CHECKPOINTS)), loop.keep_checkpoints, best)
    if stage.folder.exists(CHECKPOINTS):
        stage.load_rejects()
    decoding = f" and up to {decode_tasks} decode tasks" if data else ""
    here = scale.num_workers == 0
    stage.info(f"{'training in this process' if here else _starting(scale)}{decoding}")
    on_row: list[OnRow] = [ExportedMetrics(stage), *report]
    outcome = drive(_train(setup), monitor, stage, on_row, checkpoints, here)
    _log_throughput(stage, outcome.fit.metrics)
    return outcome


def name_cluster() -> None:
    """Give the address of this cluster to the actors that Ray Train starts for a trial of a sweep.

    The one that releases the CPUs of a trial that is stopped asks Ray where its cluster is, and ends on an error where
    another cluster runs on the machine: the next trial would wait for these CPUs forever. It stays in the environment
    of the process, so only a Ray worker calls this.
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def _set_ray_timeouts(scale: ScaleConfig) -> None:
    """Set the timeouts that Ray Train reads from the driver's environment."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(scale.start_timeout_s)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    # For a worker in which the watchdog does not run either, such as a stopped process.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(1.25 * scale.hang_timeout_s or NEVER_SECONDS)


def _start_monitor(scale: ScaleConfig) -> Any:
    """Start the run monitor on the driver's node, and return its actor handle; it ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    silent_s = min(SILENT_S, scale.hang_timeout_s / 2) or SILENT_S
    actor = ray.remote(RunMonitor).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote(scale.max_failures, silent_s)


def _starting(scale: ScaleConfig) -> str:
    least = f"{scale.min_workers} to " if scale.min_workers else ""
    sooner = "" if scale.world_size > 1 else " (--scale.num-workers 0 trains in this process, and starts sooner)"
    return f"starting {least}{scale.num_workers} training worker{'s' * (scale.num_workers > 1)}{sooner}"


def _train(setup: WorkerSetup) -> Callable[[], TrainingResult | None]:
    """Return the function that trains, in this process or by Ray Train, and returns what rank 0 does."""
    if setup.scale.num_workers == 0:
        return lambda: train_here(setup)
    trainer: Any = _trainer(setup)
    return lambda: cast(TrainingResult | None, trainer.fit().return_value)


def _trainer(setup: WorkerSetup) -> ray.train.torch.TorchTrainer:
    scale, monitor = setup.scale, setup.monitor
    workers = (scale.min_workers, scale.num_workers) if scale.min_workers else scale.num_workers
    return ray.train.torch.TorchTrainer(
        run_worker,  # type: ignore[arg-type]
        train_loop_config={"setup": setup},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]
            use_gpu=scale.gpus_per_worker > 0,
            resources_per_worker=_resources_per_worker(scale),
            elastic_resize_monitor_interval_s=scale.resize_interval_s,  # type: ignore[call-arg]
        ),
        torch_config=MonitoredTorchConfig(
            backend="nccl" if scale.gpus_per_worker > 0 else "gloo",
            # Longer than the watchdog's: the worker that hangs is found before those that wait for it give up.
            timeout_s=int(2 * scale.hang_timeout_s) or NEVER_SECONDS,
            monitor=monitor,
        ),
        run_config=ray.train.RunConfig(
            # Holds only the marker by which Ray Train checks that all nodes share --out.
            name=RAY_TRAIN,
            storage_path=setup.out,
            # The monitor counts failures: Ray Train does not tell preemption from failure as it does.
            failure_config=ray.train.FailureConfig(
                max_failures=-1,
                controller_failure_limit=max(2, scale.max_failures),  # type: ignore[call-arg]
            ),
            callbacks=[LossReporter(monitor)],  # type: ignore[list-item]
        ),
    )


def _resources_per_worker(scale: ScaleConfig) -> dict[str, float]:
    resources = {"CPU": scale.cpus_per_worker - (RESERVED_CPUS if scale.min_workers else 0)}
    return resources | {"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else resources


def _log_throughput(stage: Stage, metrics: Mapping[str, float]) -> None:
    """Log how fast the last steps were; `mfu` is the model-FLOPs utilisation."""
    if "train/step_seconds_p50" not in metrics:
        return
    mfu = metrics.get("train/mfu")
    stage.details["mfu"] = "unavailable" if mfu is None else mfu
    utilisation = "unavailable (the device's peak in this precision is not known)" if mfu is None else f"{mfu:.1%}"
    stage.info(
        f"last steps: median {metrics['train/step_seconds_p50']:.3g} s (95th percentile "
        f"{metrics['train/step_seconds_p95']:.3g} s), {metrics['train/data_wait_share']:.0%} waiting for data; per "
        f"worker: peak memory {metrics['train/memory_gib']:.1f} GiB, {metrics.get('train/model_tflops', 0):.3g} model "
        f"TFLOP/s, model-FLOPs utilisation {utilisation}"
    )
