from __future__ import annotations

import math

import pytest
import torch

from s5.evaluation import metrics


def clusters() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    return torch.eye(3)[labels] + 0.1 * torch.randn(60, 3), labels


def test_knn_finds_clusters_and_not_noise() -> None:
    features, labels = clusters()
    assert metrics.knn_accuracy(features[:30], labels[:30], features[30:], labels[30:]) == 1
    assert metrics.knn_leave_one_out(features, labels) == 1
    noise = torch.randn(60, 3)
    assert metrics.knn_leave_one_out(noise, labels) < 0.6


def test_too_few_examples_have_no_accuracy() -> None:
    """As where no video could be read."""
    features, labels = clusters()
    none, no_labels = torch.empty(0, 0), torch.empty(0).long()
    assert math.isnan(metrics.knn_accuracy(none, no_labels, features, labels))
    assert math.isnan(metrics.knn_accuracy(features, labels, none, no_labels))
    assert math.isnan(metrics.knn_leave_one_out(features[:1], labels[:1]))
    assert math.isnan(metrics.knn_leave_one_out(none, no_labels))
    assert math.isnan(metrics.accuracy(none, no_labels))
    assert metrics.knn_leave_one_out(features[:4:3], labels[:4:3]) == 1


def test_per_video_averages_clips_wherever_they_stand() -> None:
    names, scores = metrics.per_video(torch.tensor([[1.0], [5.0], [3.0]]), ["a", "b", "a"])
    assert names == ["a", "b"]
    assert scores.tolist() == [[2.0], [5.0]]


def test_wilson_interval() -> None:
    low, high = metrics.wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))


def test_top_k_confusion_and_classes_equal_a_loop_over_examples() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(200, 7), torch.randint(6, (200,))
    scores[:, 5] = -9  # never predicted; class 6 has no examples
    for k in (1, 3, 7):
        hits = [
            int(label) in sorted(range(7), key=lambda c: -float(row[c]))[:k]
            for row, label in zip(scores, labels, strict=True)
        ]
        assert metrics.top_k_hits(scores, labels, k).tolist() == hits
    predicted = scores.argmax(1)
    table = metrics.confusion(predicted, labels, 7)
    pairs = list(zip(labels.tolist(), predicted.tolist(), strict=True))
    assert table.tolist() == [[pairs.count((i, j)) for j in range(7)] for i in range(7)]
    precision, recall, support = metrics.per_class(table)
    assert support.tolist() == [labels.tolist().count(i) for i in range(7)]
    assert math.isnan(precision[5])
    assert math.isnan(recall[6])
    assert float(precision[2]) == pytest.approx(pairs.count((2, 2)) / predicted.tolist().count(2))
    assert float(recall[2]) == pytest.approx(pairs.count((2, 2)) / labels.tolist().count(2))


def test_of_equal_scores_the_lower_class_comes_first() -> None:
    scores = torch.zeros(3, 4)
    assert metrics.top_k_hits(scores, torch.tensor([0, 1, 3]), 2).tolist() == [True, True, False]


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    torch.manual_seed(0)
    values = 3 + 2 * torch.randn(400)
    low, high = metrics.bootstrap_interval(values, seed=0)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.1 * half)
    assert metrics.bootstrap_interval(values, seed=0) == (low, high) != metrics.bootstrap_interval(values, seed=1)
    assert metrics.bootstrap_interval(torch.ones(9), seed=0) == (1, 1)
