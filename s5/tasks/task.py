"""The protocol of a task, as the training loop uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from s5.batch import ClipBatch


class Task(Protocol):
    """A module that owns a model and its loss."""

    def __call__(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return `loss` and other scalars of this worker's rows; their means over workers are those of the batch."""

    def encode(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return the part of `__call__` that is computed row by row with gradient: tensors (B, ...), B rows."""

    def targets(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return the part that is computed row by row without gradient, such as by a momentum branch."""

    def losses(
        self, encoded: Mapping[str, Tensor], targets: Mapping[str, Tensor], batch: ClipBatch
    ) -> dict[str, Tensor]:
        """Return the scalars of `__call__` from the results of `encode` and `targets` for all rows of the batch."""

    def before_step(self, progress: float) -> None:
        """Set what follows a schedule; `progress` is the share of training done, 0 to 1."""

    def after_step(self, progress: float) -> dict[str, float]:
        """Update what is not trained by gradient, and return scalars to log."""
