"""What accuracy costs: the share of tokens kept, speed and memory of all training runs, those of sweeps too."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.plots.drawing import NAMES
from pipelines.plots.sweeps import tradeoff
from pipelines.reporting.seeds import finite
from pipelines.reporting.table import Figure, Table, labels, value_text
from pipelines.tracking.history import Run

REACHED = {
    "pretrain": ("knn/top1", "linear/top1"),
    "finetune": ("best/val/accuracy", "val/accuracy", "best/val/mse", "val/mse"),
}
"""What a training run is judged by: the first of these that it has."""
COSTS = {
    "train/keep_ratio": "Share of tokens kept",
    "train/clips_per_second": "Clips a second",
    "train/memory_gib": "Peak memory, GiB",
}
DECODER = "model.decoder.name"
ROWS = 100
"""Rows of the table at most; the figures have all runs."""


def cost_tables(runs: Sequence[Run]) -> list[Table]:
    """Return a table of what each training run reached and cost, for each stage and measure; none for a single run."""
    latest = {(run.stage, run.out): run for run in runs if run.stage in REACHED and run.is_finished}
    by_measure: dict[tuple[str, str], list[Run]] = {}
    for run in latest.values():
        measure = next((name for name in REACHED[run.stage] if finite([run.metrics.get(name)])), None)
        if measure is not None:
            by_measure.setdefault((run.stage, measure.removeprefix("best/")), []).append(run)
    return [
        _table(stage, measure, ours)
        for (stage, measure), ours in by_measure.items()
        if len(ours) > 1 and any(name in run.metrics for run in ours for name in COSTS)
    ]


def _reached(run: Run, measure: str) -> float:
    return run.metrics.get(f"best/{measure}", run.metrics.get(measure, 0.0))


def _table(stage: str, measure: str, runs: Sequence[Run]) -> Table:
    costs = [name for name in COSTS if any(name in run.metrics for run in runs)]
    sign = 1 if measure.endswith("mse") else -1
    named = sorted(zip(labels(runs), runs, strict=True), key=lambda pair: sign * _reached(pair[1], measure))
    rows = tuple(
        (
            label,
            run.params.get(DECODER, ""),
            *(value_text(name, run.metrics.get(name)) for name in costs),
            value_text(measure, _reached(run, measure)),
        )
        for label, run in named[:ROWS]
    )
    title = f"{stage}: {measure} and what it costs"
    note = f"The {ROWS} best of {len(runs)} runs; figures show all." if len(runs) > ROWS else ""
    figures = tuple(figure for name in costs for figure in _figure(stage, measure, name, runs))
    return Table(title, ("run", "decoder", *costs, measure), rows, figures, note, on_terminal=False)


def _figure(stage: str, measure: str, cost: str, runs: Sequence[Run]) -> list[Figure]:
    """Draw a measure against a cost; nothing where all runs cost the same."""
    points: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        if spent := finite([run.metrics.get(cost)]):
            points.setdefault(run.params.get(DECODER, ""), []).append((spent[0], _reached(run, measure)))
    if len({round(pair[0], 4) for pairs in points.values() for pair in pairs}) < 2:
        return []
    reached = NAMES.get(measure, measure)
    drawing = tradeoff(points, COSTS[cost], reached)
    name = f"{stage}_{measure.rpartition('/')[2]}_against_{cost.rpartition('/')[2]}"
    return [Figure(name, f"{stage}: {reached} – {COSTS[cost]}", drawing)]
