"""Trials of a sweep: their settings, and all that can be checked before one of them starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from pipelines import storage, tracking
from pipelines.config import FinetuneConfig, PretrainConfig, SweepConfig, override, unknown
from pipelines.errors import UserError
from pipelines.running.resources import runs_that_fit
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
    paths: dict[str, Any] = {"manifest": storage.absolute(settings.manifest)}
    if settings.scale.num_workers == 1:
        # The process of a trial is used again, with all that it has imported; another one need not be started.
        paths["scale.num_workers"] = 0
    if (weights := settings.model.backbone.weights) not in ("", "timm"):
        paths["model.backbone.weights"] = storage.absolute(weights)
    for name in ("features", "checkpoint", "labels"):
        if value := getattr(settings, name, ""):
            paths[name] = storage.absolute(value)
    return override(settings, paths)


def fit_cluster(config: SweepConfig, all_trials: list[TrialSettings]) -> tuple[list[TrialSettings], int]:
    """Return the trials with their share of the decoding worked out, and how many of them run at once.

    Tune does not know what decoding holds, nor the workers of a trial with several, so this has to.

    Raises:
        UserError: the largest trial does not fit the cluster.
    """
    settings = [each for trial in all_trials for each in trial.stages.values()]
    most = min(config.concurrent_trials or len(all_trials), len(all_trials))
    kinds = {(s.scale, None if s.features else s.data) for s in settings}
    concurrent = min(runs_that_fit(scale, data, most)[0] for scale, data in kinds)
    tasks = {(scale, data): runs_that_fit(scale, data, concurrent)[1] for scale, data in kinds if data is not None}

    def shared(settings: PretrainConfig | FinetuneConfig) -> PretrainConfig | FinetuneConfig:
        fit = tasks.get((settings.scale, settings.data), 1)
        return override(settings, {"data.decode_tasks": min(fit, settings.data.decode_tasks or fit)})

    return [
        replace(each, stages={stage: shared(s) for stage, s in each.stages.items()}) for each in all_trials
    ], concurrent
