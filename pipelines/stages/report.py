"""Report: what MLflow holds of an experiment, as tables and figures."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from pipelines import storage
from pipelines.config import STAGES, ReportConfig
from pipelines.errors import UserError
from pipelines.plots import curves
from pipelines.plots.neighbours import NEIGHBOURS
from pipelines.running.stage import Stage, stage_run
from pipelines.tracking.history import Run, metric_history, read_runs
from pipelines.tracking.uri import OFF, resolve_uri
from pipelines.tuning.trials import OBJECTIVE, Objective

REPORT = "report.md"
KEY_METRICS: dict[str, tuple[str, ...]] = {
    "sample": ("video_seconds",),
    "index": ("index/videos", "index/rejects"),
    "pretrain": (
        "knn/top1",
        "train/loss",
        "train/top1",
        "train/embedding_spread",
        "train/clips_per_second",
        "train/data_wait_share",
        "data/failures_total",
    ),
    "finetune": ("val/accuracy", "val/mse", "val/loss", "train/accuracy", "train/loss", "train/keep_ratio"),
    "evaluate": ("test/accuracy", "test/chance", "test/mse", "test/videos", "knn/top1", "retrieval/same_video"),
}
OTHER_METRICS = 6
COUNTS = ("videos", "rejects", "failures")
SWEEP_METRICS = ("val/accuracy", "val/mse", "knn/top1")
"""What a sweep was compared by that did not log its objective: the first that its trials have."""
TRIAL = "trial."
"""What the parameters of a trial's run begin with that hold its values."""
NONE = "–"


@dataclass(frozen=True)
class Table:
    """A table of texts under a heading, with the figures that belong to it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    figures: tuple[str, ...] = ()


def run(config: ReportConfig) -> dict[str, Any]:
    """Write report.md and its figures from the runs of an experiment, and print the tables.

    Returns:
        `source` (URI and experiment), `tables` (title, header and rows) and the paths `report` and `figures`.

    Raises:
        UserError: MLflow holds no such runs, or cannot be read.
    """
    out = storage.absolute(config.out)
    uri = resolve_uri(config.tracking, out)
    runs = read_runs(uri, config.tracking.experiment, config.runs)
    if not runs:
        where = f" below {storage.absolute(config.runs)}" if config.runs else ""
        raise UserError(
            f"MLflow at {uri} holds no runs of experiment {config.tracking.experiment!r}{where}: run a stage with the "
            "same --tracking.uri and --tracking.experiment first" + (", or give another --runs" if where else "")
        )
    # A run of its own would stand in the next report.
    unlogged = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, uri=OFF))
    with stage_run("report", unlogged) as stage:
        tables = stage_tables(stage, uri, runs) + sweep_tables(stage, runs)
        title = f"Experiment {config.tracking.experiment}"
        stage.folder.write(REPORT, markdown(title, f"{len(runs)} run(s) in MLflow at {uri}.", tables).encode())
        stage.counts["runs"] = len(runs)
        stage.details |= {
            "source": {"uri": uri, "experiment": config.tracking.experiment},
            "tables": [{"title": t.title, "header": t.header, "rows": t.rows} for t in tables],
            "report": stage.path(REPORT),
            "figures": [stage.path(name) for table in tables for name in table.figures],
        }
        for table in tables:
            print(plain(table), flush=True)
        stage.info(f"wrote {stage.path(REPORT)}")
        for path in stage.details["figures"]:
            stage.info(f"wrote {path}")
        for picture in pictures(runs):
            stage.info(f"query clips and their nearest clips: {picture}")
        stage.info(f"results, checkpoints and logs lie below {storage.absolute(config.runs or config.out)}")
        stage.info(f"to open the runs in MLflow: {opening(uri, runs[0].experiment_id)}")
        return dict(stage.details)


def pictures(runs: Sequence[Run]) -> list[str]:
    """Return the pictures of nearest clips that evaluations of pretrained checkpoints have left."""
    paths = [storage.join(run.out, NEIGHBOURS) for run in runs if run.stage == "evaluate"]
    return [path for path in dict.fromkeys(paths) if storage.exists(path)]


def opening(uri: str, experiment_id: str) -> str:
    """Return how a person opens an experiment: its address, or the command that serves a database and the address."""
    # Without `runs`, MLflow's page opens on traces of language models.
    page = f"#/experiments/{experiment_id}/runs"
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/{page}"
    return f"{os.path.relpath(sys.executable)} -m mlflow ui --backend-store-uri {uri}\n         and open http://127.0.0.1:5000/{page}"


# --- stages ---------------------------------------------------------------------------------------------------------


def stage_tables(stage: Stage, uri: str, runs: Sequence[Run]) -> list[Table]:
    """Return a table for each stage that has runs outside of sweeps: the latest of each --out."""
    latest = {(run.stage, run.out): run for run in runs if not run.parent_run}
    names = sorted({name for name, _ in latest}, key=lambda name: (name not in STAGES, (*STAGES, name).index(name)))
    tables = []
    for name in names:
        ours = [run for run in latest.values() if run.stage == name]
        drawn = _draw_curves(stage, uri, name, ours) if name in curves.PANELS else ()
        if name != "sweep":
            tables.append(_stage_table(name, ours, drawn))
    return tables


def _stage_table(name: str, runs: Sequence[Run], drawn: tuple[str, ...]) -> Table:
    logged = {metric for run in runs for metric in run.metrics}
    metrics = [metric for metric in KEY_METRICS.get(name, ()) if metric in logged] or sorted(logged)[:OTHER_METRICS]
    has_checkpoint = any("checkpoint" in run.params for run in runs)
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        start = run.params.get("checkpoint", "").rstrip("/").rpartition("/")[2] or "scratch"
        cells = [label, *([start] if has_checkpoint else [])]
        cells += [value_text(metric, run.metrics.get(metric)) for metric in metrics]
        rows.append((*cells, time_text(run.seconds), run.status.lower()))
    header = ("run", *(["checkpoint"] if has_checkpoint else []), *metrics, "time", "status")
    return Table(name, header, tuple(rows), drawn)


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a short name for each run: its own, or its --out below the folder that all share."""
    outs = [run.out.split("/") for run in runs]
    folders = zip(*(out[:-1] for out in outs), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, folders))
    return [
        run.name if run.name not in (run.stage, "") else "/".join(out[shared:])
        for run, out in zip(runs, outs, strict=True)
    ]


def _draw_curves(stage: Stage, uri: str, name: str, runs: Sequence[Run]) -> tuple[str, ...]:
    """Draw the learning curves of a stage's latest runs; return the figure's name, or nothing."""
    metrics = [metric for panel in curves.PANELS[name] for metric in panel.metrics]
    shown = [
        (label, run) for label, run in zip(labels(runs), runs, strict=True) if any(m in run.metrics for m in metrics)
    ][-len(curves.COLOURS) :]
    points = {
        label: {metric: metric_history(uri, run.run_id, metric) for metric in metrics if metric in run.metrics}
        for label, run in shown
    }
    if not any(len(curve) > 1 for run in points.values() for curve in run.values()):
        return ()
    figure = f"curves_{name}.png"
    stage.folder.write(figure, curves.learning_curves(name, points))
    return (figure,)


# --- sweeps ---------------------------------------------------------------------------------------------------------


def sweep_tables(stage: Stage, runs: Sequence[Run]) -> list[Table]:
    """Return a table of the trials of each sweep, the latest of each --out, with a figure over one or two keys."""
    sweeps = list({run.out: run for run in runs if run.stage == "sweep" and not run.parent_run}.values())
    tables = []
    for sweep, label in zip(sweeps, labels(sweeps), strict=True):
        children = {run.out or run.run_id: run for run in runs if run.parent_run == sweep.run_id}
        trials = [run for run in children.values() if any(key.startswith(TRIAL) for key in run.params)]
        keys = swept_keys(trials, sweep.params.get("space", ""))
        title = label if label.startswith("sweep") else f"sweep {label}"
        tables.append(_sweep_table(stage, title, keys, objective(sweep, trials), trials))
    return tables


def objective(sweep: Run, trials: Sequence[Run]) -> Objective:
    """Return what a sweep compared its trials by, as it logged it."""
    metric = (
        sweep.params.get(f"{OBJECTIVE}metric")
        or sweep.params.get("metric")
        or next((known for known in SWEEP_METRICS if any(known in trial.metrics for trial in trials)), SWEEP_METRICS[0])
    )
    logged = sweep.params.get(f"{OBJECTIVE}mode")
    return Objective(metric, "min" if logged == "min" or (not logged and curves.is_error(metric)) else "max")


def swept_keys(trials: Sequence[Run], space: str) -> tuple[str, ...]:
    """Return the settings that vary between trials, in the order of the sweep's space.

    The keys are read from the trials: MLflow cuts off a space of more than 6,000 characters.
    """
    found = {key.removeprefix(TRIAL) for trial in trials for key in trial.params if key.startswith(TRIAL)}
    entries = space.replace("-", "_")
    places = {key: entries.find(f'"{key}=') for key in found}
    return tuple(sorted(found, key=lambda key: (places[key] < 0, places[key], key)))


def _sweep_table(stage: Stage, title: str, keys: tuple[str, ...], compared_by: Objective, runs: Sequence[Run]) -> Table:
    metric, is_lowest_best = compared_by.metric, compared_by.mode == "min"
    trials = [
        curves.Trial(tuple(run.params.get(f"{TRIAL}{key}", NONE) for key in keys), run.metrics.get(metric))
        for run in runs
    ]
    sign = 1 if is_lowest_best else -1

    def rank(i: int) -> tuple[bool, float]:
        result = trials[i].result
        return (result is None or math.isnan(result), sign * (result or 0.0))

    rows = tuple(
        (*trials[i].values, value_text(metric, trials[i].result), time_text(runs[i].seconds), runs[i].status.lower())
        for i in sorted(range(len(runs)), key=rank)
    )
    drawn: tuple[str, ...] = ()
    if content := curves.sweep_map(keys, trials, metric, is_lowest_best):
        drawn = (f"{title.replace(' ', '_').replace('/', '_')}.png",)
        stage.folder.write(drawn[0], content)
    return Table(title, (*keys, metric, "time", "status"), rows, drawn)


# --- texts ----------------------------------------------------------------------------------------------------------


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


def markdown(title: str, sentence: str, tables: Sequence[Table]) -> str:
    """Return a report of tables and their figures."""
    parts = [f"# {title}\n\n{sentence}\n"]
    for table in tables:
        rule = ["---"] + ["---:"] * (len(table.header) - 2) + ["---"]
        lines = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
            for row in (table.header, rule, *table.rows)
        ]
        parts.append(f"## {table.title}\n\n" + "\n".join(lines) + "\n")
        parts += [f"![{table.title}]({name})\n" for name in table.figures]
    return "\n".join(parts)


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
    return f"\n{table.title}\n" + "\n".join(line.rstrip() for line in lines)
