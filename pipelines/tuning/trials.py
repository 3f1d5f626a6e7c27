"""Trials of a sweep: their settings, and all that can be checked before one of them starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from pipelines import storage, tracking
from pipelines.config import DataConfig, FinetuneConfig, PretrainConfig, ScaleConfig, SweepConfig, override, unknown
from pipelines.errors import UserError
from pipelines.running.resources import check_cluster, runs_that_fit
from pipelines.running.run_folder import RESULT, TRIALS
from pipelines.tuning.search_space import Dimension, configured, name_of, stages, trials

# What the stages log and trials can be compared by.
PRETRAIN_METRICS = ("knn/top1", "train/top1", "train/loss", "train/embedding_spread")
FINETUNE_METRICS = {
    "class": ("val/accuracy", "val/loss", "train/accuracy", "train/loss"),
    "regression": ("val/mse", "val/loss", "train/loss"),
    "distant": ("val/loss", "val/accuracy", "train/accuracy", "train/loss"),
}
# Of these, what an evaluation gives: early stopping compares one after another.
EVALUATED = ("knn/", "val/")
ERRORS = ("mse", "mae", "loss")
OBJECTIVE = "objective."
"""What the parameters of a sweep's run begin with that hold its objective."""


@dataclass(frozen=True)
class Objective:
    """The metric that trials are compared by, and whether the best is its `min` or `max`."""

    metric: str
    mode: Literal["min", "max"]


@dataclass(frozen=True)
class TrialSettings:
    """A trial: its name, its folder, what varies, and the settings of its stages, with absolute paths only."""

    name: str
    out: str
    values: dict[str, Any]
    stages: dict[str, PretrainConfig | FinetuneConfig]

    @property
    def here(self) -> bool:
        """Whether all its stages train in the trial's own process."""
        return all(settings.scale.num_workers == 0 for settings in self.stages.values())

    @property
    def held(self) -> ScaleConfig:
        """What its process holds where all stages train in it: the most that any of them needs."""
        scales = [settings.scale for settings in self.stages.values()]
        return replace(
            scales[0],
            cpus_per_worker=max(scale.cpus_per_worker for scale in scales),
            gpus_per_worker=max(scale.gpus_per_worker for scale in scales),
        )

    @property
    def result(self) -> str:
        """The result.json of its last stage."""
        return storage.join(list(self.stages.values())[-1].out, RESULT)


def objective_of(config: SweepConfig) -> Objective:
    """Return the metric of a sweep: the setting, or else the usual one of its last stage.

    Raises:
        UserError: no stage of a trial logs the metric, or early stopping cannot follow it.
    """
    default = FINETUNE_METRICS[config.finetune.task][0]
    metric = config.metric or (default if "finetune" in stages(config) else "knn/top1")
    known = {"pretrain": PRETRAIN_METRICS, "finetune": FINETUNE_METRICS[config.finetune.task]}
    last = stages(config)[-1]
    names = tuple(dict.fromkeys(each for stage in stages(config) for each in known[stage]))
    if metric not in names:
        raise UserError(f"metric is {metric!r}: {unknown('metric', metric, names)}")
    followed = [each for each in known[last] if each.startswith(EVALUATED)]
    if config.early_stopping and metric not in followed:
        raise UserError(
            f"metric is {metric!r}: early_stopping compares evaluations of {last}; give {' or '.join(followed)}"
        )
    return Objective(metric, "min" if metric.rpartition("/")[2] in ERRORS else "max")


def trial_settings(config: SweepConfig, dimensions: Mapping[str, Dimension]) -> list[TrialSettings]:
    """Return all trials, each with the settings of its stages.

    Raises:
        UserError: a drawn value does not fit its setting.
    """
    out = storage.absolute(config.out)
    found = []
    for values in trials(config, dimensions):
        folder = storage.join(out, TRIALS, name_of(values))
        settings = {stage: stage_config(config, stage, values, folder) for stage in stages(config)}
        found.append(TrialSettings(name_of(values), folder, values, settings))
    return found


def stage_config(
    config: SweepConfig, stage: str, values: Mapping[str, Any], folder: str
) -> PretrainConfig | FinetuneConfig:
    """Return the settings of one stage of a trial; paths are absolute, since a trial has another working directory."""
    # A trial lies in another folder: left to itself it would take the database beside that.
    uri = tracking.resolve_uri(config.tracking, storage.absolute(config.out))
    changes = configured(config, stage, values)
    changes |= {"out": storage.join(folder, stage), "tracking.uri": uri, "tracking.run_name": stage}
    changes |= {"tracking.experiment": config.tracking.experiment}
    if stage == "finetune" and "pretrain" in stages(config):
        changes["checkpoint"] = storage.join(folder, "pretrain")
    settings = cast(PretrainConfig | FinetuneConfig, override(getattr(config, stage), changes))
    paths = {"manifest": storage.absolute(settings.manifest)}
    if (weights := settings.model.backbone.weights) not in ("", "timm"):
        paths["model.backbone.weights"] = storage.absolute(weights)
    for name in ("features", "checkpoint", "labels"):
        if value := getattr(settings, name, ""):
            paths[name] = storage.absolute(value)
    return override(settings, paths)


Settings = PretrainConfig | FinetuneConfig
Kind = tuple[ScaleConfig, DataConfig | None]
"""What decides how many trials fit: workers and decoding."""


def fit_cluster(config: SweepConfig, all_trials: list[TrialSettings]) -> tuple[list[TrialSettings], int]:
    """Return the trials with their share of the decoding worked out, and how many of them run at once.

    Tune does not know what decoding holds, nor the workers of a trial that Ray Train starts, so this has to. Trials of
    one worker run in Tune's own processes, which are used again with all that they have imported, unless fewer of them
    fit so: a tracking database in a file keeps these processes on this node.

    Raises:
        UserError: the largest trial does not fit the cluster.
    """
    stages = [settings for trial in all_trials for settings in trial.stages.values()]
    for scale, data in {_kind(settings) for settings in stages}:
        check_cluster(replace(scale, num_workers=scale.world_size), data)
    most = min(config.concurrent_trials or len(all_trials), len(all_trials))
    here, trials, fits = False, all_trials, _fits(all_trials, most, here=False)
    if all(settings.scale.world_size == 1 for settings in stages):
        inside = [replace(trial, stages=_in_own_process(trial)) for trial in all_trials]
        on_this_node = bool(tracking.database(stages[0].tracking.uri))
        found = _fits(inside, most, on_this_node)
        if min(found.values())[0] >= min(fits.values())[0]:
            here, trials, fits = on_this_node, inside, found
    if trials is all_trials and any(settings.scale.num_workers == 0 for settings in stages):
        raise UserError(
            "scale.num_workers is 0: a trial of this sweep has another stage with several workers, or does not fit the "
            "node of the sweep; give 1"
        )
    concurrent = min(fits.values())[0]
    tasks = {kind: fit for kind, (_, fit) in _fits(trials, concurrent, here).items()}
    return [replace(trial, stages=_with_decoding(trial, tasks)) for trial in trials], concurrent


def _kind(settings: Settings) -> Kind:
    return settings.scale, None if settings.features else settings.data


def _kinds(trial: TrialSettings) -> list[Kind]:
    """Return the kinds of a trial's stages; in its own process, each has what the process holds."""
    kinds = [_kind(settings) for settings in trial.stages.values()]
    return [(trial.held, data) for _, data in kinds] if trial.here else kinds


def _fits(trials: list[TrialSettings], most: int, here: bool) -> dict[Kind, tuple[int, int]]:
    """Return how many trials of each kind fit at once, and the decode tasks of each then; `here`: on this node."""
    return {kind: runs_that_fit(*kind, most, here) for kind in {kind for trial in trials for kind in _kinds(trial)}}


def _in_own_process(trial: TrialSettings) -> dict[str, Settings]:
    changes = {"scale.num_workers": 0, "scale.min_workers": 0}
    return {stage: override(settings, changes) for stage, settings in trial.stages.items()}


def _with_decoding(trial: TrialSettings, tasks: Mapping[Kind, int]) -> dict[str, Settings]:
    """Return the settings of a trial's stages with no more decode tasks than there is room for."""
    found = {}
    for (stage, settings), kind in zip(trial.stages.items(), _kinds(trial), strict=True):
        fit = min(tasks[kind], settings.data.decode_tasks or tasks[kind])
        found[stage] = settings if settings.features else override(settings, {"data.decode_tasks": fit})
    return found
