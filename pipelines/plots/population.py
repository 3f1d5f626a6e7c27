"""The figure of population-based training: what members reach, and with which values, over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.plots.drawing import COLOURS, INK, NAMES, SIZE, STYLE, Drawing, finished, set_scale


@dataclass(frozen=True)
class Part:
    """A part of a member's training."""

    end: int
    """Epoch after which it ends."""
    begin: int
    """Epoch after which it begins."""
    result: float
    result_before: float | None
    """What its weights had reached when it began; None at the beginning of the training."""
    values: tuple[float | None, ...]
    """In the order of the settings; None for one that is no number."""
    is_best: bool
    """Whether the best member's weights went through it."""


def population_figure(keys: Sequence[str], parts: Sequence[Part], metric: str) -> Drawing:
    """Draw results and values over epochs, one above the other; the line of the best member stands out.

    Args:
        keys: the settings that vary; those without numbers are left out.
        parts: of all members.
        metric: what is reached.
    """
    numeric = [i for i in range(len(keys)) if all(part.values[i] is not None for part in parts)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], SIZE[1] * (1 + 0.6 * len(numeric))), layout="constrained")
        ratios = [1.0, *[0.6] * len(numeric)]
        axes = figure.subplots(1 + len(numeric), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        for part in sorted(parts, key=lambda part: part.is_best):
            look = {"color": COLOURS[1], "linewidth": 1.8} if part.is_best else {"color": INK, "alpha": 0.35}
            if part.result_before is None:
                axes[0].plot([part.end], [part.result], "o", markersize=3, **look)
            else:
                axes[0].plot([part.begin, part.end], [part.result_before, part.result], **look)
            for axis, i in zip(axes[1:], numeric, strict=True):
                axis.plot([part.begin, part.end], [part.values[i]] * 2, **look)
        axes[0].set_ylabel(NAMES.get(metric, metric))
        for axis, i in zip(axes[1:], numeric, strict=True):
            axis.set_ylabel(keys[i])
            set_scale(axis, "y", [value for part in parts if (value := part.values[i]) is not None])
        axes[-1].set_xlabel("epoch")
        axes[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return finished(figure)
