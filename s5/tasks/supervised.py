"""The task of fine-tuning: a video model with a head, and cross-entropy or squared error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s5 import distributed
from s5.batch import ClipBatch
from s5.config import ViewsConfig
from s5.models.video_model import VideoModel
from s5.tasks.augment import augment


class Supervised(nn.Module):
    """Labelled clips to a loss."""

    def __init__(
        self, model: VideoModel, kind: Literal["class", "regression", "distant"], views: ViewsConfig | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.views = views or ViewsConfig()

    def forward(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return scalars: the loss of a batch, accuracy where there are classes, and metrics of the selection."""
        return self.losses(self.encode(batch), self.targets(batch), batch)

    def encode(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return each clip's scores (B, C), the share of tokens kept, and what the selection does (B,)."""
        out = self.model(augment(batch.long, batch.seeds, "long", self.views), batch.seeds)
        logits_BC = out.logits_BC.float()
        rows = {"logits": logits_BC, "keep_ratio": torch.full_like(logits_BC[:, 0], out.keep_ratio)}
        return rows | {f"selection_{name}": value.expand(len(batch.long)) for name, value in out.selection.items()}

    def targets(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return nothing: labels come with the batch."""
        return {}

    def losses(
        self, encoded: Mapping[str, Tensor], targets: Mapping[str, Tensor], batch: ClipBatch
    ) -> dict[str, Tensor]:
        """Return the scalars of a batch from the results of its clips."""
        logits_BC = encoded["logits"]
        scalars = self.objective(logits_BC, targets, batch)
        scalars |= {name: values.float().mean() for name, values in encoded.items() if name != "logits"}
        weight = distributed.weight(len(logits_BC), batch.total)
        return {name: value * weight for name, value in scalars.items()}

    def objective(self, logits_BC: Tensor, targets: Mapping[str, Tensor], batch: ClipBatch) -> dict[str, Tensor]:
        """Return the loss, a mean over this worker's clips, and the accuracy where there are classes."""
        if self.kind == "class":
            hits = (logits_BC.argmax(1) == batch.labels).float().mean()
            return {"loss": F.cross_entropy(logits_BC, batch.labels), "accuracy": hits}
        return {"loss": F.mse_loss(logits_BC[:, 0], batch.targets)}

    def before_step(self, progress: float) -> None:
        """Set the temperature of the selection."""
        self.model.decoder.set_progress(progress)

    def after_step(self, progress: float) -> dict[str, float]:
        """Update the momentum S4."""
        self.model.decoder.update_momentum()
        return {}
