"""A contact sheet: the frames of a video of which S5 keeps most tokens, over time."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.data.predicting.rows import clock
from pipelines.plots.drawing import COLOURS, STYLE
from s5.evaluation.prediction import VideoPrediction
from s5.video.reader import FrameArray, IntArray

COLUMNS, CELL_INCHES, DPI = 6, 1.6, 110


def draw_contact_sheet(name: str, found: VideoPrediction, places_M: IntArray, frames_MSSC: FrameArray) -> bytes:
    """Return a PNG of frames with their times and the share of their tokens kept, above that share over time.

    Args:
        name: of the video.
        found: its prediction, with kept tokens.
        places_M: which frames of the kept tokens are shown, ascending.
        frames_MSSC: these frames, with what is dropped dimmed.
    """
    assert found.kept is not None
    times_F, share_F = found.kept.times_F, found.kept.share_FRQ.mean((1, 2))
    rows = -(-len(places_M) // COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMNS * CELL_INCHES, rows * (CELL_INCHES + 0.25) + 1.7), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(rows + 1, COLUMNS, height_ratios=[*[CELL_INCHES + 0.25] * rows, 1.2])
        for number, (place, frame) in enumerate(zip(places_M, frames_MSSC, strict=True)):
            cell = figure.add_subplot(grid[number // COLUMNS, number % COLUMNS])
            cell.imshow(frame)
            cell.set_title(f"{clock(times_F[place])}  {share_F[place]:.0%} kept", fontsize=7)
            cell.set_axis_off()
        below = figure.add_subplot(grid[rows, :])
        below.step(np.append(times_F, found.end_s), np.append(share_F, share_F[-1]), where="post", color=COLOURS[0])
        below.plot(times_F[places_M], share_F[places_M], "o", color=COLOURS[1], markersize=3)
        below.axhline(share_F.mean(), color=COLOURS[1], linewidth=0.8, linestyle="--")
        below.set(xlim=(0, found.end_s), ylim=(0, 1), xlabel="seconds", ylabel="share kept")
        said = f"{found.label} ({found.probability:.0%})" if found.classes else f"{found.value:.4g}"
        figure.suptitle(f"{name}: {said}", fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
