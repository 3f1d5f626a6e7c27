"""Nearest neighbours by cosine among any number of examples, in blocks of bounded memory.

Shapes: Q queries, N examples, D width, K neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_ROWS, EXAMPLE_ROWS = 1024, 16_384
"""Queries and examples that are compared at once: 64 MiB of similarities in fp32."""


def nearest_of(
    query_QD: Tensor,
    examples_ND: Tensor,
    k: int,
    query_groups_Q: Tensor | None = None,
    groups_N: Tensor | None = None,
    rows: tuple[int, int] = (QUERY_ROWS, EXAMPLE_ROWS),
) -> tuple[Tensor, Tensor]:
    """Return the k nearest examples of each query, as `nearest_of_reference`, without the whole (Q, N) matrix.

    Args:
        query_QD: normalised queries.
        examples_ND: normalised examples.
        k: neighbours, at most N.
        query_groups_Q: group of each query; it is no neighbour of examples in its own.
        groups_N: group of each example.
        rows: queries and examples compared at once.

    Returns:
        Indices (Q, K) int64 and similarities (Q, K), best first.
    """
    index_QK = torch.empty(len(query_QD), k, dtype=torch.int64, device=query_QD.device)
    similarity_QK = query_QD.new_empty(len(query_QD), k)
    for first in range(0, len(query_QD), rows[0]):
        here = slice(first, first + rows[0])
        groups_q = None if query_groups_Q is None else query_groups_Q[here]
        best = query_QD.new_empty(len(query_QD[here]), 0)
        found = index_QK.new_empty(len(best), 0)
        for start in range(0, len(examples_ND), rows[1]):
            there = slice(start, start + rows[1])
            similarity = query_QD[here] @ examples_ND[there].T
            if groups_q is not None and groups_N is not None:
                similarity.masked_fill_(groups_q[:, None] == groups_N[there][None, :], -torch.inf)
            top = similarity.topk(min(k, similarity.shape[1]))
            best, found = torch.cat([best, top.values], 1), torch.cat([found, top.indices + start], 1)
            order = best.argsort(dim=1, descending=True, stable=True)[:, :k]
            best, found = best.gather(1, order), found.gather(1, order)
        index_QK[here], similarity_QK[here] = found, best
    return index_QK, similarity_QK


def nearest_of_reference(
    query_QD: Tensor,
    examples_ND: Tensor,
    k: int,
    query_groups_Q: Tensor | None = None,
    groups_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of `nearest_of`: the whole matrix of similarities, O(Q N) memory."""
    similarity_QN = query_QD @ examples_ND.T
    if query_groups_Q is not None and groups_N is not None:
        similarity_QN[query_groups_Q[:, None] == groups_N[None, :]] = -torch.inf
    top = similarity_QN.topk(k)
    return top.indices, top.values


def vote(index_QK: Tensor, similarity_QK: Tensor, labels_N: Tensor) -> Tensor:
    """Return the class (Q,) that weighted neighbours elect (temperature 0.07, as in arXiv 1805.01978)."""
    classes = int(labels_N.max()) + 1
    elected_Q = torch.empty(len(index_QK), dtype=torch.int64, device=index_QK.device)
    for first in range(0, len(index_QK), QUERY_ROWS):
        here = slice(first, first + QUERY_ROWS)
        votes = similarity_QK.new_zeros(len(index_QK[here]), classes)
        votes.scatter_add_(1, labels_N[index_QK[here]], (similarity_QK[here] / 0.07).softmax(-1))
        elected_Q[here] = votes.argmax(1)
    return elected_Q


def nearest(features_ND: Tensor, groups_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest other examples of each by cosine, with the similarities.

    Equal `groups` mark the same example, which is never its own neighbour. Features are centred first: an offset that
    all share would bring every cosine near 1. Returns indices (N, k) and similarities (N, k), best first.
    """
    normalised = F.normalize(features_ND - features_ND.mean(0), dim=-1)
    return nearest_of(normalised, normalised, min(k, len(groups_N) - 1), groups_N, groups_N)
