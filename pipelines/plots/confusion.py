"""The confusion matrix of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from pipelines.plots.drawing import STYLE, Drawing, finished, short

CONFUSION = "confusion.png"
"""Name of the figure below an evaluation's --out."""
COUNTED_CLASSES = 20
NAMED_CLASSES = 60
"""Most classes whose cells have room for counts, and whose rows have room for names."""


def draw_confusion(counts_CC: npt.NDArray[np.int64], classes: Sequence[str]) -> Drawing:
    """Draw how often each class (rows) is predicted as each (columns), as shares of the row.

    Args:
        counts_CC: number of videos by label and prediction.
        classes: their names.
    """
    totals = counts_CC.sum(1, keepdims=True)
    shares = counts_CC / np.maximum(totals, 1)
    count = len(classes)
    side = min(10.0, max(2.5, 0.32 * count))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(side + 1.8, side + 1.2), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if count <= COUNTED_CLASSES:
            for (i, j), number in np.ndenumerate(counts_CC):
                colour = "white" if shares[i, j] > 0.5 else "black"
                if number:
                    axes.text(j, i, str(number), ha="center", va="center", color=colour, fontsize=8)
        if count <= NAMED_CLASSES:
            names = [short(name) for name in classes]
            axes.set_xticks(range(count), names, rotation=90)
            axes.set_yticks(range(count), names)
        axes.set_xlabel("Predicted class")
        axes.set_ylabel("Class")
        axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, label="Share of the class", shrink=0.7)
        bar.outline.set_visible(False)
        return finished(figure)
