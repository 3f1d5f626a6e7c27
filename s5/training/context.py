"""What the training loop sees of its surroundings: the context of one training process."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from s5.checkpoints.backend import LocalStore
from s5.checkpoints.retention import Checkpoints
from s5.errors import Failure


class WorkerContext(Protocol):
    """The surroundings of one training process."""

    rank: int
    world_size: int
    device: torch.device
    checkpoints: Checkpoints | None
    """Those of the run; None keeps none."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose backward pass averages gradients over the workers."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand on a row of metrics; called on rank 0, from any thread."""

    def reject(self, failures: list[Failure]) -> None:
        """Hand on videos that could not be read; called on the rank that met them."""

    def tell(self, message: str) -> None:
        """Hand on a sentence for the user; called on rank 0, from any thread."""

    def saved(self, step: int) -> None:
        """Take note that there is a checkpoint of that step: on the store now, or gone on from; on rank 0."""

    def stop_requested(self) -> bool:
        """Return whether this process has been asked to stop."""

    def keep_file(self, file: Path, name: str) -> None:
        """Store a file among the run's results; called on rank 0."""

    def beat(self, phase: str) -> None:
        """Take note that this process is alive and what it does next, such as "step 7: waiting for data"."""


@dataclass
class SoloContext:
    """One process without Ray: tests, a single machine, and the baseline that Ray's overhead is measured against."""

    folder: Path | None = None
    """Where checkpoints go, one folder a step; None keeps none."""
    keep: int = 2
    """Checkpoints kept."""
    best: tuple[str, str] | None = None
    """Metric of the evaluation by which the best checkpoint is kept too, and `max` or `min`."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """All rows logged, with their steps."""
    rejects: list[Failure] = field(default_factory=list)
    """Videos that could not be read."""
    told: list[str] = field(default_factory=list)
    """What the user was told."""
    stop: bool = False
    """Whether to stop after the current step."""
    checkpoints: Checkpoints | None = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(LocalStore(self.folder), self.keep, self.best) if self.folder else None

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module itself."""
        return module

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a row."""
        self.rows.append((step, dict(metrics)))

    def reject(self, failures: list[Failure]) -> None:
        """Append videos that could not be read."""
        self.rejects += failures

    def tell(self, message: str) -> None:
        """Append a sentence."""
        self.told.append(message)

    def saved(self, step: int) -> None:
        """Do nothing: `checkpoints` knows."""

    def stop_requested(self) -> bool:
        """Return whether `stop` has been set."""
        return self.stop

    def keep_file(self, file: Path, name: str) -> None:
        """Copy a file beside the checkpoints."""
        if self.folder is not None:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, self.folder / name)

    def beat(self, phase: str) -> None:
        """Do nothing: nobody watches."""
