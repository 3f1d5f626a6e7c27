"""Keep K of L tokens, the highest of noisy scores, with a gradient for the scores: Gumbel top-K, straight-through.

Source: "Selective Structured State-Spaces for Long-Form Video Understanding", arXiv 2303.14526, section 3. The exact
form of the `shared` gradient is from the paper's presentation, not checked against its text. The `own` gradient, the
default, is ours: docs/selection.md has what was measured.

Shapes: B batch, L sequence, D width, K kept.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Estimator = Literal["own", "shared"]

_EPSILON = 1e-20
"""Keeps the logarithms of Gumbel noise finite; far below the resolution of the uniform numbers."""


def keep_count(keep_ratio: float, length: int) -> int:
    """Number of tokens K to keep of `length`: the rounded share, at least 1."""
    return max(1, round(keep_ratio * length))


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(u + eps) + eps) from u in [0, 1)."""
    return -torch.log(-torch.log(uniform + _EPSILON) + _EPSILON)


class _PickShared(torch.autograd.Function):
    """Rows of x, whose gradient also reaches the soft weights as if each row were their weighted mean."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, soft_BL: Tensor, indices_BK: Tensor) -> Tensor:
        ctx.save_for_backward(x_BLD, indices_BK)
        ctx.soft_dtype = soft_BL.dtype
        return rows(x_BLD, indices_BK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_BKD,) = grads
        x_BLD, indices_BK = ctx.saved_tensors
        grad_x_BLD = grad_soft_BL = None
        if ctx.needs_input_grad[0]:
            grad_x_BLD = spread(grad_BKD, indices_BK, x_BLD.shape[1])
        if ctx.needs_input_grad[1]:
            grad_soft_BL = shared_gradient(x_BLD, grad_BKD, ctx.soft_dtype)
        return grad_x_BLD, grad_soft_BL, None


class _PickOwn(torch.autograd.Function):
    """Rows of x, whose gradient also reaches their logits as if each row were multiplied by sigmoid(logit / rho)."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, logits_BL: Tensor, indices_BK: Tensor, temperature: Tensor) -> Tensor:
        picked_BKD = rows(x_BLD, indices_BK)
        ctx.save_for_backward(picked_BKD, logits_BL, indices_BK, temperature.clone())
        return picked_BKD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad_BKD,) = grads
        picked_BKD, logits_BL, indices_BK, temperature = ctx.saved_tensors
        grad_x_BLD = grad_logits_BL = None
        if ctx.needs_input_grad[0]:
            grad_x_BLD = spread(grad_BKD, indices_BK, logits_BL.shape[1])
        if ctx.needs_input_grad[1]:
            grad_logits_BL = own_gradient(picked_BKD, grad_BKD, logits_BL, indices_BK, temperature)
        return grad_x_BLD, grad_logits_BL, None, None


def own_gradient(
    picked_BKD: Tensor, grad_BKD: Tensor, logits_BL: Tensor, indices_BK: Tensor, temperature: Tensor
) -> Tensor:
    """Gradient (B, L) of the logits, where each picked row is multiplied by sigmoid(logit / rho); 0 for the others."""
    gate_BK = torch.sigmoid(logits_BL.gather(1, indices_BK) / temperature)
    product_BK = (picked_BKD * grad_BKD).sum(2, dtype=logits_BL.dtype)
    own_BK = product_BK * gate_BK * (1 - gate_BK) / temperature
    return torch.zeros_like(logits_BL).scatter(1, indices_BK, own_BK.to(logits_BL.dtype))


def spread(grad_BKD: Tensor, indices_BK: Tensor, length: int) -> Tensor:
    """Gradient (B, L, D) of `rows`: each of the K rows at its index, 0 elsewhere."""
    batch, _, width = grad_BKD.shape
    grad_BLD = grad_BKD.new_zeros(batch, length, width)
    # No index occurs twice: a copy, which is deterministic, stands for a sum.
    grad_BLD.flatten(0, 1).index_copy_(0, _flat_indices(indices_BK, length), grad_BKD.flatten(0, 1))
    return grad_BLD


def shared_gradient(x_BLD: Tensor, grad_BKD: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient (B, L) of the soft weights, which every picked row is a weighted mean by."""
    total_BD = grad_BKD.sum(1, dtype=dtype).to(x_BLD.dtype)
    return torch.bmm(x_BLD, total_BD[..., None])[..., 0].to(dtype)


def _flat_indices(indices_BK: Tensor, length: int) -> Tensor:
    """Row numbers (B * K,) in the (B * L, D) view of the tokens."""
    starts = torch.arange(indices_BK.shape[0], device=indices_BK.device) * length
    return (indices_BK + starts[:, None]).flatten()


def rows(x_BLD: Tensor, indices_BK: Tensor) -> Tensor:
    """Tokens (B, K, D) at the indices."""
    picked = x_BLD.flatten(0, 1).index_select(0, _flat_indices(indices_BK, x_BLD.shape[1]))
    return picked.view(*indices_BK.shape, x_BLD.shape[2])


def check_count(k: int, length: int) -> None:
    """Raise `ValueError` unless 1 <= k <= length."""
    if not 1 <= k <= length:
        raise ValueError(f"k is {k}: give 1 to {length}, the number of tokens")


def gumbel_scores(logits_BL: Tensor, gumbel_uniform_BL: Tensor | None) -> Tensor:
    """log p, plus Gumbel noise where there is any, in fp32 at least."""
    dtype = torch.promote_types(logits_BL.dtype, torch.float32)
    scores_BL = torch.log_softmax(logits_BL.to(dtype), dim=1)
    return scores_BL if gumbel_uniform_BL is None else scores_BL + gumbel(gumbel_uniform_BL)


def top(scores_BL: Tensor, k: int) -> Tensor:
    """Indices of the K highest scores in order of time. The stable sort makes ties fall to the earlier token."""
    order_BL = torch.argsort(scores_BL.detach(), dim=1, descending=True, stable=True)
    return order_BL[:, :k].sort(dim=1).values


def select(
    x_BLD: Tensor,
    logits_BL: Tensor,
    k: int,
    temperature: float | Tensor = 1.0,
    gumbel_uniform_BL: Tensor | None = None,
    estimator: Estimator = "own",
) -> tuple[Tensor, Tensor]:
    """Keep K of L tokens without replacement, in order of time (arXiv 2303.14526, section 3).

    The K highest `log p + g` are kept, g Gumbel noise; values are those of the tokens picked. The gradient also reaches
    the logits s, and no matrix of size (K, L) is built:

    - `own`: that of `x_k + (sigmoid(s_k / rho) stop(x_k) - stop(...))` at each kept token k. Ours.
    - `shared`: with y = softmax((log p + g) / rho), one and the same for all picks, that of
      `x_k + (stop(x)^T y - stop(...))`, the paper's straight-through Gumbel-softmax.

    Args:
        x_BLD: (B, L, D) tokens.
        logits_BL: (B, L) scores; compared in fp32 at least.
        k: number K of tokens to keep, 1 to L.
        temperature: rho.
        gumbel_uniform_BL: (B, L) uniform numbers in [0, 1); None for plain, deterministic top-K.
        estimator: what gives the logits their gradient.

    Returns:
        Tokens (B, K, D) in the type of x, and their ascending indices (B, K), int64.

    Raises:
        ValueError: k is not in 1..L.
    """
    check_count(k, x_BLD.shape[1])
    with torch.autocast(x_BLD.device.type, enabled=False):
        scores_BL = gumbel_scores(logits_BL, gumbel_uniform_BL)
        indices_BK = top(scores_BL, k)
        if estimator == "own":
            exact_BL = logits_BL.to(scores_BL.dtype)
            rho = torch.as_tensor(temperature, dtype=exact_BL.dtype, device=exact_BL.device)
            picked_BKD: Tensor = _PickOwn.apply(x_BLD, exact_BL, indices_BK, rho)
        else:
            soft_BL = torch.softmax(scores_BL / temperature, dim=1)
            picked_BKD = _PickShared.apply(x_BLD, soft_BL, indices_BK)
    return picked_BKD, indices_BK


def select_reference(
    x_BLD: Tensor,
    logits_BL: Tensor,
    k: int,
    temperature: float | Tensor = 1.0,
    gumbel_uniform_BL: Tensor | None = None,
    estimator: Estimator = "own",
) -> tuple[Tensor, Tensor]:
    """Reference of `select`: a (K, L) one-hot matrix with straight-through gradient, O(K L D)."""
    check_count(k, x_BLD.shape[1])
    scores_BL = gumbel_scores(logits_BL, gumbel_uniform_BL)
    indices_BK = torch.topk(scores_BL, k, dim=1).indices.sort(dim=1).values
    hard_BKL = torch.nn.functional.one_hot(indices_BK, x_BLD.shape[1]).to(scores_BL.dtype)
    if estimator == "own":
        soft_BKL = hard_BKL * torch.sigmoid(logits_BL.to(scores_BL.dtype) / temperature)[:, None]
    else:
        soft_BKL = torch.softmax(scores_BL / temperature, dim=1)[:, None].expand_as(hard_BKL)
    picked_BKD = torch.einsum("bkl,bld->bkd", hard_BKL, x_BLD)
    # Of the soft part the weights alone get a gradient.
    blurred_BKD = torch.einsum("bkl,bld->bkd", soft_BKL - soft_BKL.detach(), x_BLD.detach())
    return picked_BKD + blurred_BKD, indices_BK
