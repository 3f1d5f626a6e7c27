"""How a run gets on between two rows of the log: means of metrics, throughput, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from s5 import distributed
from s5.batch import ClipBatch


class Window:
    """Means of metrics, throughput and the share of time spent waiting for data, between two rows of the log."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.sums: dict[str, Tensor] = {}
        self.steps = self.videos = self.failures = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    def add(self, scalars: Mapping[str, Tensor], batch: ClipBatch, waited: float) -> None:
        """Take up one step, without waiting for the device."""
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value.detach())) + value.detach()
        self.steps += 1
        self.videos += len(batch.video_ids)
        self.failures += len(batch.failures)
        self.waited += waited

    def row(self, clips_per_video: int) -> dict[str, float]:
        """Return the means over steps and workers; every worker has to call it."""
        means = distributed.mean(torch.stack([value.float() for value in self.sums.values()]) / self.steps)
        row = {f"train/{name}": float(value) for name, value in zip(self.sums, means, strict=True)}
        seconds = time.perf_counter() - self.started
        shares = torch.tensor([self.waited / seconds, self.failures], device=means.device)
        waited, failures = distributed.mean(shares).tolist()
        return row | {
            "train/clips_per_second": self.steps * self.batch_size * clips_per_video / seconds,
            "train/step_seconds": seconds / self.steps,
            "train/data_wait_share": waited,
            # A mean in fp32 times the number of workers may fall just short of the count.
            "data/failures": round(failures * distributed.world_size()),
        }
