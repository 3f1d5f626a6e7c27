"""The input of a training step: one worker's part of a batch of clips.

Shapes: B clips of this worker, T frames, H and W pixels, C colours, N tokens a frame, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s5.errors import Failure


@dataclass(frozen=True)
class ClipBatch:
    """One worker's part of a step: B clips, in the seeded order of training clips."""

    step: int
    """Step of the run, from 0; in evaluation, the number of the batch."""
    epoch: int
    """Epoch of the step; 0 in evaluation."""
    video_ids: list[str]
    """Video of each clip; where one could not be read, that of the spare used instead."""
    long: Tensor
    """Long clips, uint8 RGB (B, T, H, W, C), or the cached tokens of their frames, fp16 (B, T, N, D)."""
    short: Tensor | None
    """Short clips of the same videos and shape; None unless pairs are asked for."""
    seeds: Tensor
    """Seed of all random numbers of each clip, int64 (B,)."""
    labels: Tensor
    """Label of each clip, int64 (B,); -1 for none."""
    targets: Tensor
    """Regression target of each clip, float32 (B,); NaN for none."""
    failures: list[Failure]
    """Videos of this batch that could not be read."""
    global_size: int = 0
    """Clips (or pairs) of all workers at this step, split by `distributed.share_of`; 0 where these are all."""

    @property
    def total(self) -> int:
        """Clips (or pairs) of all workers at this step."""
        return self.global_size or len(self.video_ids)

    def parts(self, rows: int) -> list[ClipBatch]:
        """Return the batch in parts of at most `rows` clips."""
        return [self._slice(slice(first, first + rows)) for first in range(0, len(self.video_ids), rows)]

    def _slice(self, rows: slice) -> ClipBatch:
        short = None if self.short is None else self.short[rows]
        seeds, labels, targets = self.seeds[rows], self.labels[rows], self.targets[rows]
        ids, long = self.video_ids[rows], self.long[rows]
        return replace(self, video_ids=ids, long=long, short=short, seeds=seeds, labels=labels, targets=targets)

    def to(self, device: torch.device) -> ClipBatch:
        """Return the batch with its tensors on a device."""
        if device.type == "cpu":
            return self
        short = None if self.short is None else self.short.to(device, non_blocking=True)
        long, seeds, labels, targets = (
            x.to(device, non_blocking=True) for x in (self.long, self.seeds, self.labels, self.targets)
        )
        return replace(self, long=long, short=short, seeds=seeds, labels=labels, targets=targets)
