"""The front of a state-space block as one operator with its own gradient: selection, LayerNorm and convolution.

Autograd would keep the normalised tokens and, where there is a selection, a copy of the tokens picked and the momentum
features. Here nothing of size (L, D) is kept but the block's input itself; the rest is made again, which costs a
normalisation and, for the mask generator, one transform of the tokens.

Shapes: B batch, L sequence, D width, K kept, M taps of a kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s5.models.selection import MomentumSSM, Selected, Selection, normalized_entropy
from s5.models.top_k import Estimator, check_count, gumbel_scores, own_gradient, rows, shared_gradient, spread, top
from s5.ssm.convolution import convolve, convolve_backward
from s5.ssm.layers import LinearSSM


class _Norm(NamedTuple):
    """LayerNorm's parameters; its arithmetic has their type, whatever that of the tokens."""

    weight_D: Tensor
    bias_D: Tensor
    epsilon: float

    def __call__(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised tokens, means and reciprocal standard deviations."""
        x_BLD = x_BLD.to(self.weight_D.dtype)
        return torch.native_layer_norm(x_BLD, [x_BLD.shape[2]], self.weight_D, self.bias_D, self.epsilon)


def _convolution_gradients(
    grad_BLD: Tensor, x_BLD: Tensor, norm: _Norm, kernel_DM: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `convolve(norm(x))` for x, the norm's weight and bias, and the kernel."""
    tokens_BLD, mean, scale = norm(x_BLD)
    grad_tokens_BLD, grad_kernel_DM = convolve_backward(
        grad_BLD.to(kernel_DM.dtype), tokens_BLD, kernel_DM, size, True, True
    )
    grad_x_BLD, grad_weight_D, grad_bias_D = torch.ops.aten.native_layer_norm_backward(
        grad_tokens_BLD,
        x_BLD.to(norm.weight_D.dtype),
        [x_BLD.shape[2]],
        mean,
        scale,
        norm.weight_D,
        norm.bias_D,
        [True, True, True],
    )
    return grad_x_BLD.to(x_BLD.dtype), grad_weight_D, grad_bias_D, grad_kernel_DM


class _NormedConvolution(torch.autograd.Function):
    """`convolve(norm(x))`, of which x alone is kept."""

    @staticmethod
    def forward(
        ctx: Any, x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, epsilon: float, kernel_DM: Tensor, size: int
    ) -> Tensor:
        ctx.save_for_backward(x_BLD, weight_D, bias_D, kernel_DM)
        ctx.epsilon, ctx.size = epsilon, size
        tokens_BLD, _, _ = _Norm(weight_D, bias_D, epsilon)(x_BLD)
        return convolve(tokens_BLD, kernel_DM, size).to(x_BLD.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight_D, bias_D, kernel_DM = ctx.saved_tensors
        norm = _Norm(weight_D, bias_D, ctx.epsilon)
        grad_x, grad_weight, grad_bias, grad_kernel = _convolution_gradients(grads[0], x_BLD, norm, kernel_DM, ctx.size)
        return grad_x, grad_weight, grad_bias, None, grad_kernel, None


def normed_convolution(x_BLD: Tensor, norm: nn.LayerNorm, ssm: LinearSSM) -> Tensor:
    """`ssm.convolve(norm(x))` with little memory: (B, L, D) -> (B, L, D), in the type of x."""
    y_BLD: Tensor = _NormedConvolution.apply(x_BLD, norm.weight, norm.bias, norm.eps, *ssm.taps(x_BLD.shape[1]))
    return y_BLD


class _SelectiveConvolution(torch.autograd.Function):
    """Scores of the linear mask generator, `select` and `convolve(norm(...))` of what is kept; x alone is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BLD: Tensor,
        weight_D: Tensor,
        bias_D: Tensor,
        epsilon: float,
        kernel_DM: Tensor,
        size: int,
        score_D: Tensor,
        momentum: MomentumSSM | None,
        k: int,
        temperature: Tensor,
        uniform_BL: Tensor | None,
        estimator: Estimator,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        all_BLD, _, _ = _Norm(weight_D, bias_D, epsilon)(x_BLD)
        logits_BL = all_BLD @ score_D if momentum is None else momentum.score(all_BLD, score_D)
        scores_BL = gumbel_scores(logits_BL, uniform_BL)
        indices_BK = top(scores_BL, k)
        y_BKD = convolve(rows(all_BLD, indices_BK), kernel_DM, size).to(x_BLD.dtype)
        ranked_BL = logits_BL if estimator == "own" else scores_BL
        ctx.save_for_backward(x_BLD, weight_D, bias_D, kernel_DM, ranked_BL, temperature.clone(), indices_BK)
        ctx.epsilon, ctx.size, ctx.momentum, ctx.estimator = epsilon, size, momentum, estimator
        ctx.mark_non_differentiable(indices_BK, logits_BL)
        return rows(x_BLD, indices_BK), y_BKD, indices_BK, logits_BL

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight_D, bias_D, kernel_DM, ranked_BL, temperature, indices_BK = ctx.saved_tensors
        norm = _Norm(weight_D, bias_D, ctx.epsilon)
        picked_BKD = rows(x_BLD, indices_BK)
        grad_BKD, grad_weight_D, grad_bias_D, grad_kernel_DM = _convolution_gradients(
            grads[1], picked_BKD, norm, kernel_DM, ctx.size
        )
        grad_BKD += grads[0]
        if ctx.estimator == "own":
            grad_logits_BL = own_gradient(picked_BKD, grad_BKD, ranked_BL, indices_BK, temperature)
        else:
            grad_soft_BL = shared_gradient(x_BLD, grad_BKD, ranked_BL.dtype)
            soft_BL = torch.softmax(ranked_BL / temperature, dim=1)
            # Softmax's gradient sums to 0, so that log_softmax passes it on as it is.
            grad_logits_BL = soft_BL * (grad_soft_BL - (soft_BL * grad_soft_BL).sum(1, keepdim=True)) / temperature
        all_BLD, _, _ = norm(x_BLD)
        if ctx.momentum is None:
            grad_score_D = torch.einsum("bl,bld->d", grad_logits_BL.to(all_BLD.dtype), all_BLD)
        else:
            grad_score_D = ctx.momentum.score_gradient(grad_logits_BL, all_BLD)
        grad_x_BLD = spread(grad_BKD, indices_BK, x_BLD.shape[1]) if ctx.needs_input_grad[0] else None
        nothing = (None,) * 5
        return grad_x_BLD, grad_weight_D, grad_bias_D, None, grad_kernel_DM, None, grad_score_D, *nothing


def selective_convolution(
    x_BLD: Tensor, norm: nn.LayerNorm, ssm: LinearSSM, selection: Selection, k: int, seeds_B: Tensor | None, stream: str
) -> tuple[Selected, Tensor]:
    """Select tokens and convolve them: `Selection.forward` and `ssm.convolve(norm(selected))` with little memory.

    Args:
        x_BLD: (B, L, D) block input.
        norm: the block's LayerNorm.
        ssm: the block's state space.
        selection: a selection with a linear mask generator.
        k: number of tokens to keep.
        seeds_B: (B,) seeds of the samples; needed in training.
        stream: name of the noise.

    Returns:
        What was kept, and the state space's output (B, K, D) for it, both in the type of x.

    Raises:
        ValueError: k is not in 1..L, the mask generator is not linear, or there are no seeds in training.
    """
    check_count(k, x_BLD.shape[1])
    if not isinstance(selection.generator, nn.Linear):
        raise ValueError(f"selection.generator is {selection.config.generator!r}: only the linear one can be fused")
    with torch.autocast(x_BLD.device.type, enabled=False):
        tokens_BKD, y_BKD, indices_BK, logits_BL = _SelectiveConvolution.apply(
            x_BLD,
            norm.weight,
            norm.bias,
            norm.eps,
            *ssm.taps(k),
            selection.generator.weight[0],
            selection.momentum,
            k,
            selection.temperature,
            selection.uniform(x_BLD, seeds_B, stream),
            selection.config.estimator,
        )
    overlap_B = selection.overlap(logits_BL, indices_BK, seeds_B, stream)
    return Selected(tokens_BKD, indices_BK, normalized_entropy(logits_BL), overlap_B), y_BKD
