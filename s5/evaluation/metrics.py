"""Measures of features and predictions.

Shapes: V videos, N examples, D width, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def knn_accuracy(train_ND: Tensor, train_labels_N: Tensor, query_VD: Tensor, labels_V: Tensor, k: int = 10) -> float:
    """Return the top-1 accuracy of weighted k nearest neighbours by cosine (temperature 0.07, as in 1805.01978).

    NaN where there are no examples or no queries.
    """
    if not len(train_labels_N) or not len(labels_V):
        return math.nan
    similarity = F.normalize(query_VD, dim=-1) @ F.normalize(train_ND, dim=-1).T
    return _vote(similarity, train_labels_N, labels_V, k)


def knn_leave_one_out(features_ND: Tensor, labels_N: Tensor, k: int = 10) -> float:
    """Return the leave-one-out kNN accuracy of examples; NaN for fewer than two."""
    if len(labels_N) < 2:
        return math.nan
    normalised = F.normalize(features_ND, dim=-1)
    similarity = (normalised @ normalised.T).fill_diagonal_(-torch.inf)
    return _vote(similarity, labels_N, labels_N, min(k, len(labels_N) - 1))


def _vote(similarity_VN: Tensor, train_labels_N: Tensor, labels_V: Tensor, k: int) -> float:
    top = similarity_VN.topk(min(k, similarity_VN.shape[1]))
    classes = int(max(train_labels_N.max(), labels_V.max())) + 1
    votes = torch.zeros(len(labels_V), classes, device=similarity_VN.device)
    votes.scatter_add_(1, train_labels_N[top.indices], (top.values / 0.07).softmax(-1))
    return float((votes.argmax(1) == labels_V).float().mean())


def nearest(features_ND: Tensor, groups_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest other examples of each by cosine, with the similarities.

    Equal `groups` mark the same example, which is never its own neighbour. Features are centred first: an offset that
    all share would bring every cosine near 1. Returns indices (N, k) and similarities (N, k), best first.
    """
    normalised = F.normalize(features_ND - features_ND.mean(0), dim=-1)
    similarity = normalised @ normalised.T
    same = groups_N[:, None] == groups_N[None, :]
    top = similarity.masked_fill(same, -torch.inf).topk(min(k, len(groups_N) - 1))
    return top.indices, top.values


def accuracy(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Return the share of examples whose highest score is the label's; NaN where there are none."""
    if not len(labels_N):
        return math.nan
    return float((logits_NC.argmax(1) == labels_N).float().mean())


def per_video(scores_NC: Tensor, videos: list[str]) -> tuple[list[str], Tensor]:
    """Average the scores of each video's clips; videos stay in the order in which they first come."""
    names = list(dict.fromkeys(videos))
    index = {name: i for i, name in enumerate(names)}
    owner = torch.tensor([index[video] for video in videos])
    total = torch.zeros(len(names), scores_NC.shape[1], dtype=scores_NC.dtype).index_add_(0, owner, scores_NC)
    count = torch.zeros(len(names), dtype=scores_NC.dtype).index_add_(0, owner, torch.ones(len(videos)))
    return names, total / count[:, None]


def wilson_interval(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share."""
    share, z2 = hits / total, z * z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
