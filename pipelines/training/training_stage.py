"""What the training stages share: the run around `launch`, the loop of one worker, and the line that a row prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, Protocol

import pyarrow as pa

from pipelines.config import FinetuneConfig, PretrainConfig, to_json
from pipelines.data.clip_batches import DecodedClips
from pipelines.data.clip_order import ClipOrder
from pipelines.data.clip_source import ClipSource
from pipelines.data.features.batches import CachedClips
from pipelines.data.protocols import listed_count
from pipelines.data.tracked import data_set
from pipelines.running.progress import ProgressBar
from pipelines.running.resources import check_cluster
from pipelines.running.stage import Stage, finished, stage_run
from pipelines.training.launcher import BuildLoop, OnRow, RayContext, launch
from s5.checkpoints.checkpoint import Kind, Meta
from s5.config import EvaluationProtocol, ModelConfig
from s5.tasks.lsmcl import LSMCL
from s5.tasks.supervised import Supervised
from s5.training.loop import TrainingInputs, TrainingLoop


class TrainingJob(Protocol):
    """What the workers of a training stage need; it travels to them as it is."""

    @property
    def config(self) -> Any:
        """Settings of the stage: `PretrainConfig` or `FinetuneConfig`."""

    @property
    def train(self) -> pa.Table:
        """The training videos, which the order's indices mean."""

    @property
    def order(self) -> ClipOrder:
        """The order of training."""

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of what the stage reads."""

    @property
    def commit(self) -> str:
        """Commit of the code."""


def run_training(
    name: str,
    job: TrainingJob,
    build: BuildLoop,
    announce: Callable[[], Sequence[str]],
    printer: Callable[[Stage, ProgressBar], OnRow],
    *,
    decodes: bool = True,
    best: tuple[str, str] | None = None,
    counts: dict[str, int] | None = None,
    parent_run: str = "",
    on_row: OnRow | None = None,
) -> dict[str, Any]:
    """Train until done and return the stage's result; the same --out resumes, and a finished one is left as it is.

    Args:
        name: the stage.
        job: what the workers need.
        build: builds one worker's loop from the job and its context.
        announce: returns what is said before the start.
        printer: returns the function that prints a row and moves the bar.
        decodes: whether videos are decoded, beside the workers.
        best: name of the validation metric that picks the best checkpoint, and `max` or `min`.
        counts: further counts for the result.
        parent_run: MLflow run to nest this one under.
        on_row: called with the step and every row of metrics.

    Raises:
        UserError: --out holds another run, or workers and decoding do not fit the cluster.
        StageError: training failed, or was asked to stop.
    """
    config: PretrainConfig | FinetuneConfig = job.config
    if (result := finished(name, config, job.inputs, redo="train again")) is not None:
        return result
    data = config.data if decodes else None
    check_cluster(config.scale, data)
    videos = data_set(job.train, config.manifest, job.inputs["manifest"], "train")
    with stage_run(name, config, parent_run, job.inputs, datasets=[videos]) as stage:
        for sentence in (*announce(), *scaled_rate(config)):
            stage.info(sentence)
        with stage.progress_bar("trained", job.order.total_steps, "steps") as bar:
            outcome = launch(
                stage,
                build,
                job,
                scale=config.scale,
                data=data,
                loop=config.loop,
                best=best,
                report=[printer(stage, bar), *filter(None, [on_row])],
            )
        stage.metrics |= outcome.fit.metrics
        stage.earlier_seconds = outcome.fit.earlier_seconds
        if best is not None and outcome.best_score is not None:
            stage.metrics |= {f"best/{best[0]}": outcome.best_score}
        stage.counts |= {
            "videos": len(job.train),
            "listed": listed_count(job.train, "train"),
            "steps": outcome.fit.step,
        }
        stage.counts |= {"resumed_at": outcome.fit.started_at} | (counts or {})
        stage.details["checkpoint"] = outcome.best
        stage.info(f"checkpoint: {outcome.best}")
    return stage.result


def scaled_rate(config: PretrainConfig | FinetuneConfig) -> list[str]:
    """Return the sentence that says which learning rate results from the batch; none where it is `optim.lr` itself."""
    optim, batch_size = config.optim, config.loop.batch_size
    if not optim.lr_batch:
        return []
    return [f"peak learning rate {optim.peak_lr(batch_size):g}: optim.lr {optim.lr:g} x {batch_size}/{optim.lr_batch}"]


def model_on_worker(config: ModelConfig) -> ModelConfig:
    """Return the settings that a worker builds its model from.

    The weights come with the job: the file that they were read from need not be where the worker is.
    """
    return replace(config, backbone=replace(config.backbone, weights=""))


def clip_source(
    job: TrainingJob, context: RayContext, *, pairs: bool = False, protocol: EvaluationProtocol = "uniform"
) -> ClipSource:
    """Return one worker's clips: decoded, or cached tokens where the settings name any.

    Args:
        job: what the worker was given.
        context: its surroundings.
        pairs: a short clip comes beside each long one in training.
        protocol: which clips of a video, but for pairs.
    """
    config: PretrainConfig | FinetuneConfig = job.config
    frame_size, rank, world_size = config.model.backbone.frame_size, context.rank, context.world_size
    if config.features:
        return CachedClips(
            features=config.features,
            clips=config.clips,
            frame_size=frame_size,
            data=config.data,
            protocol=protocol,
            pairs=pairs,
            rank=rank,
            world_size=world_size,
        )
    return DecodedClips(
        clips=config.clips,
        frame_size=frame_size,
        data=context.fitted(config.data),
        decode_tasks=context.decode_tasks,
        protocol=protocol,
        pairs=pairs,
        views=config.views,
        rank=rank,
        world_size=world_size,
    )


def training_loop(
    stage: str,
    job: TrainingJob,
    context: RayContext,
    task: LSMCL | Supervised,
    kind: Kind,
    model: ModelConfig,
    source: ClipSource,
    evaluate: Callable[[], dict[str, float]] | None,
    classes: list[str] | None = None,
    protocol: EvaluationProtocol | Literal[""] = "",
) -> TrainingLoop:
    """Return the training loop of one worker.

    Args:
        stage: its name, for run.json's settings in the checkpoint.
        job: what the worker was given.
        context: its surroundings.
        task: what is trained.
        kind: of the checkpoint.
        model: settings of the model, for the checkpoint.
        source: this worker's clips.
        evaluate: returns the metrics of an evaluation, on every worker; None for none.
        classes: names of the classes, for the checkpoint.
        protocol: which clips of a video, for the checkpoint.
    """
    config: PretrainConfig | FinetuneConfig = job.config

    def meta(step: int, metrics: dict[str, float]) -> Meta:
        return Meta(
            kind=kind,
            step=step,
            model=asdict(model),
            classes=classes or [],
            settings=to_json(stage, config),
            protocol=protocol,
            metrics=metrics,
            commit=job.commit,
        )

    inputs = TrainingInputs(
        batches=lambda start: source.training(job.train, job.order, config.loop.seed, start),
        steps=job.order.total_steps,
        steps_per_epoch=job.order.steps_per_epoch,
        optim=config.optim,
        loop=config.loop,
        meta=meta,
        evaluate=evaluate,
        max_failure_share=config.data.max_failure_share,
    )
    return TrainingLoop(task, inputs, context)


def show_loss(stage: Stage, bar: ProgressBar, step: int, total_steps: int, row: dict[str, float], details: str) -> None:
    """Show a training row: its loss in the bar, or a line of its step, loss, the task's own details, and speed.

    The line of the last step is printed in both cases.
    """
    bar.move_to(step, f"loss {row['train/loss']:.4f}, {row['train/clips_per_second']:.0f} clips/s")
    if not bar.visible or step == total_steps:
        stage.info(
            f"step {step}/{total_steps} epoch {row['train/epoch']:.1f}: loss {row['train/loss']:.4f}, {details}"
            f"{row['train/clips_per_second']:.0f} clips/s, waiting for data {row['train/data_wait_share']:.0%}"
        )
