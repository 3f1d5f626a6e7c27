"""Tables of sweeps: the trials, means over seeds, and what masking gains or loses against none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.plots import sweeps
from pipelines.plots.drawing import NAMES, ordered, size_order
from pipelines.reporting.by_population import schedule_table
from pipelines.reporting.seeds import SEED, Mean, is_seed, mean_of
from pipelines.reporting.table import NONE, Figure, Table, file_name, interval_text, labels, time_text, value_text
from pipelines.tracking.history import Run
from pipelines.tuning.trials import OBJECTIVE, Objective

SWEEP_METRICS = ("val/accuracy", "val/mse", "knn/top1", "linear/top1")
"""What a sweep was compared by that did not log its objective: the first that its trials have."""
ERRORS = ("mse", "mae", "loss")
TRIAL = "trial."
"""What the parameters of a trial's run begin with that hold its values."""
LENGTH = "length"
"""The parameter with the epochs or steps of a trial."""
Cell = tuple[str, ...]
"""Values of a trial but for its seeds."""


@dataclass(frozen=True)
class Sweep:
    """A sweep and its trials, the latest of each --out."""

    title: str
    keys: tuple[str, ...]
    """The settings that vary, seeds too."""
    objective: Objective
    trials: tuple[Run, ...]
    parts: tuple[Run, ...] = ()
    """Of a population: the parts of all members; those that ended last are its trials."""

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that vary, but for seeds."""
        return tuple(key for key in self.keys if not is_seed(key))

    @property
    def sign(self) -> int:
        """1 where the highest result is the best, else -1."""
        return 1 if self.objective.mode == "max" else -1

    def result(self, trial: Run) -> float | None:
        """Return what a trial is compared by."""
        return trial.metrics.get(self.objective.metric)

    def cells(self) -> dict[Cell, dict[Cell, float]]:
        """Return the finite results of trials by their values, and for equal ones by their seeds."""
        found: dict[Cell, dict[Cell, float]] = {}
        for trial in self.trials:
            result = self.result(trial)
            if result is not None and math.isfinite(result):
                seeds = tuple(_value(trial, key) for key in self.keys if is_seed(key))
                found.setdefault(tuple(_value(trial, key) for key in self.settings), {})[seeds] = result
        return found


def _value(trial: Run, key: str) -> str:
    return trial.params.get(f"{TRIAL}{key}", trial.params.get(key, NONE))


def sweep_tables(runs: Sequence[Run]) -> list[Table]:
    """Return the tables of each sweep, the latest of each --out, with figures over one or two keys."""
    tables = []
    for sweep in sweeps_of(runs):
        if sweep.parts:
            keys = sweep.settings
            values = {part.run_id: {key: _value(part, key) for key in keys} for part in sweep.parts}
            tables += [_trials(sweep), *schedule_table(sweep.title, keys, sweep.objective, sweep.parts, values)]
            continue
        tables += [_trials(sweep), *_over_seeds(sweep), *_gains(sweep)]
    return tables


def sweeps_of(runs: Sequence[Run]) -> list[Sweep]:
    """Return the sweeps among runs."""
    latest = list({run.out: run for run in runs if run.stage == "sweep" and not run.parent_run}.values())
    found = []
    for run, label in zip(latest, labels(latest), strict=True):
        children = {child.out or child.run_id: child for child in runs if child.parent_run == run.run_id}
        ours = [child for child in children.values() if any(key.startswith(TRIAL) for key in child.params)]
        # Trials from before a sweep was extended by epochs cannot be compared with later ones.
        trials = tuple(trial for trial in ours if trial.params.get(LENGTH) == ours[-1].params.get(LENGTH))
        keys = swept_keys(trials, run.params.get("space", ""))
        title = label if label.startswith("sweep") else f"sweep {label}"
        whole = run.params.get("search") == "pbt"
        found.append(Sweep(title, keys, objective(run, trials), trials, tuple(ours) if whole else ()))
    return found


def objective(sweep: Run, trials: Sequence[Run]) -> Objective:
    """Return what a sweep compared its trials by, as it logged it."""
    metric = (
        sweep.params.get(f"{OBJECTIVE}metric")
        or sweep.params.get("metric")
        or next((known for known in SWEEP_METRICS if any(known in trial.metrics for trial in trials)), SWEEP_METRICS[0])
    )
    logged = sweep.params.get(f"{OBJECTIVE}mode")
    return Objective(metric, "min" if logged == "min" or (not logged and is_error(metric)) else "max")


def is_error(metric: str) -> bool:
    """Return whether lower values of a metric are better."""
    return metric.rpartition("/")[2] in ERRORS


def swept_keys(trials: Sequence[Run], space: str) -> tuple[str, ...]:
    """Return the settings that vary between trials, in the order of the sweep's space."""
    found = {key.removeprefix(TRIAL) for trial in trials for key in trial.params if key.startswith((TRIAL, SEED))}
    entries = space.replace("-", "_")
    places = {key: entries.find(f'"{key}=') for key in found}
    return tuple(sorted(found, key=lambda key: (places[key] < 0, places[key], key)))


def _trials(sweep: Sweep) -> Table:
    metric = sweep.objective.metric

    def rank(trial: Run) -> tuple[bool, float]:
        result = sweep.result(trial)
        return (result is None or math.isnan(result), -sweep.sign * (result or 0.0))

    rows = tuple(
        (
            *(_value(trial, key) for key in sweep.keys),
            value_text(metric, sweep.result(trial)),
            time_text(trial.seconds),
            trial.status.lower(),
        )
        for trial in sorted(sweep.trials, key=rank)
    )
    points = [
        sweeps.Trial(tuple(_value(trial, key) for key in sweep.settings), sweep.result(trial)) for trial in sweep.trials
    ]
    # What a member of a population reached is not of its last values alone.
    drawing = None if sweep.parts else sweeps.sweep_map(sweep.settings, points, metric, sweep.sign < 0)
    figures = (Figure(file_name(sweep.title), sweep.title, drawing),) if drawing else ()
    return Table(sweep.title, (*sweep.keys, metric, "time", "status"), rows, figures)


def _over_seeds(sweep: Sweep) -> list[Table]:
    cells = sweep.cells()
    if sweep.settings == sweep.keys or all(len(results) < 2 for results in cells.values()):
        return []
    metric = sweep.objective.metric
    means = {values: mean_of(list(results.values())) for values, results in cells.items()}
    rows = tuple(
        (*values, value_text(metric, mean.value), interval_text(metric, mean.bounds), str(mean.seeds))
        for values, mean in sorted(means.items(), key=lambda item: -sweep.sign * item[1].value)
    )
    note = "The mean over seeds, the best first, and its 95 % interval by Student's t."
    return [Table(f"{sweep.title}: over seeds", (*sweep.settings, metric, "95 % interval", "seeds"), rows, (), note)]


# --- masking --------------------------------------------------------------------------------------------------------


def masked_share(key: str, text: str) -> float | None:
    """Return the share of tokens that a value masks or drops; None where the setting has nothing to do with that."""
    name = key.rpartition(".")[2]
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return {"mask_ratio": float(value), "keep_ratio": 1 - float(value)}.get(name)


def _gains(sweep: Sweep) -> list[Table]:
    """Return a table of gains over trials that mask nothing, paired with those of the same other values and seeds."""
    cells = sweep.cells()
    columns = [i for i, key in enumerate(sweep.settings) if key.endswith(("mask_ratio", "keep_ratio"))]
    if len(columns) != 1:
        return []
    (column,) = columns
    shares = {values: masked_share(sweep.settings[column], values[column]) for values in cells}
    unmasked = {_without(values, column): cells[values] for values, share in shares.items() if share == 0}
    gains: dict[Cell, Mean] = {}
    for values, results in cells.items():
        base = unmasked.get(_without(values, column), {})
        if shares[values]:
            differences = [sweep.sign * (results[seeds] - base[seeds]) for seeds in results if seeds in base]
            gains |= {values: mean_of(differences)} if differences else {}
    if not gains:
        return []
    metric = sweep.objective.metric
    rows = tuple(
        (*values, f"{gains[values].value:+.3f}", _gain_interval(gains[values]), str(gains[values].seeds))
        for values in sorted(gains, key=lambda values: [size_order(value) for value in values])
    )
    note = (
        f"How much better {metric} is than without masking, of pairs with the same other values and seeds; positive is "
        "a gain. The interval is of 95 %, by Student's t: it takes two seeds."
    )
    title = f"{sweep.title}: gain or loss of masking"
    header = (*sweep.settings, f"gain in {metric}", "95 % interval", "pairs")
    return [Table(title, header, rows, _gain_figures(sweep, column, gains, title), note)]


def _without(values: Cell, column: int) -> Cell:
    return (*values[:column], *values[column + 1 :])


def _gain_interval(gain: Mean) -> str:
    return f"{gain.bounds[0]:+.3f} to {gain.bounds[1]:+.3f}" if gain.bounds else NONE


def _gain_figures(sweep: Sweep, column: int, gains: Mapping[Cell, Mean], title: str) -> tuple[Figure, ...]:
    """Draw the gains over masking and one other setting, such as frames."""
    if len(sweep.settings) > 2:
        return ()
    other = sweep.settings[1 - column] if len(sweep.settings) == 2 else ""
    places = {values: ((values[1 - column] if other else ""), values[column]) for values in gains}
    drawing = sweeps.gain_map(
        (other, sweep.settings[column]),
        {places[values]: sweeps.Gain(gain.value, gain.half) for values, gain in gains.items()},
        ordered({place[0] for place in places.values()}),
        ordered({place[1] for place in places.values()}),
        f"Gain in {NAMES.get(sweep.objective.metric, sweep.objective.metric)}",
    )
    return (Figure(file_name(title), title, drawing),)
