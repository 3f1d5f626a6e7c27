"""Attention layers of the peers: full softmax attention, FAVOR+ of Performer, orthogonal prototypes of Orthoformer.

Shapes: B batch, H heads, L sequence, D width, E = D / H width of a head, M random features or prototypes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from s5.config import AttentionConfig, DecoderName


def softmax_attention(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V with the (L, L) matrix in memory; the reference of every other attention here."""
    scores_BHLL = (q_BHLE / math.sqrt(q_BHLE.shape[-1])) @ k_BHLE.mT
    return scores_BHLL.softmax(-1).to(v_BHLE.dtype) @ v_BHLE


def orthogonal_features(features: int, width: int) -> Tensor:
    """Draw (features, width) random directions from torch's generator (arXiv 2009.14794).

    Each is normally distributed with unit covariance; those of one block of `width` rows are orthogonal.
    """
    blocks = math.ceil(features / width)
    basis, triangle = torch.linalg.qr(torch.randn(blocks, width, width))
    # With the signs of the triangle's diagonal, the basis is uniform among the orthogonal ones.
    rows = (basis * triangle.diagonal(dim1=1, dim2=2).sgn()[:, None]).mT.flatten(0, 1)[:features]
    directions_ME: Tensor = rows * torch.randn(features, width).norm(dim=1, keepdim=True)
    return directions_ME


def _kernel_features(q_BHLE: Tensor, k_BHLE: Tensor, w_ME: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms (B, H, L, M) of the features, up to a factor for each query, which the normalisation removes."""
    scale = q_BHLE.shape[-1] ** -0.25
    k_BHLE = k_BHLE * scale
    return (q_BHLE * scale) @ w_ME.mT, k_BHLE @ w_ME.mT - k_BHLE.square().sum(-1, keepdim=True) / 2


def favor_attention(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, w_ME: Tensor) -> Tensor:
    """FAVOR+: softmax attention estimated with positive random features, O(L M E) (arXiv 2009.14794, section 2).

    With the features `exp(w.k - |k|^2 / 2)` of a key, attention is a mean over features of means over keys: each
    feature averages the values by its own weights, and each query averages the features by `w.q` plus the logarithm of
    the feature's sum. Both are softmaxes, which cannot overflow, nor divide by less than one: unlike the paper's code,
    there is no small constant that changes the result.

    Args:
        q_BHLE: (B, H, L, E) queries.
        k_BHLE: (B, H, L, E) keys.
        v_BHLE: (B, H, L, E) values.
        w_ME: (M, E) random directions.

    Returns:
        (B, H, L, E) in the type of v; computed in fp32 at least.
    """
    dtype = torch.promote_types(v_BHLE.dtype, torch.float32)
    with torch.autocast(v_BHLE.device.type, enabled=False):
        q_BHLM, k_BHLM = _kernel_features(q_BHLE.to(dtype), k_BHLE.to(dtype), w_ME.to(dtype))
        # What is taken from the keys here comes back with the queries, so it needs no gradient.
        peak_BH1M = k_BHLM.detach().amax(2, keepdim=True)
        k_BHLM = torch.exp(k_BHLM - peak_BH1M)
        sum_BH1M = k_BHLM.sum(2, keepdim=True)
        means_BHME = k_BHLM.mT @ v_BHLE.to(dtype) / sum_BH1M.mT
        y_BHLE = torch.softmax(q_BHLM + (peak_BH1M + sum_BH1M.log()), dim=-1) @ means_BHME
    return y_BHLE.to(v_BHLE.dtype)


def favor_reference(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, w_ME: Tensor) -> Tensor:
    """Reference of `favor_attention`: the estimated (L, L) kernel, its rows divided by their sums, O(L^2 M)."""
    q_BHLM, k_BHLM = _kernel_features(q_BHLE, k_BHLE, w_ME)
    kernel_BHLL = torch.exp(q_BHLM[:, :, :, None] + k_BHLM[:, :, None]).mean(-1)
    return (kernel_BHLL / kernel_BHLL.sum(-1, keepdim=True)) @ v_BHLE


@torch.no_grad()
def orthogonal_prototypes(q_BHLE: Tensor, k_BHLE: Tensor, count: int) -> Tensor:
    """Choose prototypes greedily among queries and keys (arXiv 2106.05392, algorithm 1).

    Each next one has the smallest largest |cosine| to those before it. The first is the longest vector, where the paper
    draws it at random. O(count L E) a head.

    Returns:
        Positions (B, H, count) in the queries followed by the keys; no position occurs twice.
    """
    with torch.autocast(q_BHLE.device.type, enabled=False):
        candidates = torch.cat([q_BHLE, k_BHLE.to(q_BHLE.dtype)], dim=2)
        latest = candidates.norm(dim=-1).argmax(-1, keepdim=True)
        candidates = normalize(candidates, dim=-1)
        closest = torch.zeros_like(candidates[..., 0])
        chosen = [latest]
        for _ in range(count - 1):
            similarity = candidates @ _rows(candidates, latest).mT
            closest = torch.maximum(closest, similarity[..., 0].abs()).scatter(2, latest, math.inf)
            latest = closest.argmin(-1, keepdim=True)
            chosen.append(latest)
        return torch.cat(chosen, dim=2)


def _rows(x_BHLE: Tensor, indices_BHM: Tensor) -> Tensor:
    return x_BHLE.gather(2, indices_BHM[..., None].expand(-1, -1, -1, x_BHLE.shape[-1]))


def prototype_attention(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, count: int) -> Tensor:
    """Orthoformer's softmax(Q P^T / sqrt(E)) softmax(P K^T / sqrt(E)) V, O(L M E) (arXiv 2106.05392).

    The prototypes P, queries and keys, carry no gradient, as in the authors' code (which looks at queries only).

    Where there are no more tokens than prototypes, every token is a prototype, and the result is exact softmax
    attention. The published product does not give that by itself: even with P = Q, the first factor mixes the queries,
    and is the identity only in the limit of long orthogonal ones. What it stands for does: it tells with which
    prototypes a query is identified, and a query that is a prototype is that one. The (L, L) product is no dearer then.
    """
    if count >= q_BHLE.shape[2]:
        return scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE)
    chosen_BHM = orthogonal_prototypes(q_BHLE, k_BHLE, count)
    prototypes_BHME = _rows(torch.cat([q_BHLE, k_BHLE], dim=2).detach(), chosen_BHM)
    means_BHME = scaled_dot_product_attention(prototypes_BHME, k_BHLE, v_BHLE)
    return scaled_dot_product_attention(q_BHLE, prototypes_BHME, means_BHME)


class Attention(nn.Module, ABC):
    """Self-attention with several heads, without mask and dropout: (B, L, D) -> (B, L, D), any length.

    Args:
        config: settings.
        width: channels D.

    Raises:
        ValueError: the heads cannot share the width.
    """

    def __init__(self, config: AttentionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        if width % config.heads:
            raise ValueError(
                f"decoder.attention.heads is {config.heads}: give a divisor of {width}, the width of a block (each "
                "block has half of the width before it)"
            )
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    @abstractmethod
    def attend(self, q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor) -> Tensor:
        """Queries, keys and values to (B, H, L, E)."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        batch, length, width = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        y_BHLE = self.attend(*qkv.unbind(0))
        y_BLD: Tensor = self.output(y_BHLE.transpose(1, 2).reshape(batch, length, width))
        return y_BLD


class SoftmaxAttention(Attention):
    """Full softmax attention, O(L^2): the vanilla transformer's."""

    def attend(self, q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor) -> Tensor:
        """Queries, keys and values to (B, H, L, E)."""
        attention = scaled_dot_product_attention if self.config.implementation == "fused" else softmax_attention
        return attention(q_BHLE, k_BHLE, v_BHLE)


class PerformerAttention(Attention):
    """FAVOR+. The directions are drawn once, for all heads, and are part of the state dict."""

    directions: Tensor

    def __init__(self, config: AttentionConfig, width: int) -> None:
        super().__init__(config, width)
        self.register_buffer("directions", orthogonal_features(config.features, width // config.heads))

    def attend(self, q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor) -> Tensor:
        """Queries, keys and values to (B, H, L, E)."""
        return favor_attention(q_BHLE, k_BHLE, v_BHLE, self.directions)


class OrthoformerAttention(Attention):
    """Attention through orthogonal prototypes, each head with its own."""

    def attend(self, q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor) -> Tensor:
        """Queries, keys and values to (B, H, L, E)."""
        return prototype_attention(q_BHLE, k_BHLE, v_BHLE, self.config.prototypes)


ATTENTIONS: dict[DecoderName, type[Attention]] = {
    "lst": SoftmaxAttention,
    "performer": PerformerAttention,
    "orthoformer": OrthoformerAttention,
}
"""The attention layer of each decoder that has one."""
