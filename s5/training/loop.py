"""The one training loop. It knows a small context instead of Ray, so that the same code runs alone and on a cluster."""

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
from s5.checkpoints.writer import CheckpointWriter
from s5.config import LoopConfig, OptimConfig
from s5.errors import NotFiniteError, SkippedStep, TrainingError
from s5.tasks.task import Task
from s5.training import optim
from s5.training.context import StopPoll, WorkerContext
from s5.training.step import Stepper, set_recompute_and_compile
from s5.training.throughput import ThroughputWindow, Trace, model_flops, peak_flops


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What a training run is asked to do; nothing here changes while it runs."""

    batches: Callable[[int], Generator[ClipBatch]]
    """From the number of steps taken to this worker's batches of the steps after them."""
    steps: int
    """Optimiser steps of the whole run."""
    steps_per_epoch: int
    optim: OptimConfig
    loop: LoopConfig
    meta: Callable[[int, dict[str, float]], checkpoint.Meta]
    """From a step and the last value of every metric to the meta data of its checkpoint."""
    evaluate: Callable[[], dict[str, float]] | None = None
    """Evaluates the task on all workers and returns metrics, the same on each of them."""
    max_failure_share: float = 1.0
    """Share of the videos that may be unreadable, 0 to 1."""


@dataclass(frozen=True)
class TrainingResult:
    """How training ended."""

    step: int
    """Optimiser steps taken in all."""
    started_at: int
    """Step that this call resumed from, 0 from the start."""
    metrics: dict[str, float]
    """Last value of every metric."""
    stopped: bool
    """Whether it ended early because it was asked to."""
    earlier_seconds: float = 0.0
    """Seconds that training took up to the step that this call resumed from."""


@dataclass
class TrainingState:
    """Where a run stands, besides the weights, the optimiser's moments and the scale of an fp16 loss."""

    step: int = 0
    """Optimiser steps taken or skipped."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Last value of every metric."""
    skipped: list[SkippedStep] = field(default_factory=list)
    """Steps skipped since the last one that was taken."""

    def total(self, metric: str) -> float:
        """Return a metric that counts over the whole run, 0 before its first value."""
        return self.metrics.get(metric, 0)


class TrainingLoop:
    """One training run on one worker.

    Args:
        task: what is trained; it is moved to the context's device.
        inputs: what to do.
        context: the environment of this process.
    """

    def __init__(self, task: nn.Module, inputs: TrainingInputs, context: WorkerContext) -> None:
        self.task = task.to(context.device)
        self.inputs, self.context = inputs, context
        self.state = TrainingState()
        peak = replace(inputs.optim, lr=inputs.optim.peak_lr(inputs.loop.batch_size))
        self.optimizer = optim.build_optimizer(self.task, peak)
        self.stepper = Stepper(self._task, self.optimizer, inputs.optim.clip_norm, inputs.loop, context.device)
        self._stop_poll = StopPoll(context, inputs.loop.log_every)
        self._began = time.monotonic()

    def run(self) -> TrainingResult:
        """Train from the latest checkpoint to the end, or until a stop is requested; a stop leaves a checkpoint.

        An evaluation that is due at the step of a stop is skipped, also on resuming: what is left of the grace period
        belongs to the checkpoint. After the last step there is nothing to stop.

        Raises:
            TrainingError: loss or gradient were not finite in too many steps in a row (`NotFiniteError`), or too many
                videos failed to decode.
            CheckpointError: the checkpoint to resume from does not fit, or there were some and none is sound.
            SaveError: the last checkpoint could not be written.
        """
        torch.manual_seed(self.inputs.loop.seed)
        self._resume()
        start, stopped = self.state.step, False
        earlier = self.state.total("train/seconds")
        self._began = time.monotonic() - earlier
        if start < self._last_step:
            with self._writer() as writer:
                stopped = self._train(writer)
            # A worker that ends before the last checkpoint is written may have the others torn down.
            distributed.any_worker(False, self.context.device)
            self.state.metrics |= writer.row if writer else {}
        return TrainingResult(self.state.step, start, self.state.metrics, stopped, earlier)

    @property
    def _task(self) -> Task:
        return cast(Task, self.task)

    @property
    def _last_step(self) -> int:
        """The step that this call trains to."""
        epoch = self.inputs.loop.stop_after_epoch
        return min(self.inputs.steps, epoch * self.inputs.steps_per_epoch) if epoch else self.inputs.steps

    def _resume(self) -> None:
        """Load the latest sound checkpoint, the same on all workers, where there is one."""
        if self.context.checkpoints is None:
            return
        with self.context.checkpoints.resume_folder(self.context.rank, self.context.notify) as folder:
            if folder is None:
                return
            meta = checkpoint.restore(folder, self.task, self.optimizer)
        self.state = TrainingState(meta.step, dict(meta.metrics))
        if meta.extra:
            self.stepper.scaler.load_state_dict(meta.extra)
        if self.context.rank == 0:
            self.context.saved(meta.step)

    def _writer(self) -> AbstractContextManager[CheckpointWriter | None]:
        """Return the writer of checkpoints: on one worker, since all have the same weights."""
        if self.context.checkpoints is None or self.context.rank != 0:
            return nullcontext()
        return CheckpointWriter(self.context.checkpoints, self.context, self.state.step)

    def _train(self, writer: CheckpointWriter | None) -> bool:
        """Take the steps that are left; return whether it was asked to stop before the last."""
        if self.inputs.loop.micro_batch:
            # Parts of a batch average their gradients themselves, once.
            distributed.copy_from_first(self.task)
        else:
            self.stepper.model = self.context.wrap(self.task)
        self.task.train()
        with closing(self.inputs.batches(self.state.step)) as batches:
            return self._take_steps(batches, writer)

    def _take_steps(self, batches: Iterator[ClipBatch], writer: CheckpointWriter | None) -> bool:
        inputs, state = self.inputs, self.state
        trace = Trace(self.context, state.step + 4, inputs.loop.profile_steps)
        window, batches = self._start_window(batches)
        first = state.step + 1
        for step in range(first, self._last_step + 1):
            batch = self._timed_step(batches, step, window, trace)
            stops = step < self._last_step and self._stop_poll(step)
            saves = stops or self._is_checkpoint_due(step)
            # Before each checkpoint too, so that it includes all failures so far.
            if saves or step % inputs.loop.log_every == 0 or step == first:
                self._log(window, clips_per_video=1 if batch.short is None else 2)
            if saves:
                self._checkpoint(writer, evaluates=not stops and self._is_evaluation_due(step))
                window.reset()
            if stops:
                return True
        return False

    def _start_window(self, batches: Iterator[ClipBatch]) -> tuple[ThroughputWindow, Iterator[ClipBatch]]:
        """Count the FLOPs of a step on the first batch; return the monitor of throughput, and all batches."""
        inputs, device = self.inputs, self.context.device
        self.context.beat(f"step {self.state.step + 1}: waiting for the first batch")
        first = next(batches)
        flops = model_flops(self.task, first.to(device))
        # Not before: what is compiled or recomputed would be counted wrongly.
        set_recompute_and_compile(self.task, inputs.loop)
        peak = peak_flops(device, inputs.loop.precision)
        return ThroughputWindow(inputs.loop.batch_size, flops, peak), chain([first], batches)

    def _timed_step(self, batches: Iterator[ClipBatch], step: int, window: ThroughputWindow, trace: Trace) -> ClipBatch:
        """Wait for the batch of a step, train on it, and return it."""
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
        self.state.step = step
        return batch

    def _step(self, batch: ClipBatch, step: int) -> tuple[dict[str, Tensor], bool]:
        """Take one optimiser step, or skip it; the schedules depend on the step alone, and so on the videos seen."""
        inputs = self.inputs
        done = (step - 1) / inputs.steps
        share = optim.schedule(done, inputs.optim.warmup) if step > 1 else self._first_share()
        rate = optim.set_learning_rate(self.optimizer, share)
        self._task.before_step(done)
        scalars, taken = self.stepper(batch)
        extra = {"learning_rate": rate}
        if taken:
            extra |= self._task.after_step(step / inputs.steps)
            self.state.skipped.clear()
        else:
            self._skip(batch, step)
        device = scalars["loss"].device
        return scalars | {name: torch.tensor(value, device=device) for name, value in extra.items()}, taken

    def _first_share(self) -> float:
        """Return the first step's share of the peak learning rate, where the schedule of a warm-up has 0."""
        return min(1.0, 1 / max(1.0, self.inputs.steps * self.inputs.optim.warmup))

    def _skip(self, batch: ClipBatch, step: int) -> None:
        """Record a step whose loss or gradient is not finite; too many in a row end the run."""
        if self.stepper.seeks_scale:
            return
        skipped = self.state.skipped
        skipped.append(SkippedStep(step, batch.video_ids))
        if len(skipped) > self.inputs.loop.max_skipped:
            videos = [chain.from_iterable(distributed.gather_objects(step.video_ids)) for step in skipped]
            raise NotFiniteError([SkippedStep(s.step, list(ids)) for s, ids in zip(skipped, videos, strict=True)])

    def _log(self, window: ThroughputWindow, clips_per_video: int) -> None:
        """Log the means since the last row; too many unreadable videos end the run."""
        state, inputs = self.state, self.inputs
        row = window.row(clips_per_video)
        failures = int(state.total("data/failures_total")) + int(row["data/failures"])
        skipped = state.total("train/skipped_steps_total") + row["train/skipped_steps"]
        row |= {"data/failures_total": failures, "train/skipped_steps_total": skipped}
        row |= {"train/epoch": state.step / inputs.steps_per_epoch, "train/seconds": time.monotonic() - self._began}
        row |= {"train/clips_seen": state.step * inputs.loop.batch_size * clips_per_video}
        state.metrics |= row
        window.reset()
        if self.context.rank == 0:
            self.context.log(row, state.step)
        seen = state.step * inputs.loop.batch_size
        if failures > inputs.max_failure_share * seen and failures > 1:
            raise TrainingError(
                f"{failures} of {seen} videos could not be decoded, more than data.max_failure_share, "
                f"{inputs.max_failure_share:g}, allows: index the videos again, or raise it"
            )

    def _is_checkpoint_due(self, step: int) -> bool:
        every = self.inputs.loop.checkpoint_every or self.inputs.steps_per_epoch
        return step % every == 0 or step == self._last_step or self._is_evaluation_due(step)

    def _is_evaluation_due(self, step: int) -> bool:
        if self.inputs.evaluate is None:
            return False
        every = self.inputs.loop.evaluate_every * self.inputs.steps_per_epoch
        return step in (self._last_step, self.inputs.steps) or (every > 0 and step % every == 0)

    def _checkpoint(self, writer: CheckpointWriter | None, evaluates: bool) -> None:
        """Evaluate where asked to, then save; all workers take part."""
        state = self.state
        evaluated = self._evaluate() if evaluates else {}
        self.context.beat(f"step {state.step}: saving")
        if writer is not None:
            extra = self.stepper.scaler.state_dict()
            meta = replace(self.inputs.meta(state.step, dict(state.metrics)), evaluated=evaluated, extra=extra)
            writer.save(self.task, self.optimizer, meta)

    def _evaluate(self) -> dict[str, float]:
        assert self.inputs.evaluate is not None
        self.context.beat(f"step {self.state.step}: evaluating")
        self.task.eval()
        with torch.no_grad():
            found = self.inputs.evaluate()
        self.task.train()
        self.state.metrics |= found
        if self.context.rank == 0:
            self.context.log(found, self.state.step)
        return found
