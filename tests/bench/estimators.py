"""Ways to train a mask generator other than the package's own, to hold them against it (`tests/bench/selection.py`).

Each takes the place of a block's selection. They are plain autograd, slower than the package's fused operator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from s5.config import SelectionConfig
from s5.models.blocks import Block
from s5.models.decoders import Pyramid
from s5.models.selection import Selected, Selection, normalized_entropy
from s5.models.top_k import gumbel, rows, top
from s5.ssm.layers import SSMLayer

ALTERNATIVES = {
    "gate": "kept tokens are multiplied by 2 sigmoid(logit), in evaluation too (Mixture-of-Depths, 2404.02258)",
    "relaxed": "own, by sigmoid((score - tau) / rho), tau between the scores kept and discarded, and moving with them",
    "transport": "as relaxed, with the tau for which these sum to K: entropic transport (2002.06504)",
    "masked": "as transport; discarded tokens stay as zeros and are judged too, as in DynamicViT (2106.02034)",
    "baseline": "own, less the mean over the kept tokens of the gate's gradient",
    "noise shrinks": "own, Gumbel noise that shrinks to 0 in the course of training",
    "keep shrinks": "own, the keep ratio falls from 1 to its value in the first half of training",
    "learned scale": "own, logits of zero mean and unit deviation on a learned scale",
    "10 x lr": "own, ten times the learning rate for the generator",
    "0.1 x lr": "own, a tenth of the learning rate for the generator",
    "both sides": "own, GELU of momentum S4 features, forwards and backwards, each with weights of its own",
}
BISECTIONS = 40


def threshold(scores_BL: Tensor, k: int, temperature: float | Tensor) -> Tensor:
    """Return (B, 1), halfway between the lowest score kept and the highest discarded."""
    highest_BK = torch.topk(scores_BL, min(k + 1, scores_BL.shape[1]), dim=1).values
    return (highest_BK[:, k - 1 : k] + highest_BK[:, -1:]) / 2


def level(scores_BL: Tensor, k: int, temperature: float | Tensor) -> Tensor:
    """Return tau (B, 1), for which sigmoid((score - tau) / rho) sums to K."""
    low_B1 = scores_BL.amin(1, keepdim=True) - 50 * temperature
    high_B1 = scores_BL.amax(1, keepdim=True) + 50 * temperature
    for _ in range(BISECTIONS):
        middle_B1 = (low_B1 + high_B1) / 2
        too_many_B1 = torch.sigmoid((scores_BL - middle_B1) / temperature).sum(1, keepdim=True) > k
        low_B1, high_B1 = torch.where(too_many_B1, middle_B1, low_B1), torch.where(too_many_B1, high_B1, middle_B1)
    return (low_B1 + high_B1) / 2


def relaxed_top(
    scores_BL: Tensor,
    k: int,
    temperature: float | Tensor,
    tau: Callable[[Tensor, int, float | Tensor], Tensor] = threshold,
) -> Tensor:
    """Return sigmoid((score - tau) / rho), where tau moves with the scores so that the sum stays what it is."""
    fixed_BL = scores_BL.detach()
    tau_B1 = tau(fixed_BL, k, temperature)
    soft_BL = torch.sigmoid((fixed_BL - tau_B1) / temperature)
    slope_BL = soft_BL * (1 - soft_BL)
    moved_B1 = (slope_BL * (scores_BL - fixed_BL)).sum(1, keepdim=True) / slope_BL.sum(1, keepdim=True).clamp_min(1e-12)
    return torch.sigmoid((scores_BL - tau_B1 - moved_B1) / temperature)


class AlternativeSelection(Selection):
    """A selection whose gradient, noise, keep ratio or logits are one of `ALTERNATIVES`."""

    def __init__(self, config: SelectionConfig, online: SSMLayer, kind: str) -> None:
        super().__init__(config, online)
        self.kind = kind
        self.progress = 0.0
        self.factor = {"10 x lr": 10.0, "0.1 x lr": 0.1}.get(kind, 1.0)
        self.log_scale = nn.Parameter(torch.zeros(())) if kind == "learned scale" else None
        self.backwards = nn.Linear(online.ssm.width, 1, bias=False) if kind == "both sides" else None
        if isinstance(self.generator, nn.Linear):
            with torch.no_grad():
                self.generator.weight /= self.factor

    def set_progress(self, progress: float) -> None:
        super().set_progress(progress)
        self.progress = progress

    def logits(self, tokens_BLD: Tensor) -> Tensor:
        if self.backwards is not None:
            assert self.momentum is not None
            assert isinstance(self.generator, nn.Linear)
            tokens_BLD = tokens_BLD.detach()
            forwards_BLD, backwards_BLD = self.momentum(tokens_BLD), self.momentum(tokens_BLD.flip(1)).flip(1)
            scores_BL1: Tensor = self.generator(nn.functional.gelu(forwards_BLD))
            return (scores_BL1 + self.backwards(nn.functional.gelu(backwards_BLD)))[..., 0]
        logits_BL = super().logits(tokens_BLD) * self.factor
        if self.log_scale is not None:
            logits_BL = nn.functional.layer_norm(logits_BL, logits_BL.shape[1:]) * self.log_scale.exp()
        return logits_BL

    def forward(self, x_BLD: Tensor, tokens_BLD: Tensor, k: int, seeds_B: Tensor | None, stream: str) -> Selected:
        logits_BL = self.logits(tokens_BLD)
        uniform_BL = self.uniform(x_BLD, seeds_B, stream)
        scores_BL, length = logits_BL, x_BLD.shape[1]
        if uniform_BL is not None:
            scale = 1 - self.progress if self.kind == "noise shrinks" else 1.0
            scores_BL = logits_BL + scale * gumbel(uniform_BL)
        if self.training and self.kind == "keep shrinks":
            k = max(k, round(length - (length - k) * 2 * self.progress))
        indices_BK = top(scores_BL, k)
        picked_BKD = rows(x_BLD, indices_BK)
        if self.kind == "gate":
            picked_BKD = 2 * torch.sigmoid(logits_BL.gather(1, indices_BK))[..., None] * picked_BKD
        elif self.kind == "masked":
            hard_BL = torch.zeros_like(logits_BL).scatter(1, indices_BK, 1.0)
            soft_BL = relaxed_top(scores_BL, k, self.temperature, level)
            picked_BKD = (hard_BL + soft_BL - soft_BL.detach())[..., None] * x_BLD
        else:
            if self.kind in ("relaxed", "transport"):
                tau = threshold if self.kind == "relaxed" else level
                soft_BK = relaxed_top(scores_BL, k, self.temperature, tau).gather(1, indices_BK)
            else:
                soft_BK = torch.sigmoid(logits_BL.gather(1, indices_BK) / self.temperature)
            if self.kind == "baseline" and soft_BK.requires_grad:
                soft_BK.register_hook(lambda grad_BK: grad_BK - grad_BK.mean(1, keepdim=True))
            picked_BKD = picked_BKD + (soft_BK - soft_BK.detach())[..., None] * picked_BKD.detach()
        return Selected(picked_BKD, indices_BK, normalized_entropy(logits_BL))


def replace_selections(decoder: Pyramid, config: SelectionConfig, kind: str) -> None:
    """Give every block that selects the alternative of that name."""
    for block in decoder.blocks:
        if isinstance(block, Block) and isinstance(block.layer, SSMLayer) and block.selection is not None:
            block.selection = AlternativeSelection(config, block.layer, kind)
            block.fused = False
