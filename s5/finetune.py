"""The task of fine-tuning: a video model with a head, and cross-entropy or squared error."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s5.batch import ClipBatch
from s5.model import VideoModel


class Supervised(nn.Module):
    """Labelled clips to a loss."""

    def __init__(self, model: VideoModel, kind: Literal["class", "regression"]) -> None:
        super().__init__()
        self.model = model
        self.kind = kind

    def forward(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return the loss of a batch, accuracy where there are classes, and what the selection does, as scalars."""
        out = self.model(batch.long, batch.seeds)
        logits_BC = out.logits_BC.float()
        if self.kind == "class":
            hits = (logits_BC.argmax(1) == batch.labels).float().mean()
            scalars = {"loss": F.cross_entropy(logits_BC, batch.labels), "accuracy": hits}
        else:
            scalars = {"loss": F.mse_loss(logits_BC[:, 0], batch.targets)}
        scalars["keep_ratio"] = torch.full_like(scalars["loss"], out.keep_ratio)
        if out.entropy is not None:
            scalars["selection_entropy"] = out.entropy
        return scalars

    def before_step(self, progress: float) -> None:
        """Set the temperature of the selection."""
        self.model.decoder.set_progress(progress)

    def after_step(self, progress: float) -> dict[str, float]:
        """Update the momentum S4."""
        self.model.decoder.update_momentum()
        return {}
