"""Token selection of S5: momentum S4 and mask generator, which score the tokens that `top_k` keeps, and what it logs.

Source: "Selective Structured State-Spaces for Long-Form Video Understanding", arXiv 2303.14526, section 3. The exact
form of the mask generators is from the paper's presentation, not checked against its text.

Shapes: B batch, L sequence, D width, K kept.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from s5 import rng
from s5.config import SelectionConfig
from s5.models.top_k import gumbel_scores, select
from s5.ssm.convolution import convolve_score, convolve_score_backward
from s5.ssm.layers import LinearSSM, SSMLayer


def normalized_entropy(logits_BL: Tensor) -> Tensor:
    """Entropy of softmax(logits) over log L, averaged over the batch: 0 one token, 1 uniform (also where L is 1)."""
    log_p_BL = torch.log_softmax(logits_BL.detach().float(), dim=1)
    length = logits_BL.shape[1]
    if length == 1:
        return log_p_BL.new_ones(())
    return -(log_p_BL.exp() * log_p_BL).sum(1).mean() / math.log(length)


def overlap(first_BK: Tensor, second_BK: Tensor, length: int) -> Tensor:
    """Share (B,) of the first kept set that is in the second one too; K / L on average where both are random."""
    shape = (first_BK.shape[0], length)
    second_BL = torch.zeros(shape, dtype=torch.bool, device=first_BK.device).scatter(1, second_BK, True)
    return second_BL.gather(1, first_BK).float().mean(1)


def frame_spread(indices_BK: Tensor, length: int, frames: int) -> Tensor:
    """How much the share kept differs from frame to frame, (B,): 1 as much as at random, 0 equal shares.

    It is the standard deviation over frames, divided by that of K tokens drawn without replacement; 1 where nothing can
    differ, since there is one frame or all is kept. With one token a frame it is always 1.
    """
    k = indices_BK.shape[1]
    if frames == 1 or k == length:
        return indices_BK.new_ones(indices_BK.shape[0], dtype=torch.float32)
    ones_BK = torch.ones_like(indices_BK, dtype=torch.float32)
    counts_BT = ones_BK.new_zeros(indices_BK.shape[0], frames).scatter_add(1, indices_BK * frames // length, ones_BK)
    # Variance of the hypergeometric distribution: `each` tokens of a frame, of which K of L are drawn.
    each = length / frames
    at_random = each * (k / length) * (1 - k / length) * (length - each) / (length - 1)
    return counts_BT.std(1, correction=0) / math.sqrt(at_random)


class MomentumSSM(nn.Module):
    """Exponential moving average of a block's state space, which gives every token its global context.

    Its parameters take no gradient, which also keeps them from the optimiser, and are part of the state dict. The
    average is of the linear state space alone; `MomentumLayer` is that of a whole S4 layer.
    """

    average: nn.Module

    def __init__(self, layer: SSMLayer, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.average = copy.deepcopy(self.averaged(layer)).requires_grad_(False)

    def averaged(self, layer: SSMLayer) -> nn.Module:
        """Part of the block's layer that this is an average of."""
        return layer.ssm

    @property
    def ssm(self) -> LinearSSM:
        """The averaged state space."""
        return cast(LinearSSM, self.average)

    @torch.no_grad()
    def update(self, layer: SSMLayer) -> None:
        """Move towards the block's layer: average = momentum * average + (1 - momentum) * online."""
        online = self.averaged(layer)
        torch._foreach_lerp_(list(self.average.parameters()), list(online.parameters()), 1 - self.momentum)

    @torch.no_grad()
    def reset(self, layer: SSMLayer) -> None:
        """Become a copy of the block's layer."""
        torch._foreach_copy_(list(self.average.parameters()), list(self.averaged(layer).parameters()))

    @torch.no_grad()
    def forward(self, x_BLD: Tensor) -> Tensor:
        """Output (B, L, D) for tokens (B, L, D), without gradient."""
        return self.ssm.convolve(x_BLD)

    def score(self, x_BLD: Tensor, weight_D: Tensor) -> Tensor:
        """`forward(x) @ weight`, (B, L), with a gradient for the weight alone and without the features in between."""
        with torch.no_grad():
            kernel_DM, size = self.ssm.taps(x_BLD.shape[1])
        logits_BL: Tensor = convolve_score(x_BLD, kernel_DM, size, weight_D)
        return logits_BL

    @torch.no_grad()
    def score_gradient(self, grad_BL: Tensor, x_BLD: Tensor) -> Tensor:
        """Gradient (D,) of `score` for the weight."""
        weight_D: Tensor = convolve_score_backward(grad_BL, x_BLD, *self.ssm.taps(x_BLD.shape[1]))
        return weight_D


class MomentumLayer(MomentumSSM):
    """Exponential moving average of a block's whole S4 layer: state space, GELU and linear mix of the channels.

    A linear mask generator after the mix reads `(W gelu(y) + b) . w = gelu(y) . (W^T w) + b . w`. The mixed features
    are not built: b . w is the same for all tokens, and W^T w is one vector.
    """

    def averaged(self, layer: SSMLayer) -> nn.Module:
        """Part of the block's layer that this is an average of."""
        return layer

    @property
    def layer(self) -> SSMLayer:
        """The averaged layer."""
        return cast(SSMLayer, self.average)

    @property
    def ssm(self) -> LinearSSM:
        """The averaged state space."""
        return self.layer.ssm

    @torch.no_grad()
    def forward(self, x_BLD: Tensor) -> Tensor:
        """Output (B, L, D) for tokens (B, L, D), without gradient; in the parameters' type under autocast too."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            y_BLD: Tensor = self.layer(x_BLD.to(self.layer.output.weight.dtype))
        return y_BLD

    def score(self, x_BLD: Tensor, weight_D: Tensor) -> Tensor:
        """`forward(x) @ weight`, (B, L), with a gradient for the weight alone."""
        output = self.layer.output
        with torch.autocast(x_BLD.device.type, enabled=False):
            return self._activated(x_BLD) @ (weight_D @ output.weight) + weight_D @ output.bias

    @torch.no_grad()
    def score_gradient(self, grad_BL: Tensor, x_BLD: Tensor) -> Tensor:
        """Gradient (D,) of `score` for the weight."""
        output = self.layer.output
        with torch.autocast(x_BLD.device.type, enabled=False):
            grad_BL = grad_BL.to(output.weight.dtype)
            total_D = torch.einsum("bl,bld->d", grad_BL, self._activated(x_BLD))
            return output.weight @ total_D + grad_BL.sum() * output.bias

    @torch.no_grad()
    def _activated(self, x_BLD: Tensor) -> Tensor:
        return nn.functional.gelu(self.ssm.convolve(x_BLD.to(self.layer.output.weight.dtype)))


MOMENTUM_S4 = {"convolution": MomentumSSM, "layer": MomentumLayer}


def undecided(width: int) -> nn.Linear:
    """Return a linear layer to one score, without bias, that scores all tokens alike until it has learned.

    Kept tokens alone are judged: what a random direction discards at first may never be kept again (docs/selection.md).
    """
    linear = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def _score(features_BLD: Tensor, linear: nn.Linear) -> Tensor:
    """Logits (B, L) of a linear layer, in its own type under autocast too: bf16 would round them to ties."""
    weight_D = linear.weight[0]
    with torch.autocast(weight_D.device.type, enabled=False):
        return features_BLD.to(weight_D.dtype) @ weight_D


class TransformerGenerator(nn.Module):
    """Mask generator of one transformer layer and a linear one: (B, L, D) -> logits (B, L)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Dropout would draw from the worker's generator instead of the sample's.
        self.layer = nn.TransformerEncoderLayer(
            width, math.gcd(width, 8), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.score = undecided(width)

    def forward(self, features_BLD: Tensor) -> Tensor:
        """Logits (B, L)."""
        return _score(self.layer(features_BLD), self.score)


class Selected(NamedTuple):
    """What a selection kept."""

    tokens: Tensor
    """(B, K, D)."""
    indices: Tensor
    """(B, K) int64, ascending positions in the sequence."""
    entropy: Tensor
    """Normalised entropy of p, 0 to 1, without gradient."""
    overlap_B: Tensor | None = None
    """Share of the tokens that other noise would keep as well; in training alone."""


def describe(selected: Selected, length: int, frames: int) -> dict[str, Tensor]:
    """Return by name what shows whether a selection is random: entropy, frame spread and, where known, overlap.

    Args:
        selected: what was kept of the sequence.
        length: tokens of the sequence.
        frames: frames that they come from, in order of time.
    """
    found = {"entropy": selected.entropy, "frame_spread": frame_spread(selected.indices, length, frames)}
    return found if selected.overlap_B is None else found | {"overlap": selected.overlap_B}


class Selection(nn.Module):
    """Mask generator over momentum S4 or backbone features, and the selection that follows from it.

    Neither kind of features carries a gradient back to the tokens, so that only the generator learns what to keep. The
    logits have no bias, to which softmax and top-K are blind. In evaluation, noise is the
    same for every clip, whatever its seed, or there is none.

    Args:
        config: settings; `generator` is not `none`.
        online: layer of the block that the momentum S4 is an average of.

    Raises:
        ValueError: the generator is `none`.
    """

    temperature: Tensor

    def __init__(self, config: SelectionConfig, online: SSMLayer) -> None:
        super().__init__()
        if config.generator == "none":
            raise ValueError("selection.generator is 'none': leave the selection out of the block")
        self.config = config
        uses_momentum = config.features == "s4" and config.generator != "random"
        self.momentum = MOMENTUM_S4[config.momentum_s4](online, config.momentum) if uses_momentum else None
        self.generator: nn.Linear | TransformerGenerator | None = None
        if config.generator == "linear":
            self.generator = undecided(online.ssm.width)
        elif config.generator == "transformer":
            self.generator = TransformerGenerator(online.ssm.width)
        # A tensor, and filled in place: a number would be compiled in again at each change.
        self.register_buffer("temperature", torch.tensor(config.temperature), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Set the temperature for a share of the training, 0 to 1: exponential from start to end.

        Raises:
            ValueError: `progress` is not in [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}: give the share of the training that is done, 0 to 1")
        start, end = self.config.temperature, self.config.temperature_end
        self.temperature.fill_(start * (end / start) ** progress)

    def logits(self, tokens_BLD: Tensor) -> Tensor:
        """Logits (B, L) of normalised tokens, constant for random selection; no gradient for the tokens."""
        tokens_BLD = tokens_BLD.detach()
        if self.generator is None:
            return tokens_BLD.new_zeros(tokens_BLD.shape[:2], dtype=torch.float32)
        if isinstance(self.generator, nn.Linear) and self.momentum is not None:
            return self.momentum.score(tokens_BLD, self.generator.weight[0])
        features_BLD = tokens_BLD if self.momentum is None else self.momentum(tokens_BLD)
        if isinstance(self.generator, nn.Linear):
            return _score(features_BLD, self.generator)
        logits_BL: Tensor = self.generator(features_BLD)
        return logits_BL

    def uniform(self, x_BLD: Tensor, seeds_B: Tensor | None, stream: str) -> Tensor | None:
        """Uniform numbers (B, L) for the Gumbel noise; None for plain top-K.

        Raises:
            ValueError: there are no seeds in training.
        """
        if not self.training:
            if self.generator is not None and self.config.noise == "training":
                return None
            # Whoever evaluates a clip, in whatever batch, gets the same answer.
            seeds_B = torch.zeros(x_BLD.shape[0], dtype=torch.int64, device=x_BLD.device)
        elif seeds_B is None:
            raise ValueError("seeds_B is None: give a seed a sample, or rng.fresh_seeds, in training")
        return rng.uniform(seeds_B, stream, x_BLD.shape[1])

    def forward(self, x_BLD: Tensor, tokens_BLD: Tensor, k: int, seeds_B: Tensor | None, stream: str) -> Selected:
        """Keep K tokens of the block's input.

        Args:
            x_BLD: (B, L, D) block input, from which tokens are taken.
            tokens_BLD: (B, L, D) the same after the block's LayerNorm, which the generator judges.
            k: number of tokens to keep.
            seeds_B: (B,) seeds of the samples; needed in training.
            stream: name of the noise.

        Raises:
            ValueError: k is not in 1..L, or there are no seeds in training.
        """
        logits_BL = self.logits(tokens_BLD)
        uniform_BL = self.uniform(x_BLD, seeds_B, stream)
        tokens_BKD, indices_BK = select(x_BLD, logits_BL, k, self.temperature, uniform_BL, self.config.estimator)
        overlap_B = self.overlap(logits_BL, indices_BK, seeds_B, stream)
        return Selected(tokens_BKD, indices_BK, normalized_entropy(logits_BL), overlap_B)

    @torch.no_grad()
    def overlap(self, logits_BL: Tensor, indices_BK: Tensor, seeds_B: Tensor | None, stream: str) -> Tensor | None:
        """Share (B,) of the kept tokens that other noise keeps as well; None in evaluation."""
        if not self.training or seeds_B is None:
            return None
        length = logits_BL.shape[1]
        scores_BL = gumbel_scores(logits_BL, rng.uniform(seeds_B, f"{stream}.again", length))
        return overlap(indices_BK, torch.topk(scores_BL, indices_BK.shape[1]).indices, length)
