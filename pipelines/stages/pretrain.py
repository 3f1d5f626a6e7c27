"""Pretrain stage: LSMCL on long and short clips of unlabelled videos, with Ray Train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from pipelines import storage
from pipelines.config import PretrainConfig
from pipelines.data.clip_order import ClipOrder, order_of, with_batch_size
from pipelines.data.clip_source import ClipSource
from pipelines.data.features.batches import check_features
from pipelines.data.features.cache import with_imported
from pipelines.data.manifest import (
    check_for_training,
    digest,
    drop_too_short,
    labelled,
    read_manifest,
    split_of,
    spread,
)
from pipelines.data.protocols import listed_count
from pipelines.errors import UserError
from pipelines.running.progress import ProgressBar
from pipelines.running.stage import Stage
from pipelines.storage import provenance
from pipelines.storage.weights import backbone_weights, with_trained_weights
from pipelines.training.launcher import OnRow, RayContext
from pipelines.training.training_stage import clip_source, model_on_worker, run_training, show_loss, training_loop
from s5.evaluation import inference, linear_probe
from s5.evaluation.metrics import knn_accuracy, knn_leave_one_out
from s5.tasks.lsmcl import LSMCL, check_lsmcl
from s5.training.loop import TrainingLoop


@dataclass(frozen=True)
class PretrainJob:
    """What a training worker needs: settings, the training videos in the plan's order, and those of the probe."""

    config: PretrainConfig
    train: pa.Table
    probe_train: pa.Table
    probe_val: pa.Table
    order: ClipOrder
    inputs: dict[str, str]
    backbone: dict[str, Tensor] | None
    commit: str


def run(config: PretrainConfig, parent_run: str = "", on_row: OnRow | None = None) -> dict[str, Any]:
    """Pretrain until done and return the stage's result; the same --out resumes.

    Args:
        config: the settings.
        parent_run: MLflow run to nest this one under.
        on_row: called with the step and every row of metrics.

    Raises:
        UserError: the manifest, the settings and the cluster do not fit together; before any work.
        StageError: training failed, or was asked to stop.
    """
    job = build_job(config)

    def announce() -> list[str]:
        settings = job.config
        said = [
            f"{len(job.train)} of {listed_count(job.train, 'train')} listed videos, "
            f"{settings.clips.frames} frames a clip, masking ratio {settings.lsmcl.mask_ratio:g} on "
            f"{settings.lsmcl.mask_on}, {job.order.total_steps} steps of {settings.loop.batch_size}"
        ]
        backbone = settings.model.backbone
        if backbone.frozen:
            said.append(f"the backbone stays frozen at the weights {backbone.weights!r}; the decoder is pretrained")
        return said

    printer = partial(row_printer, job=job)
    return run_training(
        "pretrain",
        job,
        build,
        announce,
        printer,
        decodes=not config.features,
        parent_run=parent_run,
        on_row=on_row,
    )


def build_job(config: PretrainConfig) -> PretrainJob:
    """Check everything that can be checked beforehand, and return what the workers need."""
    manifest = read_manifest(config.manifest)
    train = drop_too_short(split_of(manifest, "train"), config.clips)
    config = replace(config, loop=with_batch_size(config.loop, len(train), config.scale.world_size))
    check_for_training(manifest, config.clips, config.loop.batch_size, labelled=False)
    frame_encoder = with_trained_weights(with_imported(config.model.backbone, config.features))
    config = replace(config, model=replace(config.model, backbone=frame_encoder))
    try:
        check_lsmcl(config.model, config.lsmcl)
    except ValueError as error:
        raise UserError(str(error)) from None
    val = drop_too_short(split_of(manifest, "val"), config.clips)
    probe_train, probe_val = (spread(labelled(videos), config.probe_videos) for videos in (train, val))
    check_probe(config, probe_train, probe_val)
    inputs, backbone = {"manifest": digest(manifest)}, backbone_weights(config.model.backbone)
    if config.features:
        # Workers may have another folder.
        config = replace(config, features=storage.absolute(config.features))
        inputs["features"] = check_features(
            config.features, manifest, config.clips, "uniform", config.model.backbone, backbone, pairs=True
        )
    return PretrainJob(
        config=config,
        train=train,
        probe_train=probe_train,
        probe_val=probe_val,
        order=order_of(config.loop, len(train)),
        inputs=inputs,
        backbone=backbone,
        commit=provenance.commit(),
    )


def check_probe(config: PretrainConfig, train: pa.Table, val: pa.Table) -> None:
    """Raise `UserError` where a linear probe is asked for and cannot be fitted, or measured on other videos."""
    if config.probe == "knn":
        return
    asked = f"probe is {config.probe!r}: in manifest {config.manifest!r}"
    if (present := len(train["label"].unique())) < 2:
        raise UserError(
            f"{asked} the labelled videos of split 'train' are of {present} classes, and a linear probe needs 2; label "
            "more videos, or give knn"
        )
    if len(val) == 0:
        raise UserError(
            f"{asked} split 'val', which a linear probe is measured on, has no labelled videos; `index --val-share` "
            "makes it, or give knn"
        )


def build(job: PretrainJob, context: RayContext) -> TrainingLoop:
    """Return the training loop of one worker."""
    config = job.config
    torch.manual_seed(config.loop.seed)
    task = LSMCL(model_on_worker(config.model), config.lsmcl, config.views)
    if job.backbone is not None:
        task.load_backbone(job.backbone)
    source = clip_source(job, context, pairs=True)
    probes = config.probe_videos and len(job.probe_train) > 1
    evaluate = partial(probe, job, task, source, context) if probes else None
    return training_loop("pretrain", job, context, task, "lsmcl", task.encoder.config, source, evaluate)


def probe(job: PretrainJob, task: LSMCL, source: ClipSource, context: RayContext) -> dict[str, float]:
    """Return the accuracy of the probes on the validation videos; without any, that of nearest neighbours among the
    training videos themselves."""
    output = inference.features(task.encoder)
    batch_size = max(1, job.config.loop.batch_size // context.world_size)

    def outputs(videos: pa.Table) -> inference.ClipOutputs:
        return inference.run_on_all(output, source.evaluation(videos, 1, batch_size), context.device)

    train = outputs(job.probe_train)
    if len(job.probe_val) == 0:
        if context.rank == 0:
            context.reject(train.failures)
        return {"knn/top1": knn_leave_one_out(train.values, train.labels), "knn/videos": float(len(train.labels))}
    val = outputs(job.probe_val)
    if context.rank == 0:
        context.reject(train.failures + val.failures)
    found = {}
    for name, accuracy in (("knn", knn_accuracy), ("linear", linear_probe.top1)):
        if job.config.probe in (name, "both"):
            found[f"{name}/top1"] = accuracy(train.values, train.labels, val.values, val.labels)
            found[f"{name}/videos"] = float(len(val.labels))
    return found


def row_printer(stage: Stage, bar: ProgressBar, job: PretrainJob) -> OnRow:
    """Return the function that prints a row of metrics and raises the alarm when embeddings collapse."""
    alarmed: list[int] = []

    def report(step: int, row: dict[str, float]) -> None:
        for name, called in (("knn", "kNN"), ("linear", "linear")):
            if f"{name}/top1" in row:
                reached, videos = row[f"{name}/top1"], row[f"{name}/videos"]
                stage.info(f"step {step}: {called} probe top-1 {reached:.3f} on {videos:.0f} videos")
        if "train/loss" not in row:
            return
        details = (
            f"top-1 {row['train/top1']:.3f}, similarity {row['train/similarity_positive']:.2f} / "
            f"{row['train/similarity_negative']:.2f}, spread {row['train/embedding_spread']:.2f}, "
        )
        show_loss(stage, bar, step, job.order.total_steps, row, details)
        spread, limit = row["train/embedding_spread"], job.config.lsmcl.collapse_spread
        if spread < limit and not alarmed:
            alarmed.append(step)
            stage.metrics["train/collapsed_at_step"] = step
            stage.info(
                f"ALARM: embeddings collapse (spread {spread:.3f} < lsmcl.collapse_spread {limit:g}, negatives at "
                f"{row['train/similarity_negative']:.2f}): lower optim.lr or raise the batch, warm-up or momentum"
            )

    return report
