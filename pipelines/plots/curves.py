"""Figures of the report, as PNG: learning curves and sweep maps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[int, float]]

# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
}
LINES: tuple[Literal["-", "--"], ...] = ("-", "--")
DPI = 200
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
}
NAMES = {
    "val/accuracy": "Validation accuracy",
    "val/mse": "Validation error (MSE)",
    "knn/top1": "kNN top-1 accuracy",
    "test/accuracy": "Test accuracy",
}


@dataclass(frozen=True)
class Panel:
    """A part of a figure: metrics that share an axis, the first drawn as a full line, the second dashed."""

    title: str
    metrics: tuple[str, ...]
    is_share: bool = False
    """Whether the values are shares, from 0 to 1."""


PANELS = {
    "pretrain": (
        Panel("Contrastive loss", ("train/loss",)),
        Panel("Top-1 accuracy", ("knn/top1", "train/top1"), True),
    ),
    "finetune": (
        Panel("Loss", ("val/loss", "train/loss")),
        Panel("Accuracy", ("val/accuracy", "train/accuracy"), True),
    ),
}


@dataclass(frozen=True)
class Trial:
    """A trial of a sweep: its values in the order of the keys, and its result."""

    values: tuple[str, ...]
    result: float | None


def is_error(metric: str) -> bool:
    """Return whether lower values of a metric are better."""
    return metric.rpartition("/")[2] in ("mse", "mae", "loss")


def number(text: str) -> float | None:
    """Return a text's value, or None where it is no number."""
    try:
        return float(text)
    except ValueError:
        return None


def learning_curves(stage: str, runs: Mapping[str, Mapping[str, Points]]) -> bytes:
    """Draw metrics of a stage's runs against the optimisation step.

    Args:
        stage: `pretrain` or `finetune`.
        runs: points by metric by the run's label; at most as many runs as `COLOURS`.
    """
    drawn = [panel for panel in PANELS[stage] if any(run.get(m) for run in runs.values() for m in panel.metrics)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(drawn), 2.9), layout="constrained")
        for column, panel in enumerate(drawn):
            axes = figure.add_subplot(1, len(drawn), column + 1)
            for colour, points in zip(COLOURS, runs.values(), strict=False):
                for metric, line in zip(panel.metrics, LINES, strict=False):
                    _curve(axes, points.get(metric, ()), colour, line)
            _finish_panel(axes, panel, runs)
        if len(runs) > 1:
            handles = [Line2D([], [], color=colour, label=label) for colour, label in zip(COLOURS, runs, strict=False)]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 4))
        return _png(figure)


def _curve(axes: Axes, points: Points, colour: str, line: Literal["-", "--"]) -> None:
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


def _finish_panel(axes: Axes, panel: Panel, runs: Mapping[str, Mapping[str, Points]]) -> None:
    axes.set_xlabel("Optimisation step")
    axes.set_ylabel(panel.title)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", linewidth=0.4, alpha=0.4)
    if panel.is_share:
        axes.set_ylim(0, 1.02)
    seen = [metric for metric in panel.metrics if any(run.get(metric) for run in runs.values())]
    colour = "0.25" if len(runs) > 1 else COLOURS[0]
    lines = dict(zip(panel.metrics, LINES, strict=False))
    handles = [Line2D([], [], color=colour, linestyle=lines[metric], label=LABELS[metric]) for metric in seen]
    if len(panel.metrics) > 1:
        axes.legend(handles=handles, handlelength=2.6, loc="best")


def sweep_map(keys: tuple[str, ...], trials: Sequence[Trial], metric: str, is_lowest_best: bool) -> bytes | None:
    """Draw a sweep's results: a line over one key, a map over two; None where there is nothing that could be drawn."""
    done = [trial for trial in trials if trial.result is not None and np.isfinite(trial.result)]
    if not done or len(keys) not in (1, 2):
        return None
    with matplotlib.rc_context(STYLE):
        if len(keys) == 1:
            return _png(_line(keys[0], done, metric))
        rows, columns = (_ordered({trial.values[i] for trial in trials}) for i in (0, 1))
        is_grid = len(rows) * len(columns) <= 2 * len(trials)
        if is_grid:
            return _png(_heat_map(keys, rows, columns, done, metric, is_lowest_best))
        return _png(_scatter(keys, done, metric, is_lowest_best))


def _ordered(values: set[str]) -> list[str]:
    """Return values by size where all are numbers, else by name."""
    return sorted(values, key=lambda value: (number(value) is None, number(value) or 0.0, value))


def _mean(trials: Sequence[Trial]) -> float:
    return float(np.mean([trial.result for trial in trials if trial.result is not None]))


def _line(key: str, trials: Sequence[Trial], metric: str) -> Figure:
    values = _ordered({trial.values[0] for trial in trials})
    sizes = [number(value) for value in values]
    is_numeric = None not in sizes and len(values) > 1
    places = [size if is_numeric and size is not None else float(i) for i, size in enumerate(sizes)]
    place = dict(zip(values, places, strict=True))
    means = [_mean([trial for trial in trials if trial.values[0] == value]) for value in values]
    figure = Figure(figsize=(3.6, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(places, means, color=COLOURS[0], linestyle="-" if is_numeric else "", marker="o", markersize=5)
    if len(trials) > len(values):
        x, y = [place[trial.values[0]] for trial in trials], [trial.result for trial in trials]
        axes.plot(x, np.array(y, dtype=float), ".", color="0.5", markersize=4)
    if is_numeric and min(places) > 0 and max(places) / min(places) >= 30:
        axes.set_xscale("log")
    if len(values) <= 8:
        axes.set_xticks(places, values)
        axes.minorticks_off()
    axes.margins(x=0.1, y=0.15)
    axes.set_xlabel(key)
    axes.set_ylabel(NAMES.get(metric, metric))
    axes.grid(axis="y", linewidth=0.4, alpha=0.4)
    return figure


def _heat_map(
    keys: tuple[str, ...],
    rows: Sequence[str],
    columns: Sequence[str],
    trials: Sequence[Trial],
    metric: str,
    is_lowest_best: bool,
) -> Figure:
    """Draw a cell for each pair of values, the best one framed; repeated pairs show their mean."""
    cells = np.full((len(rows), len(columns)), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if here := [trial for trial in trials if trial.values == (row, column)]:
                cells[i, j] = _mean(here)
    figure = Figure(figsize=(1.9 + 0.75 * len(columns), 1.1 + 0.55 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(cells, cmap="cividis_r" if is_lowest_best else "cividis", aspect="auto")
    for (i, j), value in np.ndenumerate(cells):
        if np.isnan(value):
            axes.text(j, i, "–", ha="center", va="center", color="0.4")
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        axes.text(
            j,
            i,
            f"{value:.3g}" if value >= 10 else f"{value:.3f}",
            ha="center",
            va="center",
            color="white" if is_dark else "black",
        )
    best = np.unravel_index(np.nanargmin(cells) if is_lowest_best else np.nanargmax(cells), cells.shape)
    frame = (float(best[1]) - 0.48, float(best[0]) - 0.46)
    axes.add_patch(Rectangle(frame, 0.96, 0.92, fill=False, edgecolor=COLOURS[1], linewidth=2))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(keys[1])
    axes.set_ylabel(keys[0])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label=NAMES.get(metric, metric))
    bar.outline.set_visible(False)
    return figure


def _scatter(keys: tuple[str, ...], trials: Sequence[Trial], metric: str, is_lowest_best: bool) -> Figure:
    """Draw trials at drawn (not gridded) values of two keys, their results as colours."""
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    places: list[list[float]] = []
    for i, set_scale, set_ticks in ((0, axes.set_yscale, axes.set_yticks), (1, axes.set_xscale, axes.set_xticks)):
        values = _ordered({trial.values[i] for trial in trials})
        sizes = [number(value) for value in values]
        numbers = [size for size in sizes if size is not None]
        if len(numbers) < len(values):
            set_ticks(range(len(values)), values)
            places.append([float(values.index(trial.values[i])) for trial in trials])
            continue
        if min(numbers) > 0 and max(numbers) / min(numbers) >= 30:
            set_scale("log")
        places.append([float(trial.values[i]) for trial in trials])
    results = [trial.result for trial in trials if trial.result is not None]
    cmap = "cividis_r" if is_lowest_best else "cividis"
    dots = axes.scatter(places[1], places[0], c=results, cmap=cmap, s=45, edgecolors="0.3", linewidths=0.5)
    axes.set_xlabel(keys[1])
    axes.set_ylabel(keys[0])
    bar = figure.colorbar(dots, ax=axes, label=NAMES.get(metric, metric))
    bar.outline.set_visible(False)
    return figure


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()
