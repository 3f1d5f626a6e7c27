"""Measures of features and predictions.

Shapes: V videos, N examples, D width, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from s5.evaluation.neighbours import nearest_of, vote

BOOTSTRAP_DRAWS = 2000


def knn_accuracy(train_ND: Tensor, train_labels_N: Tensor, query_VD: Tensor, labels_V: Tensor, k: int = 10) -> float:
    """Return the top-1 accuracy of weighted k nearest neighbours by cosine (temperature 0.07, as in 1805.01978).

    NaN where there are no examples or no queries.
    """
    if not len(train_labels_N) or not len(labels_V):
        return math.nan
    keys_ND, queries_VD = F.normalize(train_ND, dim=-1), F.normalize(query_VD, dim=-1)
    index_VK, similarity_VK = nearest_of(queries_VD, keys_ND, min(k, len(keys_ND)))
    return float((vote(index_VK, similarity_VK, train_labels_N) == labels_V).float().mean())


def knn_leave_one_out(features_ND: Tensor, labels_N: Tensor, k: int = 10) -> float:
    """Return the leave-one-out kNN accuracy of examples; NaN for fewer than two."""
    if len(labels_N) < 2:
        return math.nan
    normalised, own = F.normalize(features_ND, dim=-1), torch.arange(len(labels_N), device=features_ND.device)
    index_NK, similarity_NK = nearest_of(normalised, normalised, min(k, len(labels_N) - 1), own, own)
    return float((vote(index_NK, similarity_NK, labels_N) == labels_N).float().mean())


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


def top_k_hits(scores_NC: Tensor, labels_N: Tensor, k: int) -> Tensor:
    """Return whether the label is among the k highest scores (N,), bool; the lower class of equal scores first."""
    order_NC = scores_NC.argsort(dim=1, descending=True, stable=True)
    return (order_NC[:, :k] == labels_N[:, None]).any(1)


def confusion(predicted_N: Tensor, labels_N: Tensor, classes: int) -> Tensor:
    """Return how often each label (rows) is predicted as each class (columns): int64 (C, C)."""
    return torch.bincount(labels_N * classes + predicted_N, minlength=classes**2).view(classes, classes)


def per_class(confusion_CC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return precision, recall and support of each class (C,), from `confusion`.

    Precision is NaN for a class that is never predicted, recall for one without examples.
    """
    hits_C = confusion_CC.diagonal().double()
    return hits_C / confusion_CC.sum(0), hits_C / confusion_CC.sum(1), confusion_CC.sum(1)


def bootstrap_interval(
    values_N: Tensor, seed: int, share: float = 0.95, draws: int = BOOTSTRAP_DRAWS
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean over examples.

    Args:
        values_N: what is averaged, such as hits or squared errors.
        seed: of the draws: the same one gives the same interval.
        share: of the draws' means that the interval holds.
        draws: samples with replacement, as many values as there are each.
    """
    draw = torch.Generator().manual_seed(seed)
    values_N = values_N.double()
    means = torch.stack(
        [values_N[torch.randint(len(values_N), (len(values_N),), generator=draw)].mean() for _ in range(draws)]
    )
    low, high = means.quantile(torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64)).tolist()
    return float(low), float(high)
