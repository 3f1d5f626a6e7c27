"""What an evaluation says of a fine-tuned model, against scikit-learn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from sklearn import metrics as reference

from pipelines import storage
from pipelines.config import EvaluateConfig, TrackingConfig
from pipelines.running.stage import stage_run
from pipelines.stages.evaluating import finetuned
from s5.checkpoints.checkpoint import Meta
from s5.evaluation.inference import ClipOutputs

CLASSES = [f"class {i}" for i in range(6)]


def found(values: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> ClipOutputs:
    return ClipOutputs([f"v{i}" for i in range(len(labels))], values, labels, targets, [])


def test_classes_agree_with_scikit_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = torch.randint(6, (80,))
    scores = (torch.randn(80, 6) + 2 * torch.eye(6)[labels]).softmax(1)
    config = EvaluateConfig(out=str(tmp_path), tracking=TrackingConfig(uri="off"))
    meta = Meta(kind="class", step=1, model={}, classes=CLASSES)
    outputs = found(scores, labels, torch.full((80,), torch.nan))
    with stage_run("evaluate", config) as stage:
        finetuned.report(stage, config, meta, outputs, Counter(outputs.video_ids))
    predicted = scores.argmax(1)
    top1 = reference.accuracy_score(labels, predicted)
    assert stage.metrics["test/accuracy"] == pytest.approx(top1)
    assert stage.metrics["test/top5"] == pytest.approx(reference.top_k_accuracy_score(labels, scores, k=5))
    assert stage.metrics["test/accuracy_bootstrap_low"] < top1 < stage.metrics["test/accuracy_bootstrap_high"]
    table = storage.read_table(f"{tmp_path}/classes.parquet").to_pydict()
    precision, recall, _, support = reference.precision_recall_fscore_support(labels, predicted)
    assert table["class"] == CLASSES
    assert table["precision"] == pytest.approx(precision)
    assert table["recall"] == pytest.approx(recall)
    assert table["videos"] == support.tolist()
    matrix = reference.confusion_matrix(labels, predicted)
    rows = storage.read_table(f"{tmp_path}/confusion.parquet").to_pylist()
    assert {(row["class"], row["predicted_class"]): row["videos"] for row in rows} == {
        (CLASSES[i], CLASSES[j]): matrix[i, j] for i, j in zip(*matrix.nonzero(), strict=True)
    }
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_error_agrees_with_scikit_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    targets = torch.randn(50)
    values = targets[:, None] + 0.5 * torch.randn(50, 1)
    config = EvaluateConfig(out=str(tmp_path), tracking=TrackingConfig(uri="off"))
    outputs = found(values, torch.full((50,), -1), targets)
    with stage_run("evaluate", config) as stage:
        finetuned.report(stage, config, Meta(kind="regression", step=1, model={}), outputs, Counter())
    mse = reference.mean_squared_error(targets, values[:, 0])
    assert stage.metrics["test/mse"] == pytest.approx(mse)
    assert stage.metrics["test/mse_low"] < mse < stage.metrics["test/mse_high"]
    assert stage.metrics["test/mse_constant"] == pytest.approx(float(targets.var(correction=0)), rel=1e-5)
