"""What the training loop asks of a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from s5.batch import ClipBatch


class Task(Protocol):
    """What is trained: a module that owns the model and the loss."""

    def __call__(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return `loss` and other scalars of this worker's share of a batch: their mean over workers is the batch's."""

    def encode(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return, with gradient, what of `__call__` belongs to each row alone: (B, ...), B rows."""

    def targets(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return the same without gradient, of what is not trained."""

    def losses(
        self, encoded: Mapping[str, Tensor], targets: Mapping[str, Tensor], batch: ClipBatch
    ) -> dict[str, Tensor]:
        """Return `__call__`'s scalars from what `encode` and `targets` make of the batch's rows."""

    def before_step(self, progress: float) -> None:
        """Set what follows a schedule, for a share of the training from 0 to 1."""

    def after_step(self, progress: float) -> dict[str, float]:
        """Update what is not trained by gradient; return what is to be logged of it."""
