"""What a sweep has found: a table with a row a trial, means and intervals over seeds, and the best setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import pyarrow as pa

from pipelines.running.intervals import interval
from pipelines.tuning.ready_spaces import KEEP_RATIO, MASK_RATIO
from pipelines.tuning.records import Record
from pipelines.tuning.search_space import Choice, Dimension, holds, name_of
from pipelines.tuning.trials import Objective

TABLE = "sweep.parquet"
BASELINES: dict[str, Any] = {MASK_RATIO: 0.0, KEEP_RATIO: (1.0,)}
"""Values with which nothing is left out: where a space has one, other settings are compared with it, seed by seed."""
SECONDS = "seconds"


def table(keys: Sequence[str], records: Mapping[str, Record]) -> pa.Table:
    """Return a row a trial: its setting and seed, a column for each swept key and each metric, and how it ended.

    Args:
        keys: the swept keys.
        records: of all trials, by their folders; those of a population have two columns more, the `epoch` after which
            they end, and the trial whose weights they `start` from.
    """
    rows = list(records.values())
    members = any(row.epoch for row in rows)
    columns: dict[str, pa.Array] = {
        "trial": pa.array([folder.rpartition("/")[2] for folder in records], pa.string()),
        "setting": pa.array([row.setting for row in rows], pa.string()),
        "seed": pa.array([row.seed for row in rows], pa.int64()),
    }
    columns |= {key: _typed([row.values[key] for row in rows]) for key in keys}
    for metric in sorted({name for row in rows for name in row.metrics}):
        columns[metric] = pa.array([row.metrics.get(metric) for row in rows], pa.float64())
    columns[SECONDS] = pa.array([row.seconds for row in rows], pa.float64())
    if members:
        columns["epoch"] = pa.array([row.epoch for row in rows], pa.int64())
        columns["start"] = pa.array([row.start.rpartition("/")[2] for row in rows], pa.string())
    for name in ("status", "failure"):
        columns[name] = pa.array([getattr(row, name) for row in rows], pa.string())
    # A swept setting may be called `checkpoint` too.
    columns["trained_checkpoint"] = pa.array([row.checkpoint for row in rows], pa.string())
    columns["run_id"] = pa.array([row.run_id for row in rows], pa.string())
    return pa.table(columns)


def _typed(values: Sequence[Any]) -> pa.Array:
    """Return a column of the values' own type, tuples as lists."""
    return pa.array([list(value) if isinstance(value, tuple) else value for value in values])


def settings_table(
    dimensions: Mapping[str, Dimension], records: Mapping[str, Record], objective: Objective
) -> list[dict[str, Any]]:
    """Return a row for each setting of which a trial finished, the best one first.

    Each has `setting`, `values`, `seeds`, means and 95 % intervals (Student's t over seeds; None for a single one) of
    the metric and the seconds, `difference` from the baseline where the space has one, paired by seed, and `unbeaten`:
    whether no other setting is as good in both metric and seconds, and better in one.
    """
    groups: dict[str, list[Record]] = {}
    for record in sorted(records.values(), key=lambda record: record.seed):
        if record.status == "finished":
            groups.setdefault(record.setting, []).append(record)
    names = (objective.metric, SECONDS)
    rows = [
        {"setting": setting, "values": group[0].values, "seeds": len(group)}
        | {name: _summary([_value(record, name) for record in group]) for name in names}
        | {"difference": _difference(dimensions, groups, group, names)}
        for setting, group in groups.items()
    ]
    sign = 1 if objective.mode == "min" else -1
    for row in rows:
        row["unbeaten"] = not any(_beats(other, row, names, sign) for other in rows)
    # One seed of three may have been lucky: settings with fewer seeds come behind.
    return sorted(rows, key=lambda row: (-row["seeds"], sign * row[objective.metric]["mean"]))


def best_trial(records: Mapping[str, Record], setting: str, objective: Objective) -> Record:
    """Return the trial of a setting whose seed reached most."""
    finished = [record for record in records.values() if record.status == "finished" and record.setting == setting]
    return (min if objective.mode == "min" else max)(finished, key=lambda record: record.metrics[objective.metric])


def _value(record: Record, name: str) -> float:
    return record.metrics[name] if name != SECONDS else record.seconds or 0.0


def _summary(values: Sequence[float]) -> dict[str, Any]:
    bounds = interval(values)
    return {"mean": fmean(values), "interval": list(bounds) if bounds else None}


def _beats(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str], sign: int) -> bool:
    a, b = ((sign * row[names[0]]["mean"], row[names[1]]["mean"]) for row in (one, other))
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _difference(
    dimensions: Mapping[str, Dimension],
    groups: Mapping[str, list[Record]],
    group: Sequence[Record],
    names: Sequence[str],
) -> dict[str, Any] | None:
    """Return how far a setting is from the one that leaves nothing out and is the same otherwise; in a space over
    another key alone, from its first value."""
    values = group[0].values
    for key, dimension in dimensions.items():
        baseline = BASELINES.get(key.removeprefix("pretrain.").removeprefix("finetune."))
        if baseline is None and len(dimensions) == 1 and isinstance(dimension, Choice):
            baseline = dimension.values[0]
        if baseline is None or not holds(dimension, baseline) or values[key] == baseline:
            continue
        other = {record.seed: record for record in groups.get(name_of(values | {key: baseline}), [])}
        pairs = [(record, other[record.seed]) for record in group if record.seed in other]
        if pairs:
            differences = {name: _summary([_value(a, name) - _value(b, name) for a, b in pairs]) for name in names}
            return {"from": pairs[0][1].setting, "seeds": len(pairs)} | differences
    return None


def schedule(line: Sequence[Record], objective: Objective) -> list[dict[str, Any]]:
    """Return the values of a member of a population in the course of its training, and what it reached with them.

    Args:
        line: the records of the parts that made its weights, the first one first.
        objective: what members are compared by.
    """
    starts = [0, *(record.epoch for record in line[:-1])]
    return [
        {"from_epoch": start, "to_epoch": record.epoch, "member": record.setting, "values": record.values}
        | {objective.metric: record.metrics[objective.metric]}
        for start, record in zip(starts, line, strict=True)
    ]


def in_words(row: Mapping[str, Any], metric: str) -> str:
    """Return a line of a setting's means and intervals."""
    text = f"{row['setting']}: {metric} {_number(row[metric], '.3f')}, {_number(row[SECONDS], '.1f')} s"
    text += f", {row['seeds']} seeds" if row["seeds"] > 1 else ""
    if difference := row["difference"]:
        metric_text, seconds_text = _number(difference[metric], "+.3f"), _number(difference[SECONDS], "+.1f")
        text += f"; from {difference['from']}, paired by seed: {metric_text}, {seconds_text} s"
    return text


def _number(summary: Mapping[str, Any], form: str) -> str:
    if summary["interval"] is None:
        return f"{summary['mean']:{form}}"
    low, high = summary["interval"]
    return f"{summary['mean']:{form}} ({low:{form}} to {high:{form}})"
