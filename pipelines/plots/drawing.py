"""What all figures of the report share: their style, and the two forms that they are written in."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow is too pale for lines.
INK = "#010203"
"""Colour of texts and axes: black in a PNG; in an SVG it becomes that of the text around it, on a dark page too."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", INK)
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    # Names come from users: a dollar sign starts no formula.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "s5",
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
SIZE = (4.4, 2.9)
"""Inches: at the width of a phone, texts keep the size of those around the figure."""
DPI = 200
LOG_FROM = 30
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
NAME_CHARACTERS = 44
"""Of a name in a legend."""
LEGEND_COLUMNS = 4
NAMES = {
    "val/accuracy": "Validation accuracy",
    "val/mse": "Validation error (MSE)",
    "knn/top1": "kNN top-1 accuracy",
    "linear/top1": "Linear probe top-1 accuracy",
    "test/accuracy": "Test accuracy",
}


@dataclass(frozen=True)
class Drawing:
    """A figure in two forms."""

    png: bytes
    svg: str
    """For a page: one element without ids of its parts, in the colour of the text around it."""


def finished(figure: Figure) -> Drawing:
    """Return a figure in both forms; call it within the style."""
    FigureCanvasAgg(figure)
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=DPI)
    # The layout is found; working it out takes longer than to draw.
    figure.set_layout_engine("none")
    figure.savefig(svg, format="svg", transparent=True)
    element = svg.getvalue()
    element = element[element.index("<svg") :].replace(INK, "currentColor")
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    # Several figures of a page would have the same ones.
    return Drawing(png.getvalue(), re.sub(r'<g id="[^"]*"', "<g", element).strip())


def set_scale(axes: Axes, along: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic where the values on it are far apart."""
    if min(values) <= 0 or max(values) / min(values) < LOG_FROM:
        return
    axes.set(**{f"{along}scale": "log"})
    axis = axes.xaxis if along == "x" else axes.yaxis
    # matplotlib writes powers as formulas, which the style shows as they are.
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def number(text: str) -> float | None:
    """Return a text's value, or None where it is no number."""
    try:
        return float(text)
    except ValueError:
        return None


def short(name: str) -> str:
    """Return the end of a long name, which tells most, so that a legend has room for it."""
    return name if len(name) <= NAME_CHARACTERS else "…" + name[1 - NAME_CHARACTERS :]


def legend_below(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """Draw a legend below a figure, in as many columns as fit beside each other."""
    renderer: Any = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    for columns in range(LEGEND_COLUMNS, 0, -1):
        legend = figure.legend(handles, names, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()


def size_order(value: str) -> tuple[bool, float, str]:
    """Return what sorts texts by size where they are numbers, and the others after them by name."""
    size = number(value)
    return (size is None, size or 0.0, value)


def ordered(values: set[str]) -> list[str]:
    """Return values by size where all are numbers, else by name."""
    return sorted(values, key=size_order)
