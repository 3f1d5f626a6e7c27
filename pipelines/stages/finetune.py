"""Fine-tune stage: a video model on labels, from a pretrained checkpoint or from scratch, with Ray Train."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines import storage
from pipelines.config import FinetuneConfig, flatten
from pipelines.data import feature_batches
from pipelines.data.clip_batches import evaluation_batches, train_batches
from pipelines.data.clip_order import ClipPlan, plan_of, with_batch_size
from pipelines.data.manifest import check_for_training, classes, digest, drop_too_short, read_manifest, split_of
from pipelines.data.protocols import checked_clips, clips_per_video, listed, protocol_of, words
from pipelines.errors import UserError
from pipelines.running.resources import check_cluster
from pipelines.running.stage import Stage, finished, progress, stage_run, to_json
from pipelines.storage import provenance
from pipelines.storage.weights import backbone_weights, local_checkpoint, of_backbone
from pipelines.training.launcher import OnRow, RayContext, launch
from s5.batch import ClipBatch
from s5.checkpoints import checkpoint
from s5.checkpoints.checkpoint import Meta
from s5.config import Protocol
from s5.errors import CheckpointError, VideoError
from s5.evaluation import inference, metrics
from s5.models.video_model import VideoModel, check_model
from s5.tasks.supervised import Supervised
from s5.training.loop import TrainingInputs, TrainingLoop


@dataclass(frozen=True)
class FinetuneJob:
    """What a training worker needs: settings, labelled videos, names of the classes and pretrained weights."""

    config: FinetuneConfig
    train: pa.Table
    val: pa.Table
    classes: list[str]
    plan: ClipPlan
    protocol: Protocol
    inputs: dict[str, str]
    weights: dict[str, Tensor] | None
    backbone: dict[str, Tensor] | None
    commit: str

    @property
    def outputs(self) -> int:
        """Numbers that the head gives."""
        return len(self.classes) if self.config.task == "class" else 1


def run(config: FinetuneConfig, parent_run: str = "", on_row: OnRow | None = None) -> dict[str, Any]:
    """Fine-tune until done and return the stage's result; the same --out resumes.

    Args:
        config: the settings.
        parent_run: MLflow run to nest this one under.
        on_row: called with the step and every row of metrics.

    Raises:
        UserError: the manifest, the checkpoint, the settings and the cluster do not fit together; before any work.
        StageError: training failed, or was asked to stop.
    """
    job = prepare(config)
    config = job.config
    inputs = job.inputs
    if (result := finished("finetune", config, inputs)) is not None:
        progress("finetune", f"{config.out} is finished already; give another --out to train anew")
        return result
    best = ("val/accuracy", "max") if config.task == "class" else ("val/mse", "min")
    data = None if config.features else config.data
    check_cluster(config.scale, data)
    with stage_run("finetune", config, parent_run, inputs) as stage:
        origin = f"from {config.checkpoint}" if job.weights else "from scratch"
        stage.progress(
            f"{len(job.train)} of {listed(job.train, 'train')} listed videos, {len(job.val)} of "
            f"{listed(job.val, 'val')} for validation, {origin}, {config.clips.frames} frames a clip, "
            f"{config.model.decoder.name}, {job.plan.total_steps} steps of {config.loop.batch_size} videos"
        )
        validated = words(job.protocol, config.clips, clips_per_video(job.protocol))
        stage.progress(f"protocol {job.protocol}; validation: {validated}")
        if len(job.val) == 0:
            stage.progress("no video in split 'val': the last epoch is kept, not the best; index --val-share makes one")
        outcome = launch(
            stage,
            build,
            job,
            scale=config.scale,
            data=data,
            loop=config.loop,
            best=best if len(job.val) else None,
            report=[report_line(stage, job), *filter(None, [on_row])],
        )
        stage.metrics |= outcome.fit.metrics
        stage.metrics |= {"best/" + best[0]: outcome.best_score} if outcome.best_score is not None else {}
        stage.counts |= {"videos": len(job.train), "val_videos": len(job.val), "steps": outcome.fit.step}
        stage.counts |= {"listed": listed(job.train, "train"), "val_listed": listed(job.val, "val")}
        stage.counts |= {"classes": len(job.classes), "resumed_at": outcome.fit.started_at}
        stage.details["checkpoint"] = outcome.best
        stage.progress(f"checkpoint: {outcome.best}")
    return stage.result


def prepare(config: FinetuneConfig) -> FinetuneJob:
    """Check everything that can be checked beforehand, and return what the workers need."""
    manifest = read_manifest(config.manifest)
    protocol = protocol_of(manifest, config.protocol)
    clips = checked_clips(config.clips, protocol)
    train = drop_too_short(split_of(manifest, "train"), clips)
    config = replace(config, loop=with_batch_size(config.loop, len(train), config.scale.num_workers))
    check_for_training(manifest, clips, config.loop.batch_size, labelled=True, task=config.task)
    weights = None
    inputs = {"manifest": digest(manifest)}
    try:
        check_model(config.model)
        if config.checkpoint:
            with local_checkpoint(config.checkpoint) as folder:
                checkpoint.check_architecture(folder, flatten(config.model))
                weights = checkpoint.encoder_weights(folder)
                inputs["checkpoint"] = checkpoint.digest(folder)
    except (CheckpointError, ValueError) as error:
        raise UserError(str(error)) from None
    backbone = None if weights else backbone_weights(config.model.backbone)
    if config.features:
        # Workers may have another folder.
        config = replace(config, features=storage.absolute(config.features))
        used = of_backbone(weights) if weights else backbone
        inputs["features"] = feature_batches.check_features(
            config.features, manifest, config.clips, protocol, config.model.backbone, used
        )
    return FinetuneJob(
        config=config,
        train=train,
        val=drop_too_short(split_of(manifest, "val"), clips),
        classes=classes(manifest) if config.task == "class" else [],
        plan=plan_of(config.loop, len(train)),
        protocol=protocol,
        inputs=inputs,
        weights=weights,
        backbone=backbone,
        commit=provenance.commit(),
    )


def build(job: FinetuneJob, context: RayContext) -> TrainingLoop:
    """Return the training loop of one worker."""
    config = job.config
    torch.manual_seed(config.loop.seed)
    # Weights come with the job: the file that they were read from need not be where the worker is.
    model = VideoModel(replace(config.model, backbone=replace(config.model.backbone, weights="")), job.outputs)
    if job.backbone is not None:
        model.load_backbone(job.backbone)
    if job.weights is not None:
        model.load_pretrained(job.weights)
    task = Supervised(model, config.task)

    def meta(step: int, values: dict[str, float]) -> Meta:
        return Meta(
            kind=config.task,
            step=step,
            model=asdict(model.config),
            classes=job.classes,
            settings=to_json("finetune", config),
            metrics=values,
            commit=job.commit,
        )

    inputs = TrainingInputs(
        batches=lambda start: training_clips(job, context, start),
        steps=job.plan.total_steps,
        steps_per_epoch=job.plan.steps_per_epoch,
        optim=config.optim,
        loop=config.loop,
        meta=meta,
        evaluate=(lambda: validate(job, model, context)) if len(job.val) else None,
        max_failure_share=config.data.max_failure_share,
    )
    return TrainingLoop(task, inputs, context)


def training_clips(job: FinetuneJob, context: RayContext, start: int) -> Generator[ClipBatch]:
    """Return this worker's batches from a step on: of frames, or of cached tokens."""
    config = job.config
    read = partial(train_batches, pairs=False, data=context.fitted(config.data), decode_tasks=context.decode_tasks)
    cached = partial(feature_batches.train_batches, features=config.features, data=config.data)
    return (cached if config.features else read)(
        manifest=job.train,
        plan=job.plan,
        clips=config.clips,
        frame_size=config.model.backbone.frame_size,
        seed=config.loop.seed,
        protocol=job.protocol,
        rank=context.rank,
        world_size=context.world_size,
        start_step=start,
    )


def validation_clips(job: FinetuneJob, context: RayContext) -> Generator[ClipBatch]:
    """Return this worker's batches of the validation split: of frames, or of cached tokens."""
    config = job.config
    read = partial(evaluation_batches, data=context.fitted(config.data), decode_tasks=context.decode_tasks)
    cached = partial(feature_batches.evaluation_batches, features=config.features, data=config.data)
    return (cached if config.features else read)(
        manifest=job.val,
        clips=config.clips,
        frame_size=config.model.backbone.frame_size,
        clips_per_video=clips_per_video(job.protocol),
        batch_size=max(1, config.loop.batch_size // context.world_size),
        protocol=job.protocol,
        rank=context.rank,
        world_size=context.world_size,
    )


def validate(job: FinetuneJob, model: VideoModel, context: RayContext) -> dict[str, float]:
    """Return the metrics of the validation split, on every worker."""
    config = job.config
    found = inference.run_on_all(inference.scores(model, config.task), validation_clips(job, context), context.device)
    if context.rank == 0:
        context.reject(found.failures)
    if not found.video_ids:
        raise VideoError(f"none of the {len(job.val)} videos of split val can be read; index the videos anew")
    found = inference.by_video(found)
    if config.task == "regression":
        mse = float(F.mse_loss(found.values[:, 0], found.targets))
        return {"val/mse": mse, "val/loss": mse, "val/videos": float(len(found.video_ids))}
    loss = float(F.nll_loss(found.values.clamp_min(1e-12).log(), found.labels))
    accuracy = metrics.accuracy(found.values, found.labels)
    return {"val/accuracy": accuracy, "val/loss": loss, "val/videos": float(len(found.video_ids))}


def report_line(stage: Stage, job: FinetuneJob) -> OnRow:
    """Return the function that prints a row of metrics."""

    def report(step: int, row: dict[str, float]) -> None:
        if "val/loss" in row:
            main = "val/accuracy" if "val/accuracy" in row else "val/mse"
            read = f"{row['val/videos']:.0f} of {listed(job.val, 'val')} listed videos"
            stage.progress(f"step {step}: {main} {row[main]:.3f}, loss {row['val/loss']:.3f} on {read}")
        if "train/loss" not in row:
            return
        entropy = row.get("train/selection_entropy", math.nan)
        hits = f"accuracy {row['train/accuracy']:.3f}, " if "train/accuracy" in row else ""
        chosen = f"mask generator's entropy {entropy:.3f}, " if math.isfinite(entropy) else ""
        stage.progress(
            f"step {step}/{job.plan.total_steps} epoch {row['train/epoch']:.1f}: loss {row['train/loss']:.4f}, {hits}"
            f"{chosen}{row['train/clips_per_second']:.0f} clips/s, waiting for data {row['train/data_wait_share']:.0%}"
        )

    return report
