"""Fine-tune stage: a video model on labels, from a pretrained checkpoint or from scratch, with Ray Train.

With task `distant`, the labels are soft ones of narrated segments: distant supervision, another way of pretraining.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines import storage
from pipelines.config import FinetuneConfig, flatten
from pipelines.data.clip_order import ClipOrder, order_of, with_batch_size
from pipelines.data.clip_source import ClipSource
from pipelines.data.features.batches import check_features
from pipelines.data.features.cache import with_imported
from pipelines.data.manifest import check_for_training, classes, digest, drop_too_short, read_manifest, split_of
from pipelines.data.narration.reading import NarratedSteps, read_labels
from pipelines.data.protocols import checked_clips, clips_in_words, clips_per_video, listed_count, protocol_of
from pipelines.errors import UserError
from pipelines.running.progress import ProgressBar
from pipelines.running.stage import Stage
from pipelines.storage import provenance
from pipelines.storage.weights import backbone_weights, local_checkpoint, of_backbone, with_trained_weights
from pipelines.training.launcher import OnRow, RayContext
from pipelines.training.training_stage import clip_source, model_on_worker, run_training, show_loss, training_loop
from s5.checkpoints import checkpoint
from s5.config import EvaluationProtocol
from s5.errors import CheckpointError, VideoError
from s5.evaluation import inference, metrics
from s5.models.video_model import VideoModel, check_model
from s5.tasks.distant import Distant
from s5.tasks.supervised import Supervised
from s5.training.loop import TrainingLoop

BEST = {"class": ("val/accuracy", "max"), "regression": ("val/mse", "min"), "distant": ("val/loss", "min")}
"""Metric that picks the best checkpoint of a task, and whether it is the largest or the smallest."""


@dataclass(frozen=True)
class FinetuneJob:
    """What a training worker needs: settings, labelled videos, names of classes or steps, and pretrained weights."""

    config: FinetuneConfig
    train: pa.Table
    val: pa.Table
    classes: list[str]
    narrated: NarratedSteps | None
    order: ClipOrder
    protocol: EvaluationProtocol
    inputs: dict[str, str]
    weights: dict[str, Tensor] | None
    backbone: dict[str, Tensor] | None
    commit: str

    @property
    def outputs(self) -> int:
        """Numbers that the head gives."""
        return 1 if self.config.task == "regression" else len(self.classes)


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
    job = build_job(config)
    best = BEST[config.task]
    counts = {"val_videos": len(job.val), "val_listed": listed_count(job.val, "val"), "classes": len(job.classes)}
    return run_training(
        "finetune",
        job,
        build,
        partial(announcement, job),
        partial(row_printer, job=job),
        decodes=not config.features,
        best=best if len(job.val) else None,
        counts=counts,
        parent_run=parent_run,
        on_row=on_row,
    )


def announcement(job: FinetuneJob) -> list[str]:
    """Return what is said before the start: videos, origin of the weights, model, steps, protocol."""
    config = job.config
    origin = f"from {config.checkpoint}" if job.weights else "from scratch"
    said = [
        f"{len(job.train)} of {listed_count(job.train, 'train')} listed videos, {len(job.val)} of "
        f"{listed_count(job.val, 'val')} for validation, {origin}, {config.clips.frames} frames a clip, "
        f"{config.model.decoder.name}, {job.order.total_steps} steps of {config.loop.batch_size} videos",
        f"protocol {job.protocol}; validation: "
        f"{clips_in_words(job.protocol, config.clips, clips_per_video(job.protocol))}",
    ]
    if len(job.val) == 0:
        said.append("no video in split 'val': the last epoch is retained, not the best; index --val-share makes one")
    return said


def build_job(config: FinetuneConfig) -> FinetuneJob:
    """Check everything that can be checked beforehand, and return what the workers need."""
    manifest = read_manifest(config.manifest)
    protocol = protocol_of(manifest, config.protocol)
    clips = checked_clips(config.clips, protocol)
    train = drop_too_short(split_of(manifest, "train"), clips)
    config = replace(config, loop=with_batch_size(config.loop, len(train), config.scale.world_size))
    check_for_training(manifest, clips, config.loop.batch_size, labelled=True, task=config.task)
    frame_encoder = with_imported(config.model.backbone, config.features)
    if not config.checkpoint:
        frame_encoder = with_trained_weights(frame_encoder)
    config = replace(config, model=replace(config.model, backbone=frame_encoder))
    weights = None
    inputs = {"manifest": digest(manifest)}
    narrated = read_labels(config.labels, manifest) if config.task == "distant" else None
    if narrated is not None:
        inputs["labels"] = narrated.digest
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
        inputs["features"] = check_features(
            config.features, manifest, config.clips, protocol, config.model.backbone, used
        )
    return FinetuneJob(
        config=config,
        train=train,
        val=drop_too_short(split_of(manifest, "val"), clips),
        classes=narrated.names if narrated else classes(manifest) if config.task == "class" else [],
        narrated=narrated,
        order=order_of(config.loop, len(train)),
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
    model = VideoModel(model_on_worker(config.model), job.outputs)
    if job.backbone is not None:
        model.load_backbone(job.backbone)
    if job.weights is not None:
        model.load_pretrained(job.weights)
    task = Supervised(model, config.task, config.views)
    if job.narrated is not None:
        task = Distant(model, job.narrated.labels, config.views)
    source = clip_source(job, context, protocol=job.protocol)
    evaluate = partial(validate, job, task, source, context) if len(job.val) else None
    return training_loop(
        "finetune", job, context, task, config.task, model.config, source, evaluate, job.classes, job.protocol
    )


def validate(job: FinetuneJob, task: Supervised, source: ClipSource, context: RayContext) -> dict[str, float]:
    """Return the metrics of the validation split, on every worker."""
    config = job.config
    batch_size = max(1, config.loop.batch_size // context.world_size)
    batches = source.evaluation(job.val, clips_per_video(job.protocol), batch_size)
    output = task.scores if isinstance(task, Distant) else inference.scores(task.model, config.task)
    found = inference.run_on_all(output, batches, context.device)
    if context.rank == 0:
        context.reject(found.failures)
    if not found.video_ids:
        raise VideoError(f"none of the {len(job.val)} videos of split val can be read; run index again")
    found = inference.by_video(found)
    if isinstance(task, Distant):
        loss, accuracy = found.values.mean(0).tolist()
        return {"val/accuracy": accuracy, "val/loss": loss, "val/videos": float(len(found.video_ids))}
    if config.task == "regression":
        mse = float(F.mse_loss(found.values[:, 0], found.targets))
        return {"val/mse": mse, "val/loss": mse, "val/videos": float(len(found.video_ids))}
    loss = float(F.nll_loss(found.values.clamp_min(1e-12).log(), found.labels))
    accuracy = metrics.accuracy(found.values, found.labels)
    return {"val/accuracy": accuracy, "val/loss": loss, "val/videos": float(len(found.video_ids))}


def row_printer(stage: Stage, bar: ProgressBar, job: FinetuneJob) -> OnRow:
    """Return the function that prints a row of metrics."""

    keep_ratio = next((ratio for ratio in job.config.model.decoder.selection.keep_ratio if ratio < 1), 1.0)

    def report(step: int, row: dict[str, float]) -> None:
        if "val/loss" in row:
            main = "val/accuracy" if "val/accuracy" in row else "val/mse"
            read = f"{row['val/videos']:.0f} of {listed_count(job.val, 'val')} listed videos"
            stage.info(f"step {step}: {main} {row[main]:.3f}, loss {row['val/loss']:.3f} on {read}")
        if "train/loss" not in row:
            return
        hits = f"accuracy {row['train/accuracy']:.3f}, " if "train/accuracy" in row else ""
        show_loss(stage, bar, step, job.order.total_steps, row, hits + chosen_in_words(row, keep_ratio))

    return report


def chosen_in_words(row: dict[str, float], keep_ratio: float) -> str:
    """Return how far the selection is from a random one; empty where a row has no selection with noise."""
    if "train/selection_overlap" not in row:
        return ""
    return (
        f"mask generator's entropy {row['train/selection_entropy']:.3f}, overlap of two choices "
        f"{row['train/selection_overlap']:.2f} (random {keep_ratio:.2f}), spread over frames "
        f"{row['train/selection_frame_spread']:.1f} (random 1.0), "
    )
