"""The one training loop. It sees a small context instead of Ray, so that the same lines run alone and on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from s5 import distributed
from s5.batch import ClipBatch
from s5.checkpoints import checkpoint
from s5.checkpoints.writer import Saver
from s5.config import LoopConfig, OptimConfig
from s5.errors import NotFiniteError, SkippedStep, TrainingError
from s5.tasks.task import Task
from s5.training import optim
from s5.training.context import WorkerContext
from s5.training.step import Stepper, prepare
from s5.training.throughput import Trace, Window, model_flops, peak_flops


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
    skipped: list[SkippedStep] = field(default_factory=list)
    """Steps skipped since the last that was taken."""
    next_poll: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)
    """State of the scale of an fp16 loss that the run goes on from."""
    saver: Saver | None = None

    def run(self) -> FitResult:
        """Train from the latest checkpoint to the end, or until a stop is requested; a stop leaves a checkpoint.

        An evaluation that is due at the very step of a stop is left out, and not made up for on resuming: what is
        left of the grace time belongs to the checkpoint. After the last step there is nothing to stop.

        Raises:
            TrainingError: loss or gradient were not finite in too many steps in a row (`NotFiniteError`), or too many
                videos failed to decode.
            CheckpointError: the checkpoint to resume from does not fit, or there were some and none is sound.
            SaveError: the last checkpoint could not be written.
        """
        torch.manual_seed(self.loop.seed)
        self.task.to(self.context.device)
        self.optimizer = optim.build_optimizer(self.task, self.optim)
        start = self._resume()
        stopped = False
        step = start
        if start < self.steps:
            with self._saver(start) as self.saver:
                step, stopped = self._train(start)
            # A worker that ends before the last checkpoint is written may have the others torn down.
            distributed.any_worker(False, self.context.device)
            self.metrics |= self.saver.row if self.saver else {}
        return FitResult(step, start, self.metrics, stopped)

    def _resume(self) -> int:
        """Go on from the latest sound checkpoint, the same on all workers; return its step, 0 where there is none."""
        if self.context.checkpoints is None:
            return 0
        with self.context.checkpoints.resumed(self.context.rank, self.context.tell) as folder:
            if folder is None:
                return 0
            meta = checkpoint.restore(folder, self.task, self.optimizer)
        self.metrics, self.extra = dict(meta.metrics), meta.extra
        self.failures = int(self.metrics.get("data/failures_total", 0))
        if self.context.rank == 0:
            self.context.saved(meta.step)
        return meta.step

    def _saver(self, start: int) -> AbstractContextManager[Saver | None]:
        """Return what saves checkpoints: on one worker, since all hold the same."""
        checkpoints = self.context.checkpoints
        return Saver(checkpoints, self.context, start) if checkpoints and self.context.rank == 0 else nullcontext()

    def _train(self, start: int) -> tuple[int, bool]:
        # Parts of a batch average their gradients themselves, once.
        if self.loop.micro_batch:
            distributed.copy_from_first(self.task)
        model = self.task if self.loop.micro_batch else self.context.wrap(self.task)
        self.task.train()
        task = cast(Task, self.task)
        device = self.context.device
        self.stepper = Stepper(task, model, self.optimizer, self.optim.clip_norm, self.loop, device)
        if self.extra:
            self.stepper.scaler.load_state_dict(self.extra)
        with closing(self.batches(start)) as batches:
            return self._train_on(batches, start)

    def _train_on(self, batches: Iterator[ClipBatch], start: int) -> tuple[int, bool]:
        window = Window(self.loop.batch_size, peak=peak_flops(self.context.device, self.loop.precision))
        trace = Trace(self.context, start + 4, self.loop.profile_steps)
        self.context.beat(f"step {start + 1}: waiting for the first batch")
        first = next(batches)
        window.flops = model_flops(self.task, first.to(self.context.device))
        # Not before: what is compiled or computed anew would be counted wrongly.
        prepare(self.task, self.loop)
        batches = chain([first], batches)
        window.reset()
        stopped = False
        for step in range(start + 1, self.steps + 1):
            self.context.beat(f"step {step}: waiting for data")
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            self.context.beat(f"step {step}: training")
            trace.before(step)
            scalars, taken = self._step(batch.to(self.context.device), step)
            window.add(scalars, batch, waited, time.perf_counter() - began, taken)
            trace.after(step)
            if batch.failures:
                self.context.reject(batch.failures)
            stopped = step < self.steps and self._is_stopped(step)
            saves = stopped or self._is_due(step)
            # Before each checkpoint too: it takes up all failures so far.
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

    def _step(self, batch: ClipBatch, step: int) -> tuple[dict[str, Tensor], bool]:
        """Take one optimiser step, or skip it; the schedules depend on the step alone, and so on the videos seen."""
        task = cast(Task, self.task)
        share = optim.schedule((step - 1) / self.steps, self.optim.warmup) if step > 1 else self._first_share()
        rate = optim.set_learning_rate(self.optimizer, share)
        task.before_step((step - 1) / self.steps)
        scalars, taken = self.stepper(batch)
        extra = {"learning_rate": rate}
        if taken:
            extra |= task.after_step(step / self.steps)
            self.skipped.clear()
        else:
            self._skip(batch, step)
        device = scalars["loss"].device
        return scalars | {name: torch.tensor(value, device=device) for name, value in extra.items()}, taken

    def _skip(self, batch: ClipBatch, step: int) -> None:
        """Take note of a step whose loss or gradient is not finite; too many in a row end the run."""
        if self.stepper.seeks_scale:
            return
        self.skipped.append(SkippedStep(step, batch.video_ids))
        if len(self.skipped) > self.loop.max_skipped:
            videos = [chain.from_iterable(distributed.gather_objects(step.video_ids)) for step in self.skipped]
            raise NotFiniteError([SkippedStep(s.step, list(ids)) for s, ids in zip(self.skipped, videos, strict=True)])

    def _first_share(self) -> float:
        """Let the first step of a warm-up do something."""
        return min(1.0, 1 / max(1.0, self.steps * self.optim.warmup))

    def _log(self, window: Window, step: int, clips_per_video: int) -> None:
        row = window.row(clips_per_video)
        self.failures += int(row["data/failures"])
        skipped = self.metrics.get("train/skipped_steps_total", 0) + row["train/skipped_steps"]
        row |= {"data/failures_total": self.failures, "train/skipped_steps_total": skipped}
        row |= {"train/epoch": step / self.steps_per_epoch}
        self.metrics |= row
        window.reset()
        if self.context.rank == 0:
            self.context.log(row, step)
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
        if self.saver is not None:
            extra = self.stepper.scaler.state_dict()
            meta = replace(self.meta(step, dict(self.metrics)), evaluated=found, extra=extra)
            self.saver.save(self.task, self.optimizer, meta)
