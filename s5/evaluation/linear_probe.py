"""Linear probe: multinomial logistic regression on features that stay as they are.

It is convex and fitted on all examples at once by L-BFGS, from zero, so that the result is deterministic. Only the
strength of the regularisation is chosen, by cross-validation among the training examples.

Shapes: N examples, D width, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Strengths that are tried, strongest first."""
FOLDS = 5
CHOICE_EXAMPLES = 20_000
"""Most examples that the strength is chosen on, spread evenly over the classes."""
ROWS = 65_536
"""Examples whose scores are in memory at once."""
ITERATIONS, TOLERANCE = 100, 1e-5
"""Most iterations, and the largest gradient at which they end; coarser where strengths are compared."""
COARSE_ITERATIONS, COARSE_TOLERANCE = 30, 1e-4


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear classifier of standardised features."""

    mean_D: Tensor
    """Mean of the training features."""
    scale_D: Tensor
    """Their standard deviation; 1 where a feature is constant."""
    weight_CD: Tensor
    bias_C: Tensor
    decay: float
    """Strength of the regularisation: the loss is the mean cross-entropy plus `decay / 2 * |weight|^2`."""

    def probabilities(self, features_ND: Tensor) -> Tensor:
        """Return class probabilities (N, C)."""
        parts = [
            F.linear((features_ND[here] - self.mean_D) / self.scale_D, self.weight_CD, self.bias_C).softmax(-1)
            for here in _blocks(len(features_ND))
        ]
        return torch.cat(parts)


def _blocks(length: int) -> list[slice]:
    return [slice(first, first + ROWS) for first in range(0, length, ROWS)]


def top1(train_ND: Tensor, train_labels_N: Tensor, query_VD: Tensor, labels_V: Tensor) -> float:
    """Return the accuracy, on V queries, of the linear probe of N training examples; NaN where there can be none.

    There can be none without queries, from examples of fewer than two classes, or on features that are not finite.
    """
    if len(labels_V) == 0:
        return math.nan
    try:
        probe, _ = fit_chosen(train_ND, train_labels_N)
    except ValueError:
        return math.nan
    return float((probe.probabilities(query_VD).argmax(1) == labels_V).double().mean())


def check(features_ND: Tensor, labels_N: Tensor) -> None:
    """Raise `ValueError` where the examples are of fewer than two classes, or features are not finite."""
    present = len(set(labels_N.tolist()))
    if present < 2:
        raise ValueError(f"a linear probe needs training examples of at least 2 classes, and there are {present}")
    mean_D, scale_D = statistics(features_ND)
    if not bool(torch.isfinite(mean_D).all() and torch.isfinite(scale_D).all()):
        raise ValueError("a linear probe needs finite features, and there is NaN or infinity among these")


def fit(features_ND: Tensor, labels_N: Tensor, decay: float) -> LinearProbe:
    """Return the linear probe of training examples.

    Raises:
        ValueError: the examples are of fewer than two classes, or features are not finite.
    """
    check(features_ND, labels_N)
    mean_D, scale_D = statistics(features_ND)
    return _fitted(features_ND, labels_N, decay, mean_D, scale_D)


def statistics(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and standard deviation (D,) of features; 1 for the deviation of a constant one."""
    mean_D = features_ND.mean(0)
    squares_D = torch.zeros_like(mean_D)
    for here in _blocks(len(features_ND)):
        squares_D += (features_ND[here] - mean_D).square().sum(0)
    scale_D = (squares_D / len(features_ND)).sqrt()
    # Rounding leaves a constant feature a deviation that is not exactly 0.
    constant_D = scale_D <= 1e-6 * mean_D.abs()
    return mean_D, torch.where(constant_D, torch.ones_like(scale_D), scale_D)


def _fitted(
    features_ND: Tensor,
    labels_N: Tensor,
    decay: float,
    mean_D: Tensor,
    scale_D: Tensor,
    start: LinearProbe | None = None,
    coarse: bool = False,
) -> LinearProbe:
    """Return the probe that minimises the loss, found from zero or from that of another strength."""
    classes = int(labels_N.max()) + 1
    weight_CD = start.weight_CD.clone() if start else torch.zeros(classes, features_ND.shape[1])
    bias_C = start.bias_C.clone() if start else torch.zeros(classes)
    weight_CD.requires_grad_()
    bias_C.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight_CD, bias_C],
        max_iter=COARSE_ITERATIONS if coarse else ITERATIONS,
        tolerance_grad=COARSE_TOLERANCE if coarse else TOLERANCE,
        tolerance_change=1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = decay / 2 * weight_CD.detach().square().sum()
        weight_CD.grad = decay * weight_CD.detach()
        for here in _blocks(len(labels_N)):
            scores = F.linear((features_ND[here] - mean_D) / scale_D, weight_CD, bias_C)
            share = F.cross_entropy(scores, labels_N[here], reduction="sum") / len(labels_N)
            share.backward()  # type: ignore[no-untyped-call]
            total = total + share.detach()
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return LinearProbe(mean_D, scale_D, weight_CD.detach(), bias_C.detach(), decay)


def cross_validated(features_ND: Tensor, labels_N: Tensor) -> dict[float, float]:
    """Return the accuracy of each strength in DECAYS, by 5-fold cross-validation with the classes shared out evenly.

    Each strength starts from the solution of the one before, which is stronger.
    """
    order = labels_N.argsort(stable=True)
    order = order[:: -(-len(order) // CHOICE_EXAMPLES)]
    fold = torch.arange(len(order)) % min(FOLDS, len(order))
    hits = dict.fromkeys(DECAYS, 0)
    for held_out in range(int(fold.max()) + 1):
        train, test = order[fold != held_out], order[fold == held_out]
        mean_D, scale_D = statistics(features_ND[train])
        probe: LinearProbe | None = None
        for decay in DECAYS:
            probe = _fitted(features_ND[train], labels_N[train], decay, mean_D, scale_D, probe, coarse=True)
            hits[decay] += int((probe.probabilities(features_ND[test]).argmax(1) == labels_N[test]).sum())
    return {decay: count / len(order) for decay, count in hits.items()}


def fit_chosen(features_ND: Tensor, labels_N: Tensor) -> tuple[LinearProbe, float]:
    """Return the probe of the strength that cross-validation finds best, the strongest of equals, and its accuracy.

    Raises:
        ValueError: the examples are of fewer than two classes, or features are not finite.
    """
    check(features_ND, labels_N)
    accuracies = cross_validated(features_ND, labels_N)
    decay = max(DECAYS, key=lambda strength: accuracies[strength])
    return fit(features_ND, labels_N, decay), accuracies[decay]
