"""Learning curves of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipelines.plots.drawing import COLOURS, INK, SIZE, STYLE, Drawing, finished, legend_below, short

Points = Sequence[tuple[float, float]]

LINES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
SMOOTHED_FROM = 100
LABELS = {
    "train/loss": "training",
    "val/loss": "validation",
    "train/accuracy": "training",
    "val/accuracy": "validation",
    "train/mse": "training",
    "val/mse": "validation",
    "train/top1": "short clip found for a long one",
    "knn/top1": "class, by kNN on features",
    "linear/top1": "class, by a linear probe",
}


@dataclass(frozen=True)
class Panel:
    """A figure of a stage: metrics that share an axis, drawn as a full, a dashed and a dotted line."""

    title: str
    metrics: tuple[str, ...]
    is_share: bool = False
    """Whether the values are shares, from 0 to 1."""


PANELS = {
    "pretrain": (
        Panel("Contrastive loss", ("train/loss",)),
        Panel("Top-1 accuracy", ("knn/top1", "train/top1", "linear/top1"), True),
    ),
    "finetune": (
        Panel("Loss", ("val/loss", "train/loss")),
        Panel("Accuracy", ("val/accuracy", "train/accuracy"), True),
        Panel("Error (MSE)", ("val/mse", "train/mse")),
    ),
}


def learning_curves(
    panel: Panel, runs: Mapping[str, Mapping[str, Points]], along: str = "Optimisation step"
) -> Drawing | None:
    """Draw the metrics of a panel; None where no run has a curve of any.

    Args:
        panel: what is drawn.
        runs: points by metric by the run's label; at most as many runs as `COLOURS`.
        along: what the first number of a point is.
    """
    if not any(len(run.get(metric, ())) > 1 for run in runs.values() for metric in panel.metrics):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        for colour, points in zip(COLOURS, runs.values(), strict=False):
            for metric, line in zip(panel.metrics, LINES, strict=False):
                _curve(axes, points.get(metric, ()), colour, line)
        axes.set_xlabel(along)
        _finish(axes, panel, runs)
        if len(runs) > 1:
            names = [short(label) for label in runs][: len(COLOURS)]
            legend_below(figure, [Line2D([], [], color=colour) for colour in COLOURS[: len(names)]], names)
        return finished(figure)


def _curve(axes: Axes, points: Points, colour: str, line: Literal["-", "--", ":"]) -> None:
    """Draw one metric: few points with marks, many as a running mean over the pale values."""
    if not points:
        return
    steps, values = np.array(points, dtype=float).T
    if len(steps) < SMOOTHED_FROM:
        mark = "o" if len(steps) <= 12 else ""
        axes.plot(steps, values, color=colour, linestyle=line, marker=mark, markersize=3.5)
        return
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.25)
    width = len(steps) // 30
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps[width // 2 :][: len(mean)], mean, color=colour, linestyle=line)


def _finish(axes: Axes, panel: Panel, runs: Mapping[str, Mapping[str, Points]]) -> None:
    axes.set_ylabel(panel.title)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", linewidth=0.4, alpha=0.4)
    if panel.is_share:
        axes.set_ylim(0, 1.02)
    seen = [metric for metric in panel.metrics if any(run.get(metric) for run in runs.values())]
    colour = INK if len(runs) > 1 else COLOURS[0]
    lines = dict(zip(panel.metrics, LINES, strict=False))
    handles = [Line2D([], [], color=colour, linestyle=lines[metric], label=LABELS[metric]) for metric in seen]
    if len(panel.metrics) > 1:
        axes.legend(handles=handles, handlelength=2.6, loc="best")
