"""What a sweep is to run: its trials without those that have ended, checked as far as that can be done before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pipelines.config import SweepConfig, flatten, leaves_of, override, to_json
from pipelines.errors import UserError
from pipelines.running.run_folder import EXTENDED, RunFolder
from pipelines.tuning import records
from pipelines.tuning.draws import as_setting, check_size, settings_of
from pipelines.tuning.population import Population
from pipelines.tuning.proposals import Proposals
from pipelines.tuning.search_space import Choice, Dimension, Range, holds, parse, stages, text_of
from pipelines.tuning.trial_queue import Plan
from pipelines.tuning.trials import Objective, Settings, TrialSettings, objective_of, seeds_of, trial_of

INPUTS = ("manifest", "features", "labels", "checkpoint")
"""Settings of what stages read."""
UNCHECKED = (
    *("out", "optim.", "tracking.", "views.", "data.", "loop."),
    *("lsmcl.mask_ratio", "lsmcl.temperature", "lsmcl.momentum", "lsmcl.collapse_spread"),
)
"""What a stage's own check of its inputs and its model does not depend on."""
Digests = dict[tuple[str, str], str]
"""Digests of inputs, by their names and paths."""
CheckStage = Callable[[Settings, str, bool], dict[str, str]]
"""Checks a stage's settings against its inputs and returns their digests, by name; its other arguments are the metric
and whether the trial makes the checkpoint itself."""


def finished(config: SweepConfig) -> dict[str, Any] | None:
    """Return the result of an earlier sweep in --out that this one does not extend, and in which no trial failed.

    Raises:
        UserError: --out holds something else, or a sweep of which this is no extension.
    """
    folder = RunFolder.of("sweep", config)
    result = folder.finished()
    if (before := folder.check_stage()) is not None:
        _check_extension(config, leaves_of(before))
    if result is None or result["counts"]["failed"]:
        return None
    leaves, now = leaves_of(result["config"]), leaves_of(to_json("sweep", config))
    return result if all(leaves.get(key, now[key]) == now[key] for key in EXTENDED["sweep"]) else None


def _check_extension(config: SweepConfig, before: Mapping[str, Any]) -> None:
    """Raise `UserError` unless this sweep has all trials that the one of earlier leaves has."""
    out = f"--out {config.out!r} holds a sweep"
    for name in ("seeds", "samples"):
        if (earlier := before.get(name, 1)) > getattr(config, name):
            raise UserError(f"{out} of {earlier} {name}, more than {getattr(config, name)}: give another --out")
    now, remedy = parse(config), "give another --out, or a space that has all that is there"
    was = parse(override(config, {"space": before["space"]}))
    if "pbt" in (config.search, before.get("search")):
        stage = stages(config)[-1]
        length, epochs = f"{stage}.loop.epochs", getattr(config, stage).loop.epochs
        for name, earlier, here in (
            ("search", before.get("search", "grid"), config.search),
            ("samples", before.get("samples", 1), config.samples),
            ("space", was, now),
            (length, before.get(length, epochs), epochs),
        ):
            if earlier != here:
                raise UserError(f"{out} with another {name}, and a population cannot be extended: give another --out")
    for key, old in was.items():
        if key not in now:
            raise UserError(f"{out} over {key}, which this space does not have: {remedy}")
        ends = old.values if isinstance(old, Choice) else (old.low, old.high)
        lost = [text_of(value) for value in ends if not holds(now[key], value)]
        if lost or (isinstance(now[key], Choice) and not isinstance(old, Choice)):
            raise UserError(f"{out} with {key} {', '.join(lost or map(str, ends))}, outside this space: {remedy}")
    if added := now.keys() - was.keys():
        raise UserError(f"{out} that does not vary {', '.join(sorted(added))}: {remedy}")
    draws = {key: each for key, each in was.items() if config.search != "grid" or isinstance(each, Range)}
    if any(now[key] != old for key, old in draws.items()) and config.samples == before.get("samples", 1):
        raise UserError(f"{out} that has drawn its {config.samples} samples: give more --samples for a larger space")


def plan_of(config: SweepConfig, check_stage: CheckStage) -> Plan:
    """Return the plan of a sweep; what can be checked is checked before anything is written.

    The settings of every trial are; their models and what they read by trials that together have every value.

    Raises:
        UserError: the space, the metric, the settings or what they read do not fit.
    """
    dimensions = parse(config)
    check_size(config, dimensions)
    objective = objective_of(config)
    if config.search == "pbt":
        return _plan_of_population(config, dimensions, objective, check_stage)
    proposals = Proposals(config, dimensions, objective) if config.search == "tpe" else None
    known = list(records.earlier(config, dimensions))
    begun = {trial.setting: trial.values for trial, _ in known}
    if proposals is None:
        settings = settings_of(config, dimensions, list(begun.values()))
    else:
        settings = list(begun.values())
        for values in settings:
            proposals.begun(values)
    trials = [trial_of(config, values, seed) for seed in seeds_of(config) for values in settings]
    inputs = _inputs_of(check_trials(examples(config, dimensions), objective, check_stage))
    found = {trial.out: record for trial, record in known if record.status in records.ENDED}
    waiting = [trial for trial in trials if trial.out not in found]
    for trial, record in known:
        records.check_inputs(config, record, inputs(trial))
    return Plan(config, objective, waiting, found, inputs, proposals)


def _plan_of_population(
    config: SweepConfig, dimensions: Mapping[str, Dimension], objective: Objective, check_stage: CheckStage
) -> Plan:
    population = Population(config, dimensions, objective)
    inputs = _inputs_of(check_trials(examples(config, dimensions), objective, check_stage))
    found = population.resume()
    here = inputs(population.trials[0])
    for record in found.values():
        records.check_inputs(config, record, here)
    ended = {out for out, record in found.items() if record.status in records.ENDED}
    waiting = [trial for trial in population.trials if trial.out not in ended]
    for trial in waiting:
        found.pop(trial.out, None)
    return Plan(config, objective, waiting, found, inputs, population=population)


def _inputs_of(digests: Digests) -> Callable[[TrialSettings], dict[str, str]]:
    """Return what gives the digests of what a trial reads."""
    return lambda trial: {name: digests[name, path] for name, path in _inputs(trial) if (name, path) in digests}


def examples(config: SweepConfig, dimensions: Mapping[str, Dimension]) -> list[TrialSettings]:
    """Return trials that together have every value of each choice and both ends of each range.

    Raises:
        UserError: values do not fit together; where they are proposed one after another, if none do.
    """
    ends = {
        key: d.values if isinstance(d, Choice) else [as_setting(config, key, d, end) for end in (d.low, d.high)]
        for key, d in dimensions.items()
    }
    count = max(len(values) for values in ends.values())
    points = [{key: values[min(i, len(values) - 1)] for key, values in ends.items()} for i in range(count)]
    found: list[TrialSettings] = []
    for values in points:
        try:
            found.append(trial_of(config, values, seeds_of(config).start))
        except UserError:
            if config.search != "tpe" or (values is points[-1] and not found):
                raise
    return found


def check_trials(trials: Iterable[TrialSettings], objective: Objective, check_stage: CheckStage) -> Digests:
    """Check what trials read and their models, those that are alike once; return the digests of what is read.

    Raises:
        UserError: names the trial, and what its stage would say.
    """
    checked: set[tuple[Any, ...]] = set()
    digests: Digests = {}
    for trial in trials:
        for stage, settings in trial.stages.items():
            makes_checkpoint = stage == "finetune" and bool(trial.pretrained)
            leaves = flatten(settings) | ({"checkpoint": ""} if makes_checkpoint else {})
            matters = ((k, v) for k, v in leaves.items() if k == "loop.batch_size" or not k.startswith(UNCHECKED))
            if (key := (stage, *matters)) in checked:
                continue
            checked.add(key)
            try:
                found = check_stage(settings, objective.metric, makes_checkpoint)
            except UserError as error:
                raise UserError(f"trial {trial.setting}: {error}") from None
            digests |= {(name, leaves[name]): digest for name, digest in found.items()}
    return digests


def _inputs(trial: TrialSettings) -> Iterator[tuple[str, str]]:
    """Yield the names and paths of what a trial reads and does not make itself."""
    for settings in trial.stages.values():
        for name in INPUTS:
            if (path := getattr(settings, name, "")) and not (name == "checkpoint" and trial.pretrained):
                yield name, path
