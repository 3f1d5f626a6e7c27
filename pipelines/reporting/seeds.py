"""Which runs differ in nothing but their seed, and the mean and interval over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipelines import storage
from pipelines.running.intervals import interval
from pipelines.tracking.history import Run

SEED = "seed"
UNIMPORTANT = ("out", "tracking.")
"""Settings that change no result."""
Signature = tuple[tuple[str, "str | Signature"], ...]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    bounds: tuple[float, float] | None
    """The 95 % interval of the mean (Student's t); None for a single value."""
    seeds: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return (self.bounds[1] - self.bounds[0]) / 2 if self.bounds else None


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of results over seeds."""
    return Mean(fmean(values), interval(values), len(values))


def is_seed(key: str) -> bool:
    """Return whether a setting is a seed."""
    return key.rpartition(".")[2] == SEED


def groups(runs: Iterable[Run], all_runs: Sequence[Run]) -> list[list[Run]]:
    """Return runs that differ in nothing but their seed together; the latest run of each seed.

    Args:
        runs: those to group.
        all_runs: among them are those whose checkpoints they start from, which may differ in their seeds too.
    """
    by_id, by_out = {run.run_id: run for run in all_runs}, {run.out: run for run in all_runs}
    found: dict[Signature, dict[tuple[str, ...], Run]] = {}
    for run in runs:
        settings, seeds = _told_apart(run, by_id, by_out, frozenset())
        found.setdefault(settings, {})[seeds] = run
    return [list(group.values()) for group in found.values()]


def _told_apart(
    run: Run, by_id: Mapping[str, Run], by_out: Mapping[str, Run], above: frozenset[str]
) -> tuple[Signature, tuple[str, ...]]:
    """Return the settings of a run but for its seeds, and its seeds; those of the run that made its checkpoint too."""
    settings: list[tuple[str, str | Signature]] = [("stage", run.stage)]
    seeds: list[str] = []
    for key, value in sorted(run.params.items()):
        if key.startswith(UNIMPORTANT):
            continue
        if is_seed(key):
            seeds.append(value)
            continue
        made_by = (by_id.get(run.links.get(key, "")) or _by_path(by_out, value)) if key == "checkpoint" else None
        if made_by is None or made_by.run_id in above:
            settings.append((key, value))
            continue
        inner, inner_seeds = _told_apart(made_by, by_id, by_out, above | {run.run_id})
        settings.append((key, inner))
        seeds += inner_seeds
    return tuple(settings), tuple(seeds)


def _by_path(by_out: Mapping[str, Run], path: str) -> Run | None:
    return by_out.get(storage.absolute(path)) if path else None


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the values that are there and finite."""
    return [value for value in values if value is not None and math.isfinite(value)]
