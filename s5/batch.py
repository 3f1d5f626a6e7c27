"""What a training step is given.

Shapes: B clips of this worker, T frames, H and W pixels, C colours, N tokens a frame, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s5.video import Failure as Failure


@dataclass(frozen=True)
class ClipBatch:
    """One worker's part of a step: B clips, in the plan's order."""

    step: int
    """Step of the run, from 0; in evaluation, the number of the batch."""
    epoch: int
    """Epoch of the step; 0 in evaluation."""
    video_ids: list[str]
    """Video of each clip: the one that was read, where a spare stands in."""
    long: Tensor
    """Long clips, uint8 RGB (B, T, H, W, C), or in their place the cached tokens of the frames, fp16 (B, T, N, D)."""
    short: Tensor | None
    """Short clips of the same videos and shape, where pairs are asked for."""
    seeds: Tensor
    """Seed of everything drawn for each clip, int64 (B,)."""
    labels: Tensor
    """Label of each clip, int64 (B,); -1 for none."""
    targets: Tensor
    """Regression target of each clip, float32 (B,); NaN for none."""
    failures: list[Failure]
    """Videos of this batch that could not be read."""

    def to(self, device: torch.device) -> ClipBatch:
        """Return the batch with its tensors on a device."""
        if device.type == "cpu":
            return self
        short = None if self.short is None else self.short.to(device, non_blocking=True)
        long, seeds, labels, targets = (
            x.to(device, non_blocking=True) for x in (self.long, self.seeds, self.labels, self.targets)
        )
        return replace(self, long=long, short=short, seeds=seeds, labels=labels, targets=targets)
