"""Pictures of clips."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NEIGHBOURS = "neighbours.png"
"""Name of the picture of nearest clips below an evaluation's --out."""
CELL_INCHES = 1.7
NAME_CHARACTERS = 24


@dataclass(frozen=True)
class Neighbours:
    """Query clips and the clips that are nearest to them in feature space.

    Shapes: N clips, H and W pixels, K neighbours a clip.
    """

    frames_NHWC: npt.NDArray[np.uint8]
    """A frame of each clip."""
    names: list[str]
    """Video of each clip."""
    queries: list[int]
    """Clips shown as queries, one a row."""
    index_NK: list[list[int]]
    """Nearest other clips of each clip, best first."""
    similarity_NK: list[list[float]]
    """Their cosine similarities."""


def draw_neighbours(picture: Neighbours) -> bytes:
    """Return a PNG with one row a query: its clip at the left, its nearest clips beside it with their similarity.

    Clips of the query's own video have a green frame.
    """
    rows, columns = len(picture.queries), 1 + len(picture.index_NK[0])
    figure = Figure(figsize=(columns * CELL_INCHES, rows * (CELL_INCHES + 0.35)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, query in enumerate(picture.queries):
        own = picture.names[query]
        _cell(axes[row][0], picture.frames_NHWC[query], f"query\n{_short(own)}", "black")
        for column, (clip, similarity) in enumerate(
            zip(picture.index_NK[query], picture.similarity_NK[query], strict=True), 1
        ):
            name = picture.names[clip]
            colour = "#009e73" if name == own else "#999999"
            _cell(axes[row][column], picture.frames_NHWC[clip], f"{similarity:.2f}\n{_short(name)}", colour)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _cell(axes: Axes, frame_HWC: npt.NDArray[np.uint8], title: str, colour: str) -> None:
    axes.imshow(frame_HWC)
    axes.set_title(title, fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(2.5)


def _short(name: str) -> str:
    """Return the end of a video's id, which tells most."""
    return name if len(name) <= NAME_CHARACTERS else "…" + name[1 - NAME_CHARACTERS :]
