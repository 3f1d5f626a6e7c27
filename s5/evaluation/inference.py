"""Run a model over clips without gradient, and collect its outputs by clip or by video.

Shapes: N clips, D numbers a clip, T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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

    @classmethod
    def none(cls, failures: list[Failure]) -> ClipOutputs:
        """Return those of no clip, beside failures."""
        return cls([], torch.empty(0, 0), torch.empty(0).long(), torch.empty(0), failures)

    def take(self, rows: Sequence[int], failures: list[Failure]) -> ClipOutputs:
        """Return copies of the outputs of some clips, beside other failures."""
        index = torch.tensor(rows, dtype=torch.int64)
        return ClipOutputs(
            [self.video_ids[row] for row in rows],
            self.values[index],
            self.labels[index],
            self.targets[index],
            failures,
            [self.thumbnails[row] for row in rows] if self.thumbnails else [],
        )


Output = Callable[[ClipBatch], Tensor]


def features(model: VideoModel) -> Output:
    """Return the function from a batch to the model's features."""
    return lambda batch: model.encode(batch.long).features_BD


def scores(model: VideoModel, kind: str) -> Output:
    """Return the function from a batch to class probabilities (`class`) or values (`regression`)."""
    if kind == "class":
        return lambda batch: model(batch.long).logits_BC.float().softmax(-1)
    return lambda batch: model(batch.long).logits_BC


def run(
    output: Output, batches: Iterable[ClipBatch], device: torch.device, pictured: Collection[str] = ()
) -> ClipOutputs:
    """Return the outputs of a model in evaluation mode for this worker's clips, with frames of the pictured videos."""
    return joined(list(_of_batches(output, batches, device, pictured)))


def run_in_parts(
    output: Output, batches: Iterable[ClipBatch], device: torch.device, videos: int, pictured: Collection[str] = ()
) -> Iterator[ClipOutputs]:
    """Yield what `run` returns in parts of at least so many videos, of each of which all clips are in one part.

    A failure comes with or before the part that has the video's other clips.
    """
    held: list[ClipOutputs] = []
    for found in _of_batches(output, batches, device, pictured):
        held.append(found)
        names = [name for each in held for name in each.video_ids]
        if len(set(names)) > videos:
            # More clips of the last video may come.
            whole, first = joined(held), names.index(names[-1])
            yield whole.take(range(first), whole.failures)
            held = [whole.take(range(first, len(names)), [])]
    yield joined(held)


@torch.no_grad()
def _of_batches(
    output: Output, batches: Iterable[ClipBatch], device: torch.device, pictured: Collection[str]
) -> Iterator[ClipOutputs]:
    """Yield the outputs of each batch."""
    for batch in batches:
        values = output(batch.to(device)).float().cpu() if batch.video_ids else torch.empty(0, 0)
        # A copy: a view would keep the whole batch.
        frames = [
            clip[len(clip) // 2].clone() if video in pictured else None
            for video, clip in zip(batch.video_ids, batch.long, strict=True)
        ]
        yield ClipOutputs(batch.video_ids, values, batch.labels, batch.targets, batch.failures, frames)


def joined(parts: Sequence[ClipOutputs]) -> ClipOutputs:
    """Return the clips of several parts, one part after the other."""
    failures = [failure for part in parts for failure in part.failures]
    full = [part for part in parts if part.video_ids]
    if not full:
        return ClipOutputs.none(failures)
    return ClipOutputs(
        [name for part in full for name in part.video_ids],
        torch.cat([part.values for part in full]),
        torch.cat([part.labels for part in full]),
        torch.cat([part.targets for part in full]),
        failures,
        [thumbnail for part in full for thumbnail in part.thumbnails],
    )


def merge(parts: Sequence[ClipOutputs]) -> ClipOutputs:
    """Return the clips of all workers in the order of their video ids, so that the order is that of one worker.

    A video some of whose clips could not be read counts as one failure and has no clips: a result from the rest would
    not follow the protocol.
    """
    whole = joined(parts)
    first: dict[str, Failure] = {}
    for failure in whole.failures:
        first.setdefault(failure.video_id, failure)
    names = whole.video_ids
    order = sorted((i for i, name in enumerate(names) if name not in first), key=lambda i: names[i])
    return whole.take(order, [first[name] for name in sorted(first)])


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
