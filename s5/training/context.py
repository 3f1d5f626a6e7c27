"""What the training loop needs of its environment: the context of one training process, and the one without Ray."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from s5 import distributed
from s5.checkpoints.backend import LocalBackend
from s5.checkpoints.history import CheckpointHistory
from s5.errors import Failure


class WorkerContext(Protocol):
    """The environment of one training process."""

    rank: int
    world_size: int
    device: torch.device
    checkpoints: CheckpointHistory | None
    """Those of the run; None saves none."""
    poll_seconds: float
    """Least time between two calls of `stop_requested`."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose backward pass averages gradients over the workers."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log a row of metrics; called on rank 0, from any thread."""

    def reject(self, failures: list[Failure]) -> None:
        """Record videos that could not be read; called on the rank that met them."""

    def notify(self, message: str) -> None:
        """Show the user a sentence; called on rank 0, from any thread."""

    def saved(self, step: int) -> None:
        """Record that that step has a checkpoint, just stored or resumed from; called on rank 0, from any thread."""

    def stop_requested(self) -> bool:
        """Return whether this process has been asked to stop."""

    def store_file(self, file: Path, name: str) -> None:
        """Store a file among the run's results; called on rank 0."""

    def beat(self, phase: str) -> None:
        """Record that this process is alive and what it does next, such as "step 7: waiting for data"."""


class StopPoll:
    """Finds out on all workers together whether any of them was asked to stop."""

    def __init__(self, context: WorkerContext, log_every: int) -> None:
        self._context = context
        # On a GPU the answer waits for the device.
        self._every = 1 if context.device.type == "cpu" else min(log_every, 10)
        self._next = 0.0

    def __call__(self, step: int) -> bool:
        """Return whether to stop after this step: the same on all workers, which have to call it at the same steps."""
        if step % self._every:
            return False
        requested = False
        if time.monotonic() >= self._next:
            requested = self._context.stop_requested()
            self._next = time.monotonic() + self._context.poll_seconds
        return distributed.any_worker(requested, self._context.device)


@dataclass
class SoloContext:
    """One process without Ray, for tests, a single machine, and as the baseline of benchmarks."""

    folder: Path | None = None
    """Where checkpoints are saved, one folder a step; None saves none."""
    retain: int = 2
    """How many of the latest checkpoints are retained."""
    best: tuple[str, str] | None = None
    """Evaluation metric by which the best checkpoint is retained too, and `max` or `min`."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """All rows logged, with their steps."""
    rejects: list[Failure] = field(default_factory=list)
    """Videos that could not be read."""
    messages: list[str] = field(default_factory=list)
    """Sentences for the user."""
    stop: bool = False
    """Whether to stop after the current step."""
    poll_seconds: float = 0.0
    checkpoints: CheckpointHistory | None = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = CheckpointHistory(LocalBackend(self.folder), self.retain, self.best) if self.folder else None

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module itself."""
        return module

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a row."""
        self.rows.append((step, dict(metrics)))

    def reject(self, failures: list[Failure]) -> None:
        """Append videos that could not be read."""
        self.rejects += failures

    def notify(self, message: str) -> None:
        """Append a sentence."""
        self.messages.append(message)

    def saved(self, step: int) -> None:
        """Do nothing: nobody asks."""

    def stop_requested(self) -> bool:
        """Return whether `stop` has been set."""
        return self.stop

    def store_file(self, file: Path, name: str) -> None:
        """Copy a file beside the checkpoints."""
        if self.folder is not None:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, self.folder / name)

    def beat(self, phase: str) -> None:
        """Do nothing: there is no watchdog."""
