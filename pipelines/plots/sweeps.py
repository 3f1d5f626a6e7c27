"""Figures of sweeps and of many runs: results over settings, gains, and what accuracy costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipelines.plots.drawing import (
    COLOURS,
    INK,
    NAMES,
    SIZE,
    STYLE,
    Drawing,
    finished,
    legend_below,
    number,
    ordered,
    set_scale,
    short,
)


@dataclass(frozen=True)
class Trial:
    """A trial of a sweep: its values in the order of the keys, and its result."""

    values: tuple[str, ...]
    result: float | None


@dataclass(frozen=True)
class Gain:
    """How much better one cell of a map is than what it is compared with."""

    value: float
    half: float | None = None
    """Half the width of its interval; None where there is none."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half is not None and abs(self.value) > self.half


def sweep_map(keys: tuple[str, ...], trials: Sequence[Trial], metric: str, is_lowest_best: bool) -> Drawing | None:
    """Draw a sweep's results: a line over one key, a map over two; None where there is nothing that could be drawn."""
    done = [trial for trial in trials if trial.result is not None and np.isfinite(trial.result)]
    if not done or len(keys) not in (1, 2):
        return None
    with matplotlib.rc_context(STYLE):
        if len(keys) == 1:
            return finished(_line(keys[0], done, metric))
        rows, columns = (ordered({trial.values[i] for trial in trials}) for i in (0, 1))
        is_grid = len(rows) * len(columns) <= 2 * len({trial.values for trial in trials})
        if is_grid:
            return finished(_heat_map(keys, rows, columns, done, metric, is_lowest_best))
        return finished(_scatter(keys, done, metric, is_lowest_best))


def _mean(trials: Sequence[Trial]) -> float:
    return float(np.mean([trial.result for trial in trials if trial.result is not None]))


def _line(key: str, trials: Sequence[Trial], metric: str) -> Figure:
    values = ordered({trial.values[0] for trial in trials})
    sizes = [number(value) for value in values]
    is_numeric = None not in sizes and len(values) > 1
    places = [size if is_numeric and size is not None else float(i) for i, size in enumerate(sizes)]
    place = dict(zip(values, places, strict=True))
    means = [_mean([trial for trial in trials if trial.values[0] == value]) for value in values]
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(places, means, color=COLOURS[0], linestyle="-" if is_numeric else "", marker="o", markersize=5)
    if len(trials) > len(values):
        x, y = [place[trial.values[0]] for trial in trials], [trial.result for trial in trials]
        axes.plot(x, np.array(y, dtype=float), ".", color=INK, alpha=0.5, markersize=4)
    if is_numeric:
        set_scale(axes, "x", places)
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
    texts: dict[tuple[int, int], str] = {}
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if here := [trial for trial in trials if trial.values == (row, column)]:
                cells[i, j] = _mean(here)
                texts[i, j] = f"{cells[i, j]:.3g}" if cells[i, j] >= 10 else f"{cells[i, j]:.3f}"
    best = np.unravel_index(np.nanargmin(cells) if is_lowest_best else np.nanargmax(cells), cells.shape)
    colours = "cividis_r" if is_lowest_best else "cividis"
    label = NAMES.get(metric, metric)
    return _map(cells, texts, {(int(best[0]), int(best[1]))}, keys, rows, columns, label, colours)


def gain_map(
    keys: tuple[str, str], gains: Mapping[tuple[str, str], Gain], rows: Sequence[str], columns: Sequence[str], what: str
) -> Drawing:
    """Draw gains (blue) and losses (red); those whose interval leaves out 0 are framed.

    Args:
        keys: the settings of rows and columns; an empty first one for a single row.
        gains: by the values of row and column.
        rows: values of the rows, in order.
        columns: values of the columns, in order.
        what: is gained.
    """
    cells = np.full((len(rows), len(columns)), np.nan)
    texts: dict[tuple[int, int], str] = {}
    framed = set()
    for (row, column), gain in gains.items():
        place = rows.index(row), columns.index(column)
        cells[place] = gain.value
        texts[place] = f"{gain.value:+.3f}" + (f"\n±{gain.half:.3f}" if gain.half is not None else "")
        if gain.is_clear:
            framed.add(place)
    largest = float(np.nanmax(np.abs(cells))) or 1.0
    with matplotlib.rc_context(STYLE):
        return finished(_map(cells, texts, framed, keys, rows, columns, what, "RdBu", (-largest, largest)))


def _map(
    cells: npt.NDArray[Any],
    texts: Mapping[tuple[int, int], str],
    framed: set[tuple[int, int]],
    keys: tuple[str, ...],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    colours: str,
    limits: tuple[float, float] | tuple[None, None] = (None, None),
) -> Figure:
    # A setting's name needs room under a single column, the colour bar's beside a single row.
    size = (max(4.8, 1.9 + 0.75 * len(columns)), max(2.4, 1.3 + 0.55 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(cells, cmap=colours, aspect="auto", vmin=limits[0], vmax=limits[1])
    for (i, j), value in np.ndenumerate(cells):
        colour = INK
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
        axes.text(j, i, texts.get((i, j), "–"), ha="center", va="center", color=colour)
    colour = "black" if limits[0] is not None else COLOURS[1]
    for i, j in framed:
        axes.add_patch(Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, fill=False, edgecolor=colour, linewidth=2))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(keys[1])
    axes.set_ylabel(keys[0])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label=label)
    bar.outline.set_visible(False)
    return figure


def _scatter(keys: tuple[str, ...], trials: Sequence[Trial], metric: str, is_lowest_best: bool) -> Figure:
    """Draw trials at drawn (not gridded) values of two keys, their results as colours."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    places: list[list[float]] = []
    for i, set_ticks in ((0, axes.set_yticks), (1, axes.set_xticks)):
        values = ordered({trial.values[i] for trial in trials})
        sizes = [number(value) for value in values]
        numbers = [size for size in sizes if size is not None]
        if len(numbers) < len(values):
            set_ticks(range(len(values)), values)
            places.append([float(values.index(trial.values[i])) for trial in trials])
            continue
        set_scale(axes, "y" if i == 0 else "x", numbers)
        places.append([float(trial.values[i]) for trial in trials])
    results = [trial.result for trial in trials if trial.result is not None]
    cmap = "cividis_r" if is_lowest_best else "cividis"
    dots = axes.scatter(places[1], places[0], c=results, cmap=cmap, s=45, edgecolors="0.3", linewidths=0.5)
    axes.set_xlabel(keys[1])
    axes.set_ylabel(keys[0])
    bar = figure.colorbar(dots, ax=axes, label=NAMES.get(metric, metric))
    bar.outline.set_visible(False)
    return figure


def tradeoff(points: Mapping[str, Sequence[tuple[float, float]]], across: str, upwards: str) -> Drawing:
    """Draw runs as points, with a colour for each group.

    Args:
        points: pairs of both measures by the group's name; groups beyond those of `COLOURS` share the last colour.
        across: name of the first measure.
        upwards: name of the second.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        for place, (group, pairs) in enumerate(points.items()):
            x, y = np.array(pairs, dtype=float).T
            colour = COLOURS[min(place, len(COLOURS) - 1)]
            axes.plot(x, y, "o", color=colour, markersize=4, alpha=0.8, label=short(group))
        axes.margins(0.1, 0.15)
        axes.set_xlabel(across)
        axes.set_ylabel(upwards)
        axes.grid(linewidth=0.4, alpha=0.4)
        if len(points) > 1:
            legend_below(figure, *axes.get_legend_handles_labels())
        return finished(figure)
