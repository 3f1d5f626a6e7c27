"""The one training loop. It sees a small context instead of Ray, so that the same lines run alone and on a cluster."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from s5 import checkpoint, distributed, optim
from s5.batch import ClipBatch
from s5.config import LoopConfig, OptimConfig
from s5.context import Task, TrainingError, WorkerContext
from s5.pace import Window


@dataclass(frozen=True)
class FitResult:
    """How training ended."""

    step: int
    """Optimiser steps taken in all."""
    started_at: int
    """Step that this call resumed from, 0 from the start."""
    metrics: dict[str, float]
    """Last value of every metric."""
    stopped: bool
    """Whether it ended early because it was asked to."""


@dataclass
class Fit:
    """One training run: what `fit` is asked to do and where it stands."""

    task: nn.Module
    batches: Callable[[int], Generator[ClipBatch]]
    steps: int
    steps_per_epoch: int
    optim: OptimConfig
    loop: LoopConfig
    context: WorkerContext
    meta: Callable[[int, dict[str, float]], checkpoint.Meta]
    evaluate: Callable[[], dict[str, float]] | None = None
    max_failure_share: float = 1.0
    poll_seconds: float = 1.0
    """Least time between two questions to the context whether to stop."""
    metrics: dict[str, float] = field(default_factory=dict)
    failures: int = 0
    next_poll: float = 0.0

    def run(self) -> FitResult:
        """Train from the latest checkpoint to the end, or until a stop is requested; a stop leaves a checkpoint.

        An evaluation that is due at the very step of a stop is left out, and not made up for on resuming: what is
        left of the grace time belongs to the checkpoint. After the last step there is nothing to stop.

        Raises:
            TrainingError: tokens, the loss or its gradient are not finite, or too many videos failed to decode.
            CheckpointError: the checkpoint to resume from does not fit.
        """
        torch.manual_seed(self.loop.seed)
        self.task.to(self.context.device)
        self.optimizer = optim.build_optimizer(self.task, self.optim)
        start = 0
        with self.context.latest_checkpoint() as latest:
            if latest is not None:
                meta = checkpoint.restore(latest, self.task, self.optimizer)
                start, self.metrics = meta.step, dict(meta.metrics)
                self.failures = int(self.metrics.get("data/failures_total", 0))
        stopped = False
        step = start
        if start < self.steps:
            step, stopped = self._train(start)
        return FitResult(step, start, self.metrics, stopped)

    def _train(self, start: int) -> tuple[int, bool]:
        with closing(self.batches(start)) as batches:
            return self._train_on(batches, start)

    def _train_on(self, batches: Iterator[ClipBatch], start: int) -> tuple[int, bool]:
        model = self.context.wrap(self.task)
        model.train()
        window = Window(self.loop.batch_size)
        stopped = False
        for step in range(start + 1, self.steps + 1):
            self.context.beat(f"step {step}: waiting for data")
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            self.context.beat(f"step {step}: training")
            scalars = self._step(model, batch.to(self.context.device), step)
            window.add(scalars, batch, waited)
            if batch.failures:
                self.context.reject(batch.failures)
            stopped = step < self.steps and self._is_stopped(step)
            saves = stopped or self._is_due(step)
            # Before each checkpoint too: it takes up all failures so far, and weights that are not finite raise first.
            if saves or step % self.loop.log_every == 0 or step == start + 1:
                self._log(window, step, clips_per_video=1 if batch.short is None else 2)
            if saves:
                self._checkpoint(step, evaluated=not stopped)
                window.reset()
            if stopped:
                break
        return step, stopped

    def _is_stopped(self, step: int) -> bool:
        """Return whether any worker was asked to stop; all workers ask each other at the same steps."""
        # On a GPU the answer waits for the device.
        if self.context.device.type != "cpu" and step % min(self.loop.log_every, 10):
            return False
        asked = False
        if time.monotonic() >= self.next_poll:
            asked = self.context.stop_requested()
            self.next_poll = time.monotonic() + self.poll_seconds
        return distributed.any_worker(asked, self.context.device)

    def _step(self, model: nn.Module, batch: ClipBatch, step: int) -> dict[str, Tensor]:
        """Take one optimiser step; the schedules depend on the step alone."""
        task = cast(Task, self.task)
        share = optim.schedule((step - 1) / self.steps, self.optim.warmup) if step > 1 else self._first_share()
        rate = optim.set_learning_rate(self.optimizer, share)
        task.before_step((step - 1) / self.steps)
        with torch.autocast(self.context.device.type, torch.bfloat16, enabled=self.loop.precision == "bf16"):
            try:
                scalars: dict[str, Tensor] = model(batch)
            except FloatingPointError as error:
                raise TrainingError(f"{error}; this is step {step}, and the last checkpoint is kept") from error
        scalars["loss"].backward()  # type: ignore[no-untyped-call]
        limit = self.optim.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_([p for p in self.task.parameters() if p.requires_grad], limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        extra = task.after_step(step / self.steps) | {"learning_rate": rate}
        device = scalars["loss"].device
        return scalars | {"gradient_norm": norm} | {k: torch.tensor(v, device=device) for k, v in extra.items()}

    def _first_share(self) -> float:
        """Let the first step of a warm-up do something."""
        return min(1.0, 1 / max(1.0, self.steps * self.optim.warmup))

    def _log(self, window: Window, step: int, clips_per_video: int) -> None:
        row = window.row(clips_per_video)
        self.failures += int(row["data/failures"])
        row |= {"data/failures_total": self.failures, "train/epoch": step / self.steps_per_epoch}
        self.metrics |= row
        window.reset()
        if self.context.rank == 0:
            self.context.log(row, step)
        # A gradient that is not finite has spoilt the weights, though the loss it came from was finite.
        for name in ("train/loss", "train/gradient_norm"):
            if not math.isfinite(row[name]):
                raise TrainingError(
                    f"{name} is {row[name]} at step {step}: lower optim.lr, raise optim.warmup, or clip "
                    "gradients with optim.clip_norm; the last checkpoint is kept"
                )
        seen = step * self.loop.batch_size
        if self.failures > self.max_failure_share * seen and self.failures > 1:
            raise TrainingError(
                f"{self.failures} of {seen} videos could not be decoded, more than data.max_failure_share, "
                f"{self.max_failure_share:g}, allows: index the videos anew, or raise it"
            )

    def _is_due(self, step: int) -> bool:
        every = self.loop.checkpoint_every or self.steps_per_epoch
        return step % every == 0 or step == self.steps or self._is_evaluated(step)

    def _is_evaluated(self, step: int) -> bool:
        if self.evaluate is None:
            return False
        every = self.loop.evaluate_every * self.steps_per_epoch
        return step == self.steps or (every > 0 and step % every == 0)

    def _checkpoint(self, step: int, evaluated: bool) -> None:
        """Evaluate where it is due, then save; all workers take part."""
        found: dict[str, float] = {}
        if self.evaluate is not None and evaluated and self._is_evaluated(step):
            self.context.beat(f"step {step}: evaluating")
            self.task.eval()
            with torch.no_grad():
                found = self.evaluate()
            self.task.train()
            self.metrics |= found
            if self.context.rank == 0:
                self.context.log(found, step)
        self.context.beat(f"step {step}: saving")
        if self.context.rank != 0:
            self.context.save(None, found)
            return
        folder = Path(tempfile.mkdtemp(prefix="checkpoint_"))
        try:
            checkpoint.save(folder, self.task, self.optimizer, self.meta(step, dict(self.metrics)))
            self.context.save(folder, found)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
