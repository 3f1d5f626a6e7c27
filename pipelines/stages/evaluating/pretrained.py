"""What `evaluate` says of a pretrained encoder: probes by labels, retrieval, and a picture of nearest clips.

Shapes: N clips.
"""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pipelines import storage
from pipelines.config import EvaluateConfig
from pipelines.data.manifest import drop_too_short, labelled, split_of, spread
from pipelines.data.narration.labels import LABELS_FILE
from pipelines.data.narration.reading import NarratedSteps, read_labels
from pipelines.errors import StageError, UserError
from pipelines.plots.neighbours import NEIGHBOURS, Neighbours, draw_neighbours
from pipelines.running.stage import Stage
from s5.checkpoints.checkpoint import Meta
from s5.config import ClipConfig
from s5.evaluation import inference, linear_probe, metrics
from s5.evaluation.inference import ClipOutputs
from s5.evaluation.neighbours import nearest
from s5.tasks.distant import step_divergence

SHOWN_QUERIES = 8
"""Rows of the picture of nearest clips."""
SEGMENTS_AT_ONCE = 1024
"""Segments whose scores of all steps are in memory at once."""
PICTURED_CLIPS = 4096
"""Clips that the picture is chosen among: their frames are in memory at once."""


def training_videos(
    manifest: pa.Table, config: EvaluateConfig, meta: Meta, videos: pa.Table, clips: ClipConfig
) -> pa.Table:
    """Return the labelled training videos that a probe learns from; none where nothing can be probed.

    Args:
        manifest: all videos.
        config: the settings.
        meta: of the checkpoint.
        videos: the videos that are evaluated.
        clips: clips that training videos must be long enough for.

    Raises:
        UserError: a linear probe is asked for where there can be none; gives the reason.
    """
    train = labelled(split_of(manifest, "train"))
    if config.probe != "knn":
        _check_linear(config, meta, videos, train)
    if not meta.pretrained or config.split == "train" or len(labelled(videos)) == 0:
        return train.slice(0, 0)
    train = drop_too_short(train, clips)
    return spread(train, config.train_videos or len(train))


def _check_linear(config: EvaluateConfig, meta: Meta, videos: pa.Table, train: pa.Table) -> None:
    asked = f"probe is {config.probe!r}: "
    if not meta.pretrained:
        raise UserError(f"{asked}the checkpoint is of a fine-tuned model, which has a head; leave the probe out")
    if config.split == "train":
        raise UserError(f"{asked}it learns from split 'train' and cannot be tested on it; give another split")
    for name, rows in (("train", train), (config.split, labelled(videos))):
        if len(rows) == 0:
            raise UserError(
                f"{asked}split {name!r} of manifest {config.manifest!r} has no videos with a label; give `index` "
                "labels, or the probe knn, which says without them how often the nearest clip is of the same video"
            )
    if len(present := train["label"].unique()) < 2:
        raise UserError(
            f"{asked}all {len(train)} labelled videos of split 'train' are of one class (label {present[0].as_py()}); "
            "give a manifest with at least 2 classes"
        )


def pictured_videos(config: EvaluateConfig, meta: Meta, videos: pa.Table, per_video: int) -> frozenset[str]:
    """Return the videos whose clips the picture of nearest clips is chosen among: the first by their ids."""
    if not meta.pretrained or config.features:
        return frozenset()
    return frozenset(sorted(videos["video_id"].to_pylist())[: max(1, PICTURED_CLIPS // per_video)])


def narrated_steps(config: EvaluateConfig, meta: Meta, videos: pa.Table) -> NarratedSteps | None:
    """Return the soft labels that predicted steps are compared with: --labels, or those beside the manifest.

    Raises:
        UserError: the checkpoint predicts no steps, or other ones, or a segment has no label.
    """
    if meta.kind != "distant":
        if config.labels:
            raise UserError(
                f"labels is {config.labels!r}: a checkpoint of task {meta.kind} predicts no steps; leave it out"
            )
        return None
    beside = config.manifest if storage.is_folder(config.manifest) else os.path.dirname(config.manifest) or "."
    if not config.labels and not storage.exists(storage.join(beside, LABELS_FILE)):
        return None
    known = read_labels(config.labels or beside, videos)
    if known.names != meta.classes:
        raise UserError(
            f"labels is {config.labels or beside!r}: its {len(known.names)} steps are not the {len(meta.classes)} that "
            "the checkpoint has learnt; give labels made from the same steps"
        )
    return known


def steps(stage: Stage, split: str, head: nn.Module, found: ClipOutputs, known: NarratedSteps) -> None:
    """Measure how far predicted steps are from soft labels, by the mean of the features of each segment's clips."""
    segments = inference.by_video(found)
    divergence = hits = 0.0
    for first in range(0, len(segments.video_ids), SEGMENTS_AT_ONCE):
        steps_BK, probabilities_BK = known.labels.of(segments.video_ids[first : first + SEGMENTS_AT_ONCE])
        with torch.no_grad():
            logits_BS = head(segments.values[first : first + SEGMENTS_AT_ONCE])
        divergence += float(step_divergence(logits_BS, steps_BK, probabilities_BK).sum())
        hits += float((logits_BS.argmax(1) == steps_BK[:, 0]).sum())
    count = len(segments.video_ids)
    stage.metrics |= {f"{split}/accuracy": hits / count, f"{split}/loss": divergence / count}
    stage.info(
        f"{split}: the predicted step is the label's likeliest of {hits / count:.3f} of {count} segments, divergence "
        f"{divergence / count:.3f}"
    )


def report(stage: Stage, config: EvaluateConfig, found: ClipOutputs, train: ClipOutputs | None) -> None:
    """Write what probes find, how often a clip's nearest one is of the same video, and the picture.

    Raises:
        StageError: the training videos that could be read are too few for the probe.
    """
    retrieval(stage, found)
    if train is not None and bool((found.labels >= 0).any()):
        known = [i for i, label in enumerate(found.labels.tolist()) if label >= 0]
        names = [found.video_ids[i] for i in known]
        queries = ClipOutputs(names, found.values[known], found.labels[known], found.targets[known], [])
        if config.probe in ("knn", "both"):
            knn(stage, queries, train)
        if config.probe in ("linear", "both"):
            linear(stage, queries, train)
    pictured = [i for i, thumbnail in enumerate(found.thumbnails) if thumbnail is not None]
    if pictured:
        picture(stage, config.neighbours, found, pictured)


def retrieval(stage: Stage, found: ClipOutputs) -> None:
    """Measure how often a clip's nearest one is of the same video, where videos have several clips."""
    counts = Counter(found.video_ids)
    clips = len(found.video_ids)
    if not clips > len(counts) > 1:
        return
    index, _ = nearest(found.values, torch.arange(clips), 1)
    owners = found.video_ids
    same = sum(owners[i] == owners[n] for i, n in enumerate(index[:, 0].tolist())) / clips
    chance = sum(count * (count - 1) for count in counts.values()) / (clips * (clips - 1))
    stage.metrics |= {"retrieval/same_video": same, "retrieval/chance": chance, "retrieval/clips": clips}
    stage.info(f"nearest clip of the same video: {same:.3f} of {clips} clips (chance {chance:.3f})")


def knn(stage: Stage, queries: ClipOutputs, train: ClipOutputs) -> None:
    """Measure the accuracy of nearest neighbours, clip by clip."""
    top1 = metrics.knn_accuracy(train.values, train.labels, queries.values, queries.labels)
    stage.metrics |= {"knn/top1": top1, "knn/videos": len(queries.labels)}
    stage.info(f"kNN top-1 {top1:.3f} of {len(queries.labels)} clips, {len(train.labels)} training videos")


def linear(stage: Stage, queries: ClipOutputs, train: ClipOutputs) -> None:
    """Fit a linear classifier on the training videos, and measure its accuracy by the mean over each video's clips.

    Raises:
        StageError: the training videos that could be read are of one class, or features are not finite.
    """
    try:
        probe, held_out = linear_probe.fit_chosen(train.values, train.labels)
    except ValueError as error:
        raise StageError(f"probe: {error}; look at {stage.name}'s rejects and at the checkpoint") from None
    queries.values = probe.probabilities(queries.values)
    videos = inference.by_video(queries)
    hits, count = int((videos.values.argmax(1) == videos.labels).sum()), len(videos.video_ids)
    low, high = metrics.wilson_interval(hits, count)
    stage.metrics |= {"linear/top1": hits / count, "linear/top1_low": low, "linear/top1_high": high}
    stage.metrics |= {"linear/videos": count, "linear/train_videos": len(train.labels)}
    stage.metrics |= {"linear/decay": probe.decay, "linear/cross_validated": held_out}
    stage.info(
        f"linear probe top-1 {hits / count:.3f} (95 % interval {low:.3f} to {high:.3f}) of {count} videos, "
        f"{len(train.labels)} training videos, decay {probe.decay:g} by cross-validation in train ({held_out:.3f})"
    )


def picture(stage: Stage, neighbours: int, found: ClipOutputs, pictured: list[int]) -> None:
    """Draw the first clips of some videos with the clips that are nearest to them, among those pictured."""
    values, names = found.values[pictured], [found.video_ids[i] for i in pictured]
    index, similarity = nearest(values, torch.arange(len(pictured)), neighbours)
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    queries = [first[name] for name in list(dict.fromkeys(names))[:SHOWN_QUERIES]]
    frames = np.stack([thumbnail.numpy() for i in pictured if (thumbnail := found.thumbnails[i]) is not None])
    path = stage.publish(
        NEIGHBOURS, draw_neighbours(Neighbours(frames, names, queries, index.tolist(), similarity.tolist()))
    )
    stage.details["neighbours"] = path
    among = "" if len(pictured) == len(found.video_ids) else f", among the first {len(pictured)} clips"
    stage.info(f"query clips and their nearest clips{among}: {path}")
