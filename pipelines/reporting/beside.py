"""The paper's published rows beside ours, where benchmark and task are the same."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.data.annotations.benchmarks import NAMES
from pipelines.recipes.published import published
from pipelines.recipes.row import coverage, method_in_words
from pipelines.reporting.by_stage import latest_of
from pipelines.reporting.seeds import finite, groups, mean_of
from pipelines.reporting.table import NONE, Table
from pipelines.tracking.history import Run

SPLIT = "test"
MEASURES = {"accuracy": ("top-1 %", 100.0), "mse": ("mean squared error", 1.0)}


def published_tables(runs: Sequence[Run]) -> list[Table]:
    """Return a table for each benchmark and task that evaluations are of and that results are published for."""
    finished = [run for run in latest_of(runs) if run.stage == "evaluate" and run.is_finished]
    evaluated = [run for run in finished if run.benchmark[0] in NAMES]
    tables = []
    for benchmark, task in dict.fromkeys(run.benchmark for run in evaluated):
        theirs = published(benchmark, task)
        ours = [run for run in evaluated if run.benchmark == (benchmark, task)]
        for measure, (unit, factor) in MEASURES.items():
            rows = [row for group in groups(ours, runs) for row in _our_row(group, runs, measure, factor)]
            if theirs and rows:
                known = [(method, f"{value:.2f}", NONE, NONE, "published") for method, value in theirs.items()]
                title = " ".join(filter(None, (NAMES[benchmark], task, "beside the published results")))
                header = ("method", unit, "95 % interval", "seeds", "videos")
                tables.append(Table(title, header, (*known, *rows)))
    return tables


def _our_row(group: Sequence[Run], runs: Sequence[Run], measure: str, factor: float) -> list[tuple[str, ...]]:
    """Return the row of evaluations that differ in their seed alone; none where they have no such result."""
    values = finite(run.metrics.get(f"{SPLIT}/{measure}") for run in group)
    if not values:
        return []
    mean = mean_of([factor * value for value in values])
    bounds = f"{mean.bounds[0]:.2f} to {mean.bounds[1]:.2f}" if mean.bounds else NONE
    used = int(min(run.metrics.get(f"{SPLIT}/videos", 0) for run in group))
    listed = int(max(run.metrics.get(f"{SPLIT}/listed", used) for run in group))
    found = coverage({"listed": listed, "videos": used, "rejects": listed - used})
    return [(f"{_method(group[0], runs)}, here", f"{mean.value:.2f}", bounds, str(mean.seeds), found)]


def _method(evaluation: Run, runs: Sequence[Run]) -> str:
    tuned = next((run for run in runs if run.run_id == evaluation.links.get("checkpoint")), None)
    if tuned is None:
        return evaluation.name
    origin = next((run for run in runs if run.run_id == tuned.links.get("checkpoint")), None)
    pretrained = bool(tuned.params.get("checkpoint")) and (origin is None or origin.stage == "pretrain")
    return method_in_words(tuned.params.get("model.decoder.name", ""), pretrained)
