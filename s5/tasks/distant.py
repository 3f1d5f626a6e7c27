"""The task of distant supervision (arXiv 2201.10990): clips of narrated segments to soft labels of written steps.

Shapes: B clips, S steps, K steps of a label, N narrated segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from s5.batch import ClipBatch
from s5.config import ViewsConfig
from s5.models.video_model import VideoModel
from s5.tasks.supervised import Supervised


@dataclass(frozen=True)
class StepLabels:
    """Soft labels of N narrated segments: the K steps that each may show, and their probabilities."""

    rows: Mapping[str, int]
    """Row of each segment by its id, which is the `video_id` of its clips."""
    steps_NK: Tensor
    """Steps, int64 (N, K), the likeliest first."""
    probabilities_NK: Tensor
    """Their probabilities, float32 (N, K); a row sums to 1."""

    def of(self, segments: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return steps and probabilities (B, K) of some segments."""
        rows_B = torch.tensor([self.rows[segment] for segment in segments], dtype=torch.int64)
        return self.steps_NK[rows_B], self.probabilities_NK[rows_B]


def step_divergence(logits_BS: Tensor, steps_BK: Tensor, probabilities_BK: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence (B,) of predicted steps from soft labels, in fp32.

    Steps that a label lacks have probability 0 and add nothing, so that only K of S terms are computed.
    """
    predicted_BK = F.log_softmax(logits_BS.float(), dim=1).gather(1, steps_BK)
    return (torch.xlogy(probabilities_BK, probabilities_BK) - probabilities_BK * predicted_BK).sum(1)


class Distant(Supervised):
    """Narrated clips to the divergence of the predicted steps from the soft labels of what is said meanwhile."""

    def __init__(self, model: VideoModel, labels: StepLabels, views: ViewsConfig | None = None) -> None:
        super().__init__(model, "distant", views)
        self.labels = labels

    def targets(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return the steps of each clip's label and their probabilities (B, K)."""
        steps_BK, probabilities_BK = self.labels.of(batch.video_ids)
        device = batch.seeds.device
        return {"steps": steps_BK.to(device), "probabilities": probabilities_BK.to(device)}

    def scores(self, batch: ClipBatch) -> Tensor:
        """Return of each clip (B, 2) the divergence, and 1 where the predicted step is the label's likeliest, else 0.

        For evaluation, where the predictions of all clips need not be kept.
        """
        logits_BS, targets = self.model(batch.long).logits_BC, self.targets(batch)
        hits_B = (logits_BS.argmax(1) == targets["steps"][:, 0]).float()
        return torch.stack([step_divergence(logits_BS, targets["steps"], targets["probabilities"]), hits_B], dim=1)

    def objective(self, logits_BC: Tensor, targets: Mapping[str, Tensor], batch: ClipBatch) -> dict[str, Tensor]:
        """Return the mean divergence, and how often the predicted step is the label's likeliest."""
        loss = step_divergence(logits_BC, targets["steps"], targets["probabilities"]).mean()
        return {"loss": loss, "accuracy": (logits_BC.argmax(1) == targets["steps"][:, 0]).float().mean()}
