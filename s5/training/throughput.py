"""Monitoring of a run between two rows of the log: means of metrics, throughput, and model FLOPs utilisation.

Times are taken on the host; since each step waits for the gradient's norm, they include the device's work.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import quantiles

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from s5 import distributed
from s5.batch import ClipBatch
from s5.training.context import WorkerContext

# Dense bf16 and fp16 matrix products in FLOP/s, by a part of the device's name: NVIDIA's data sheets.
HALF_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
}


class ThroughputWindow:
    """Means of metrics, throughput and times between two rows of the log.

    Args:
        batch_size: videos in the global batch.
        flops: this worker's model FLOPs of a step, 0 where they are not counted.
        peak: FLOP/s that its device has at most, or None where that is unknown.
    """

    def __init__(self, batch_size: int, flops: float = 0.0, peak: float | None = None) -> None:
        self.batch_size, self.flops, self.peak = batch_size, flops, peak
        self.reset()

    def reset(self) -> None:
        """Start the next window."""
        self.sums: dict[str, Tensor] = {}
        self.steps = self.skipped = self.failures = 0
        self.waited = 0.0
        self.seconds: list[float] = []
        self.started = time.perf_counter()

    def add(self, scalars: Mapping[str, Tensor], batch: ClipBatch, waited: float, seconds: float, taken: bool) -> None:
        """Add one step, without waiting for the device.

        Args:
            scalars: its metrics, which count where it was taken.
            batch: what it trained on.
            waited: seconds of it spent waiting for data.
            seconds: its length.
            taken: whether it was not skipped.
        """
        for name, value in scalars.items():
            value = value.detach().float()
            before = self.sums.get(name, torch.zeros_like(value))
            self.sums[name] = before + value if taken else before
        self.steps += 1
        self.skipped += not taken
        self.failures += len(batch.failures)
        self.waited += waited
        self.seconds.append(seconds)

    def row(self, clips_per_video: int) -> dict[str, float]:
        """Return the means over steps that were taken and over workers; every worker has to call it."""
        sums = torch.stack(list(self.sums.values()))
        taken = self.steps - self.skipped
        means = distributed.mean(sums / taken if taken else sums * torch.nan)
        row = {f"train/{name}": float(value) for name, value in zip(self.sums, means, strict=True)}
        seconds = time.perf_counter() - self.started
        shares = torch.tensor([self.waited / seconds, self.failures, peak_memory(means.device)], device=means.device)
        waited, failures, memory = distributed.mean(shares).tolist()
        rate = self.flops * self.steps / seconds
        return (
            row
            | {
                "train/clips_per_second": self.steps * self.batch_size * clips_per_video / seconds,
                "train/step_seconds": seconds / self.steps,
                "train/data_wait_share": waited,
                "train/memory_gib": memory / 2**30,
                "train/skipped_steps": self.skipped,
                # A mean in fp32 times the number of workers may fall just short of the count.
                "data/failures": round(failures * distributed.world_size()),
            }
            | self._percentiles()
            | ({"train/model_tflops": rate / 1e12} if self.flops else {})
            | ({"train/mfu": rate / self.peak} if self.flops and self.peak else {})
        )

    def _percentiles(self) -> dict[str, float]:
        """Of the steps' lengths; what is due between steps, such as saving, is left out."""
        cuts = quantiles(self.seconds, n=20, method="inclusive") if len(self.seconds) > 1 else [self.seconds[0]] * 19
        return {"train/step_seconds_p50": cuts[9], "train/step_seconds_p95": cuts[18]}


def peak_memory(device: torch.device) -> float:
    """Return the bytes that this process has held at most: of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(largest if sys.platform == "darwin" else largest * 1024)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the FLOP/s that a device has at most in that precision, or None where it is unknown."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in HALF_PEAKS.items() if part in name), None)


def model_flops(task: nn.Module, batch: ClipBatch) -> float:
    """Return the FLOPs that the matrix products of one step take, forward and backward, for this worker's rows.

    They are counted on one row and multiplied. Those of FFTs, and what is recomputed to save memory, do not count.
    Every worker has to call it. Weights, gradients and running statistics stay as they are.
    """
    row = batch.parts(1)[0]
    short = None if row.short is None else torch.zeros_like(row.short)
    row = replace(row, long=torch.zeros_like(row.long), short=short, global_size=distributed.world_size())
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    training = task.training
    task.eval()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(task(row)["loss"], trained, allow_unused=True)
    task.train(training)
    return float(counter.get_total_flops()) * len(batch.video_ids)


class Trace:
    """Profiles some steps, whose trace (for Perfetto or chrome://tracing) rank 0 stores.

    Args:
        context: where it is stored, as profile/steps_FIRST_to_LAST.json.
        first: first step that is traced.
        steps: steps traced, 0 for none.
    """

    def __init__(self, context: WorkerContext, first: int, steps: int) -> None:
        self.context, self.first, self.last = context, first, first + steps - 1
        self.profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Start the profiler before the first of these steps."""
        if step == self.first <= self.last and self.context.rank == 0:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def after(self, step: int) -> None:
        """Store the trace after the last of these steps; that of a run that ends before is lost."""
        if self.profiler is None or step < self.last:
            return
        self.profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self.profiler.export_chrome_trace(str(path))
            self.context.store_file(path, f"profile/steps_{self.first}_to_{self.last}.json")
        self.profiler = None
