"""Token merging by learned saliency, one more way to shorten a sequence in front of a block.

After the learnable variant of "Video Token Merging for Long-form Video Understanding" (arXiv 2410.23782, NeurIPS 2024).

From the paper, by its abstract and summaries of its figures, not checked against its text: tokens have learned
saliencies, which part them into targets and sources, and every source is merged into its most similar target. That
similarity is a cosine, as in ToMe (2210.09461), and that the most salient tokens are the targets, is a recollection.
Ours: the paper merges behind the attention of a transformer block, by plain averages, and trains the saliencies through
an auxiliary path of attention; here the merge is in front of a state-space layer, and the saliencies learn as the
weights of the averages. In training, Gumbel noise makes the targets a sample.

Shapes: B batch, L sequence, D width, K targets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s5 import rng
from s5.models.selection import Selected, normalized_entropy, undecided
from s5.models.top_k import gumbel

_SIMILARITIES = 2**24
"""Cosines in memory at a time, in numbers."""


def _targets_first(scores_BL: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions of the K highest scores in order of time, and of the others. Ties fall to the earlier token."""
    order_BL = torch.argsort(scores_BL.detach(), dim=1, descending=True, stable=True)
    return order_BL[:, :k].sort(dim=1).values, order_BL[:, k:]


def _rows(x_BLD: Tensor, indices_BK: Tensor) -> Tensor:
    return x_BLD.gather(1, indices_BK[..., None].expand(-1, -1, x_BLD.shape[2]))


@torch.no_grad()
def _most_similar(x_BLD: Tensor, sources_BS: Tensor, targets_BK: Tensor) -> Tensor:
    """Number (B, S), 0 to K - 1, of the target with the highest cosine to each source."""
    # A source's own length does not change which target is the most similar.
    targets_BDK = nn.functional.normalize(_rows(x_BLD, targets_BK), dim=2).to(x_BLD.dtype).mT
    chunk = max(1, _SIMILARITIES // targets_BK.numel())
    parts = torch.split(sources_BS, chunk, dim=1)
    return torch.cat([(_rows(x_BLD, part_BC) @ targets_BDK).argmax(2) for part_BC in parts], dim=1)


def merge(x_BLD: Tensor, logits_BL: Tensor, k: int, gumbel_uniform_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge L tokens into K, in order of time of their targets.

    The K highest `logits + g` are targets, g Gumbel noise; each other token joins the target with the highest cosine.
    A merged token is the mean of its members, weighted by the softmax of their logits (without noise). The search is
    O(L K D) time and bounded memory, and has no gradient; the mean is O(L D).

    Args:
        x_BLD: (B, L, D) tokens.
        logits_BL: (B, L) saliencies; compared in fp32 at least.
        k: number K of tokens to make, 1 to L.
        gumbel_uniform_BL: (B, L) uniform numbers in [0, 1); None for the plain highest logits.

    Returns:
        Tokens (B, K, D) in the type of x, and the ascending positions (B, K), int64, of their targets.

    Raises:
        ValueError: k is not in 1..L.
    """
    batch, length, width = x_BLD.shape
    if not 1 <= k <= length:
        raise ValueError(f"k is {k}: give 1 to {length}, the number of tokens")
    dtype = torch.promote_types(logits_BL.dtype, torch.float32)
    logits_BL = logits_BL.to(dtype)
    scores_BL = logits_BL if gumbel_uniform_BL is None else logits_BL + gumbel(gumbel_uniform_BL)
    targets_BK, sources_BS = _targets_first(scores_BL, k)
    # Autocast may round the cosines: a near tie between targets is no loss.
    joined_BS = _most_similar(x_BLD, sources_BS, targets_BK)
    own_BK = torch.arange(k, device=x_BLD.device).expand(batch, -1)
    group_BL = torch.empty_like(scores_BL, dtype=torch.int64)
    group_BL = group_BL.scatter(1, targets_BK, own_BK).scatter(1, sources_BS, joined_BS)

    with torch.autocast(x_BLD.device.type, enabled=False):
        starts_B1 = torch.arange(batch, device=x_BLD.device)[:, None] * k
        rows = (group_BL + starts_B1).flatten()
        weights = _group_softmax(logits_BL.flatten(), rows, batch * k)
        weighted = x_BLD.flatten(0, 1) * weights[:, None]
        merged = weighted.new_zeros(batch * k, width).index_add(0, rows, weighted)
    return merged.view(batch, k, width).to(x_BLD.dtype), targets_BK


def _group_softmax(logits: Tensor, groups: Tensor, count: int) -> Tensor:
    """Softmax of logits (N,) within each of `count` groups, none of which is empty."""
    peaks = logits.new_zeros(count).scatter_reduce(0, groups, logits.detach(), "amax", include_self=False)
    weights = torch.exp(logits - peaks[groups])
    return weights / logits.new_zeros(count).index_add(0, groups, weights)[groups]


def merge_reference(
    x_BLD: Tensor, logits_BL: Tensor, k: int, gumbel_uniform_BL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reference of `merge`: one token after the other."""
    merged, positions = [], []
    for sample, tokens in enumerate(x_BLD):
        logits = logits_BL[sample]
        scores = logits if gumbel_uniform_BL is None else logits + gumbel(gumbel_uniform_BL[sample])
        targets = sorted(torch.topk(scores, k).indices.tolist())
        members: dict[int, list[int]] = {target: [target] for target in targets}
        for token in set(range(len(tokens))) - set(targets):
            cosines = [torch.cosine_similarity(tokens[token], tokens[target], dim=0).item() for target in targets]
            members[targets[cosines.index(max(cosines))]].append(token)
        merged.append(torch.stack([logits[own].softmax(0) @ tokens[own] for own in members.values()]))
        positions.append(torch.tensor(targets))
    return torch.stack(merged), torch.stack(positions)


class Merging(nn.Module):
    """Learned saliency of tokens, and the merge that follows from it.

    The saliency is a linear function of the normalised tokens, which get no gradient from it, and has no bias, to which
    the merge is blind.

    Args:
        width: channels D of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.saliency = undecided(width)

    def forward(self, x_BLD: Tensor, tokens_BLD: Tensor, k: int, seeds_B: Tensor | None, stream: str) -> Selected:
        """Merge the block's input into K tokens.

        Args:
            x_BLD: (B, L, D) block input, which is merged.
            tokens_BLD: (B, L, D) the same after the block's LayerNorm, which the saliency is of.
            k: number of tokens to make.
            seeds_B: (B,) seeds of the samples; needed in training.
            stream: name of the noise.

        Raises:
            ValueError: k is not in 1..L, or there are no seeds in training.
        """
        weight_D = self.saliency.weight[0]
        # In the layer's own type under autocast too: bf16 would round saliencies to ties.
        with torch.autocast(weight_D.device.type, enabled=False):
            logits_BL = tokens_BLD.detach().to(weight_D.dtype) @ weight_D
        uniform_BL = None
        if self.training:
            if seeds_B is None:
                raise ValueError("seeds_B is None: give a seed a sample, or rng.fresh_seeds, in training")
            uniform_BL = rng.uniform(seeds_B, stream, x_BLD.shape[1])
        tokens_BKD, indices_BK = merge(x_BLD, logits_BL, k, uniform_BL)
        return Selected(tokens_BKD, indices_BK, normalized_entropy(logits_BL))
