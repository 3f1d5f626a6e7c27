"""Run a model over clips without gradient, and collect its outputs by clip or by video.

Shapes: N clips, D numbers a clip, T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s5.batch import ClipBatch
from s5.distributed import gather_objects
from s5.errors import Failure
from s5.evaluation.metrics import per_video
from s5.models.video_model import VideoModel


@dataclass
class ClipOutputs:
    """A model's outputs for N clips."""

    video_ids: list[str]
    """Video of each clip; a video's clips follow each other."""
    values: Tensor
    """Class probabilities, regression values or features, fp32 (N, D) on the CPU."""
    labels: Tensor
    """Label of each clip, int64 (N,); -1 for none."""
    targets: Tensor
    """Regression target of each clip, float32 (N,); NaN for none."""
    failures: list[Failure]
    """Videos that could not be read; they have no clips here."""
    thumbnails: list[Tensor | None] = field(default_factory=list)
    """Middle frame of each clip, uint8 (H, W, 3), None for clips whose frames were not asked for."""


Output = Callable[[ClipBatch], Tensor]


def features(model: VideoModel) -> Output:
    """Return the function from a batch to the model's features."""
    return lambda batch: model.encode(batch.long).features_BD


def scores(model: VideoModel, kind: str) -> Output:
    """Return the function from a batch to class probabilities (`class`) or values (`regression`)."""
    if kind == "class":
        return lambda batch: model(batch.long).logits_BC.float().softmax(-1)
    return lambda batch: model(batch.long).logits_BC


@torch.no_grad()
def run(
    output: Output, batches: Iterable[ClipBatch], device: torch.device, pictured: Collection[str] = ()
) -> ClipOutputs:
    """Return the outputs of a model in evaluation mode for this worker's clips, with frames of the pictured videos."""
    found = ClipOutputs([], torch.empty(0, 0), torch.empty(0).long(), torch.empty(0), [])
    values, labels, targets = [], [], []
    for batch in batches:
        found.failures += batch.failures
        if not batch.video_ids:
            continue
        found.video_ids += batch.video_ids
        values.append(output(batch.to(device)).float().cpu())
        labels.append(batch.labels)
        targets.append(batch.targets)
        for video, clip in zip(batch.video_ids, batch.long, strict=True):
            # A copy: a view would keep the whole batch.
            found.thumbnails.append(clip[len(clip) // 2].clone() if video in pictured else None)
    if values:
        found.values, found.labels, found.targets = torch.cat(values), torch.cat(labels), torch.cat(targets)
    return found


def merge(parts: list[ClipOutputs]) -> ClipOutputs:
    """Return the clips of all workers in the order of their video ids, so that the order is that of one worker.

    A video some of whose clips could not be read counts as one failure and has no clips: a result from the rest would
    not follow the protocol.
    """
    full = [part for part in parts if part.video_ids]
    first: dict[str, Failure] = {}
    for part in parts:
        for failure in part.failures:
            first.setdefault(failure.video_id, failure)
    failures = list(first.values())
    names = [name for part in full for name in part.video_ids]
    order = sorted((i for i, name in enumerate(names) if name not in first), key=lambda i: names[i])
    if not order:
        return ClipOutputs([], torch.empty(0, 0), torch.empty(0).long(), torch.empty(0), failures)
    thumbnails = [thumbnail for part in full for thumbnail in part.thumbnails]
    return ClipOutputs(
        [names[i] for i in order],
        torch.cat([part.values for part in full])[order],
        torch.cat([part.labels for part in full])[order],
        torch.cat([part.targets for part in full])[order],
        failures,
        [thumbnails[i] for i in order] if thumbnails else [],
    )


def by_video(found: ClipOutputs) -> ClipOutputs:
    """Return one row a video: the mean over its clips (V, D), its label and target; no thumbnails.

    The class of the mean of probabilities is that of their sum, as LVU's protocol has it.
    """
    names, values = per_video(found.values, found.video_ids)
    place = {name: i for i, name in reversed(list(enumerate(found.video_ids)))}
    first = [place[name] for name in names]
    return ClipOutputs(names, values, found.labels[first], found.targets[first], found.failures)


def run_on_all(output: Output, batches: Iterable[ClipBatch], device: torch.device) -> ClipOutputs:
    """Run the model on this worker's share; return the outputs of all workers, on each of them."""
    return merge(gather_objects(run(output, batches, device)))
