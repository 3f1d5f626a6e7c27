"""How a sweep's trials share the cluster: how many run at once, where, and how many decode tasks each of them has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipelines import tracking
from pipelines.config import DataConfig, ScaleConfig, SweepConfig, override
from pipelines.errors import UserError
from pipelines.running.resources import check_cluster, runs_that_fit
from pipelines.tuning.trials import Settings, TrialSettings

Kind = tuple[ScaleConfig, DataConfig | None]
"""What decides how many trials fit: workers and decoding."""


@dataclass
class Placement:
    """How many trials run at once, and how each of them is fitted in."""

    concurrent: int
    """Trials at once."""
    inside: bool
    """Whether trials train in Tune's own processes."""
    here: bool
    """Whether these have to be on this node."""
    tasks: dict[Kind, int] = field(default_factory=dict)
    """Decode tasks of a trial, by what it needs."""

    def placed(self, trial: TrialSettings) -> TrialSettings:
        """Return a trial that trains where it is to, with its share of the decoding.

        Raises:
            UserError: it needs more than those that the sweep was fitted to.
        """
        if self.inside:
            trial = replace(trial, stages=_in_own_process(trial))
        found = {}
        for (stage, settings), kind in zip(trial.stages.items(), _kinds(trial), strict=True):
            if kind not in self.tasks:
                runs, self.tasks[kind] = runs_that_fit(*kind, self.concurrent, self.here)
                if runs < self.concurrent:
                    raise UserError(f"trial {trial.name}: {self.concurrent} like it do not fit the cluster at once")
            fit = min(self.tasks[kind], settings.data.decode_tasks or self.tasks[kind])
            found[stage] = settings if settings.features else override(settings, {"data.decode_tasks": fit})
        return replace(trial, stages=found)


def fit_cluster(config: SweepConfig, examples: Sequence[TrialSettings], most: int) -> Placement:
    """Return how trials are placed on the cluster.

    Tune does not know what decoding holds, nor the workers of a trial that Ray Train starts, so this has to. Trials of
    one worker run in Tune's own processes, which are used again with all that they have imported, unless fewer of them
    fit so: a tracking database in a file keeps these processes on this node.

    Args:
        config: the sweep.
        examples: trials that together have every value of the space.
        most: trials that there are.

    Raises:
        UserError: the largest trial does not fit the cluster.
    """
    stages = [settings for trial in examples for settings in trial.stages.values()]
    for scale, data in {_kind(settings) for settings in stages}:
        check_cluster(replace(scale, num_workers=scale.world_size), data)
    most = min(config.concurrent_trials or most, most)
    fits = _fits(examples, most, here=False)
    placement = Placement(min(fits.values()), inside=False, here=False)
    if all(settings.scale.world_size == 1 for settings in stages):
        inside = [replace(trial, stages=_in_own_process(trial)) for trial in examples]
        on_this_node = bool(tracking.database(stages[0].tracking.uri))
        found = min(_fits(inside, most, on_this_node).values())
        if found >= placement.concurrent:
            return Placement(found, inside=True, here=on_this_node)
    if any(settings.scale.num_workers == 0 for settings in stages):
        raise UserError(
            "scale.num_workers is 0: a trial of this sweep has another stage with several workers, or does not fit the "
            "node of the sweep; give 1"
        )
    return placement


def _kind(settings: Settings) -> Kind:
    return settings.scale, None if settings.features else settings.data


def _kinds(trial: TrialSettings) -> list[Kind]:
    """Return the kinds of a trial's stages; in its own process, each has what the process holds."""
    kinds = [_kind(settings) for settings in trial.stages.values()]
    return [(trial.held, data) for _, data in kinds] if trial.here else kinds


def _fits(trials: Sequence[TrialSettings], most: int, here: bool) -> Mapping[Kind, int]:
    """Return how many trials of each kind fit at once; `here`: on this node."""
    return {kind: runs_that_fit(*kind, most, here)[0] for kind in {kind for trial in trials for kind in _kinds(trial)}}


def _in_own_process(trial: TrialSettings) -> dict[str, Settings]:
    changes = {"scale.num_workers": 0, "scale.min_workers": 0}
    return {stage: override(settings, changes) for stage, settings in trial.stages.items()}
