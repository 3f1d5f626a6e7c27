"""Tables of the stages: results and learning curves, the settings that differ, and means over seeds."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.config import STAGES
from pipelines.plots import curves
from pipelines.plots.drawing import COLOURS
from pipelines.reporting.seeds import UNIMPORTANT, finite, groups, mean_of
from pipelines.reporting.table import NONE, Figure, Table, file_name, interval_text, labels, time_text, value_text
from pipelines.tracking.history import Run, metric_history

KEY_METRICS: dict[str, tuple[str, ...]] = {
    "sample": ("video_seconds",),
    "index": ("index/videos", "index/rejects"),
    "pretrain": (
        "knn/top1",
        "linear/top1",
        "train/loss",
        "train/top1",
        "train/embedding_spread",
        "train/clips_per_second",
        "train/data_wait_share",
        "data/failures_total",
    ),
    "finetune": ("val/accuracy", "val/mse", "val/loss", "train/accuracy", "train/loss", "train/keep_ratio"),
    "evaluate": (
        "test/accuracy",
        "test/chance",
        "test/mse",
        "test/videos",
        "knn/top1",
        "linear/top1",
        "retrieval/same_video",
    ),
}
OTHER_METRICS = 6
SEEN = "train/clips_seen"


def latest_of(runs: Sequence[Run]) -> list[Run]:
    """Return the runs outside of sweeps, the latest of each stage and --out."""
    return list({(run.stage, run.out): run for run in runs if not run.parent_run}.values())


def stage_tables(uri: str, runs: Sequence[Run]) -> list[Table]:
    """Return the tables of each stage that has runs outside of sweeps."""
    latest = latest_of(runs)
    names = sorted({run.stage for run in latest}, key=lambda n: (n not in STAGES, (*STAGES, n).index(n)))
    tables = []
    for name in names:
        ours = [run for run in latest if run.stage == name]
        if name != "sweep":
            tables.append(_results(uri, name, ours))
            tables += [*_over_seeds(name, ours, runs), *_differences(name, ours)]
    return tables


def _metrics_of(name: str, runs: Sequence[Run]) -> list[str]:
    logged = {metric for run in runs for metric in run.metrics}
    return [metric for metric in KEY_METRICS.get(name, ()) if metric in logged] or sorted(logged)[:OTHER_METRICS]


def _results(uri: str, name: str, runs: Sequence[Run]) -> Table:
    metrics = _metrics_of(name, runs)
    has_checkpoint = any("checkpoint" in run.params for run in runs)
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        start = run.params.get("checkpoint", "").rstrip("/").rpartition("/")[2] or "scratch"
        cells = [label, *([start] if has_checkpoint else [])]
        cells += [value_text(metric, run.metrics.get(metric)) for metric in metrics]
        rows.append((*cells, time_text(run.seconds), run.status.lower()))
    header = ("run", *(["checkpoint"] if has_checkpoint else []), *metrics, "time", "status")
    return Table(name, header, tuple(rows), _curves(uri, name, runs))


def _curves(uri: str, name: str, runs: Sequence[Run]) -> tuple[Figure, ...]:
    """Draw the learning curves of a stage's latest runs."""
    drawn = []
    for panel in curves.PANELS.get(name, ()):
        shown = [
            (label, run)
            for label, run in zip(labels(runs), runs, strict=True)
            if any(metric in run.metrics for metric in panel.metrics)
        ][-len(COLOURS) :]
        # Steps of different length are compared by what they have seen.
        by_clips = len({run.params.get("loop.batch_size") for _, run in shown}) > 1
        by_clips = by_clips and all(SEEN in run.metrics for _, run in shown)
        points = {label: _points(uri, run, panel.metrics, by_clips) for label, run in shown}
        along = "Clips seen" if by_clips else "Optimisation step"
        if drawing := curves.learning_curves(panel, points, along):
            drawn.append(Figure(file_name(f"curves_{name}_{panel.title}".lower()), f"{name}: {panel.title}", drawing))
    return tuple(drawn)


def _points(uri: str, run: Run, metrics: Sequence[str], by_clips: bool) -> dict[str, curves.Points]:
    found: dict[str, curves.Points] = {
        metric: metric_history(uri, run.run_id, metric) for metric in metrics if metric in run.metrics
    }
    if not by_clips:
        return found
    last_step, clips = metric_history(uri, run.run_id, SEEN)[-1]
    a_step = clips / max(1, last_step)
    return {metric: [(step * a_step, value) for step, value in points] for metric, points in found.items()}


def _over_seeds(name: str, runs: Sequence[Run], all_runs: Sequence[Run]) -> list[Table]:
    """Return a table of means over runs that differ in their seed alone; none where there are no such runs."""
    together = [group for group in groups(filter(lambda run: run.is_finished, runs), all_runs) if len(group) > 1]
    if not together:
        return []
    label = dict(zip((run.run_id for run in runs), labels(runs), strict=True))
    rows = []
    for group in together:
        names = f"{label[group[0].run_id]} and {len(group) - 1} more"
        for metric in _metrics_of(name, group):
            values = finite(run.metrics.get(metric) for run in group)
            if len(values) > 1:
                mean = mean_of(values)
                cells = (value_text(metric, mean.value), interval_text(metric, mean.bounds), str(mean.seeds))
                rows.append((names, metric, *cells))
    note = "Finished runs that differ in their seed alone: the mean, and its 95 % interval by Student's t."
    return [Table(f"{name}: over seeds", ("runs", "metric", "mean", "95 % interval", "seeds"), tuple(rows), (), note)]


def _differences(name: str, runs: Sequence[Run]) -> list[Table]:
    """Return a table of the settings that differ between runs; none for a single run."""
    if len(runs) < 2:
        return []
    keys = dict.fromkeys(key for run in runs for key in run.params if not key.startswith(UNIMPORTANT))
    differing = [key for key in keys if len({run.params.get(key) for run in runs}) > 1]
    title = f"{name}: settings that differ"
    rows = tuple(
        (label, *(run.params.get(key, NONE) or "''" for key in differing))
        for label, run in zip(labels(runs), runs, strict=True)
    )
    if not differing:
        return []
    return [Table(title, ("run", *differing), rows, on_terminal=False)]
