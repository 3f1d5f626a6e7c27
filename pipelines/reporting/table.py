"""A table of texts with the figures that belong to it, and how values, names and tables are written."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from pipelines.plots.drawing import Drawing
from pipelines.tracking.history import Run

COUNTS = ("videos", "rejects", "failures", "listed")
NONE = "–"


@dataclass(frozen=True)
class Figure:
    """A figure of a table."""

    name: str
    """Name of its file, without an ending."""
    title: str
    drawing: Drawing


@dataclass(frozen=True)
class Table:
    """A table of texts under a heading."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    figures: tuple[Figure, ...] = ()
    note: str = ""
    """What a reader has to know, in a sentence."""
    on_terminal: bool = True
    """Whether it is narrow enough to be printed."""


def value_text(metric: str, value: float | None) -> str:
    """Return a metric's value with as many digits as tell something."""
    if value is None:
        return NONE
    if metric.rpartition("/")[2] in COUNTS and math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def time_text(seconds: float) -> str:
    """Return a duration in the unit that fits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def interval_text(metric: str, bounds: tuple[float, float] | None) -> str:
    """Return an interval, or that there is none."""
    return f"{value_text(metric, bounds[0])} to {value_text(metric, bounds[1])}" if bounds else NONE


def file_name(text: str) -> str:
    """Return a text as the name of a file."""
    return re.sub(r"[^\w.=-]+", "_", text).strip("_") or "figure"


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a short name for each run: its own, or its --out below the folder that all share; no name comes twice."""
    outs = [run.out.split("/") for run in runs]
    folders = zip(*(out[:-1] for out in outs), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, folders))
    places = ["/".join(out[shared:]) for out in outs]
    names = [run.name if run.name not in (run.stage, "") else place for run, place in zip(runs, places, strict=True)]
    count = Counter(names)
    return [
        name if count[name] == 1 else f"{name} ({place or run.run_id[:8]})"
        for name, place, run in zip(names, places, runs, strict=True)
    ]


def markdown(title: str, sentence: str, tables: Sequence[Table]) -> str:
    """Return a report of tables and their figures."""
    parts = [f"# {_line(title)}\n\n{_line(sentence)}\n"]
    for table in tables:
        rule = ["---"] + ["---:"] * (len(table.header) - 2) + ["---"]
        lines = [
            "| " + " | ".join(_line(cell).replace("|", "\\|") for cell in row) + " |"
            for row in (table.header, rule, *table.rows)
        ]
        note = f"{_line(table.note)}\n\n" if table.note else ""
        parts.append(f"## {_line(table.title)}\n\n{note}" + "\n".join(lines) + "\n")
        parts += [f"![{_line(figure.title)}]({figure.name}.png)\n" for figure in table.figures]
    return "\n".join(parts)


def _line(text: str) -> str:
    """Return a text in one line, in which nothing is HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")


def plain(table: Table) -> str:
    """Return a table for the terminal."""
    widths = [max(len(row[i]) for row in (table.header, *table.rows)) for i in range(len(table.header))]
    last = len(widths) - 1
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (table.header, tuple("-" * width for width in widths), *table.rows)
    ]
    note = f"{table.note}\n" if table.note else ""
    return f"\n{table.title}\n{note}" + "\n".join(line.rstrip() for line in lines)
