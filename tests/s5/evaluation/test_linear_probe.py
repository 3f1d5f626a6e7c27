from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from s5.evaluation import linear_probe


def examples(count: int = 150, classes: int = 3, width: int = 8, noise: float = 2.0) -> tuple[Tensor, Tensor]:
    """Features of overlapping classes, on scales that differ by a thousand."""
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
    features = centres[labels] + noise * torch.randn(count, width)
    return features * torch.logspace(-1, 2, width) + 50, labels


@pytest.mark.parametrize("decay", [1.0, 1e-2, 1e-4])
def test_probe_is_the_logistic_regression_of_scikit_learn(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(linear_probe, "ROWS", 64)
    features, labels = examples()
    probe = linear_probe.fit(features, labels, decay)
    standardised = ((features - features.mean(0)) / features.std(0, correction=0)).double().numpy()
    reference = linear_model.LogisticRegression(C=1 / (decay * len(labels)), max_iter=2000, tol=1e-8)
    reference.fit(standardised, labels.numpy())
    np.testing.assert_allclose(probe.probabilities(features), reference.predict_proba(standardised), atol=2e-3)
    again = linear_probe.fit(features, labels, decay)
    assert torch.equal(again.weight_CD, probe.weight_CD)


def of_three_classes(count: int, shift: float) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 3
    return torch.randn(count, 16) + shift * torch.eye(16)[labels], labels


def test_separable_classes_are_found_and_shuffled_labels_are_not() -> None:
    features, labels = of_three_classes(240, 5.0)
    train, query = slice(120), slice(120, None)
    found = linear_probe.top1(features[train], labels[train], features[query], labels[query])
    # The slowest solver there is: steps down the gradient of the same loss, in double precision.
    x = ((features - features[train].mean(0)) / features[train].std(0, correction=0)).double()
    weight = torch.zeros(3, 16, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(x[train] @ weight.T, labels[train]) + 0.5 * weight.square().sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.3 * gradient).detach().requires_grad_()
    reference = float(((x[query] @ weight.T).argmax(1) == labels[query]).double().mean())
    assert found > 0.97
    assert found == pytest.approx(reference, abs=0.02)
    shuffled = labels[torch.randperm(240)]
    assert abs(linear_probe.top1(features[train], shuffled[train], features[query], shuffled[query]) - 1 / 3) < 0.15


def test_without_examples_or_queries_there_is_no_accuracy() -> None:
    features, labels = of_three_classes(12, 5.0)
    assert math.isnan(linear_probe.top1(features, torch.zeros_like(labels), features, labels))
    assert math.isnan(linear_probe.top1(features * torch.nan, labels, features, labels))
    assert math.isnan(linear_probe.top1(features, labels, features[:0], labels[:0]))


def test_strength_is_chosen_among_the_training_examples() -> None:
    """Of many noisy features a weak penalty learns the noise: a stronger one is better on examples held out."""
    labels = torch.arange(80) % 2
    features = torch.randn(80, 200)
    features[:, 0] += 2.0 * labels
    accuracies = linear_probe.cross_validated(features, labels)
    probe, held_out = linear_probe.fit_chosen(features, labels)
    assert held_out == max(accuracies.values()) == accuracies[probe.decay]
    # Nothing but the training examples is there to be learned by heart.
    assert (linear_probe.fit(features, labels, 1e-4).probabilities(features).argmax(1) == labels).all()
    assert held_out < 1


def test_of_equal_strengths_the_strongest_is_taken() -> None:
    labels = torch.arange(60) % 3
    probe, held_out = linear_probe.fit_chosen(torch.eye(3)[labels] + 0.01 * torch.randn(60, 3), labels)
    assert (probe.decay, held_out) == (linear_probe.DECAYS[0], 1.0)


def test_constant_features_and_rare_classes_do_no_harm() -> None:
    features, labels = examples(31)
    features[:, 3] = 0.1
    labels[5] = 7
    probe, _ = linear_probe.fit_chosen(features, labels)
    assert probe.probabilities(features).isfinite().all()
    assert probe.scale_D[3] == 1


def test_examples_that_cannot_be_probed_are_refused() -> None:
    features, labels = examples(12)
    with pytest.raises(ValueError, match="at least 2 classes, and there are 1"):
        linear_probe.fit_chosen(features, torch.zeros_like(labels))
    features[3, 2] = torch.nan
    with pytest.raises(ValueError, match="needs finite features"):
        linear_probe.fit_chosen(features, labels)
