"""What `evaluate` says of a fine-tuned model: accuracy or error with intervals, each class, and the confusion matrix.

Shapes: V videos, C classes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from pipelines.config import EvaluateConfig
from pipelines.plots.confusion import CONFUSION, draw_confusion
from pipelines.running.stage import Stage
from s5.checkpoints.checkpoint import Meta
from s5.evaluation import metrics
from s5.evaluation.inference import ClipOutputs

SEED = 0
"""Of the bootstrap's draws."""
TOP_K = 5


def report(stage: Stage, config: EvaluateConfig, meta: Meta, found: ClipOutputs, clips: Counter[str]) -> None:
    """Write predictions and metrics of videos, each from so many clips."""
    names, values = found.video_ids, found.values
    table: dict[str, Any] = {"video_id": names, "clips": [clips[name] for name in names]}
    if meta.kind == "class":
        predicted_V = values.argmax(1)
        table |= {"label": found.labels.tolist(), "prediction": predicted_V.tolist(), "scores": values.tolist()}
        table |= {"predicted_class": [meta.classes[i] for i in predicted_V.tolist()]}
        accuracy(stage, config.split, values, found.labels)
        by_class(stage, predicted_V, found.labels, meta.classes)
    else:
        table |= {"target": found.targets.tolist(), "prediction": values[:, 0].tolist()}
        error(stage, config.split, values[:, 0], found.targets)
    stage.tracker.artifact(stage.folder.write_table("predictions.parquet", pa.table(table)))


def accuracy(stage: Stage, split: str, scores_VC: Tensor, labels_V: Tensor) -> None:
    """Measure top-1 accuracy with Wilson's and the bootstrap's interval, and top-5 where there are more classes."""
    count = len(labels_V)
    hits_V = metrics.top_k_hits(scores_VC, labels_V, 1)
    hits = int(hits_V.sum())
    low, high = metrics.wilson_interval(hits, count)
    drawn_low, drawn_high = metrics.bootstrap_interval(hits_V, SEED)
    chance = float(torch.bincount(labels_V).max()) / count
    stage.metrics |= {f"{split}/accuracy": hits / count, f"{split}/accuracy_low": low, f"{split}/accuracy_high": high}
    stage.metrics |= {f"{split}/accuracy_bootstrap_low": drawn_low, f"{split}/accuracy_bootstrap_high": drawn_high}
    stage.metrics |= {f"{split}/chance": chance}
    top5 = ""
    if scores_VC.shape[1] > TOP_K:
        stage.metrics[f"{split}/top{TOP_K}"] = float(metrics.top_k_hits(scores_VC, labels_V, TOP_K).double().mean())
        top5 = f", top-{TOP_K} {stage.metrics[f'{split}/top{TOP_K}']:.3f}"
    stage.info(
        f"{split} accuracy {hits / count:.3f} (95 % interval {low:.3f} to {high:.3f}, by bootstrap {drawn_low:.3f} to "
        f"{drawn_high:.3f}){top5} on {count} videos; always saying the commonest class gives {chance:.3f}"
    )


def by_class(stage: Stage, predicted_V: Tensor, labels_V: Tensor, classes: list[str]) -> None:
    """Write precision, recall and number of videos of each class, and the confusion matrix as table and figure."""
    counts_CC = metrics.confusion(predicted_V, labels_V, len(classes))
    precision_C, recall_C, support_C = metrics.per_class(counts_CC)
    table = {"class": classes, "videos": support_C.tolist()}
    table |= {"precision": precision_C.tolist(), "recall": recall_C.tolist()}
    stage.tracker.artifact(stage.folder.write_table("classes.parquet", pa.table(table)))
    pairs = counts_CC.nonzero().tolist()
    matrix = {
        "class": [classes[i] for i, _ in pairs],
        "predicted_class": [classes[j] for _, j in pairs],
        "videos": [int(counts_CC[i, j]) for i, j in pairs],
    }
    stage.tracker.artifact(stage.folder.write_table("confusion.parquet", pa.table(matrix)))
    stage.details["confusion"] = stage.publish(CONFUSION, draw_confusion(counts_CC.numpy(), classes).png)


def error(stage: Stage, split: str, predicted_V: Tensor, targets_V: Tensor) -> None:
    """Measure the mean squared error with the bootstrap's interval, and that of the best constant."""
    squares_V = (predicted_V - targets_V).square()
    mse = float(squares_V.mean())
    low, high = metrics.bootstrap_interval(squares_V, SEED)
    constant = float((targets_V - targets_V.mean()).square().mean())
    stage.metrics |= {f"{split}/mse": mse, f"{split}/mse_low": low, f"{split}/mse_high": high}
    stage.metrics |= {f"{split}/mse_constant": constant}
    stage.info(
        f"{split} MSE {mse:.4f} (95 % interval by bootstrap {low:.4f} to {high:.4f}) on {len(targets_V)} videos; the "
        f"best constant gives {constant:.4f}"
    )
