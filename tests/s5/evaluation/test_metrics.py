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
