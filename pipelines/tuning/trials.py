"""Trials of a sweep: what they are compared by, and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipelines import storage, tracking
from pipelines.config import FinetuneConfig, PretrainConfig, ScaleConfig, SweepConfig, override, unknown
from pipelines.errors import UserError
from pipelines.running.run_folder import PRETRAINED, TRIALS
from pipelines.tuning.search_space import configured, name_of, stages

Settings = PretrainConfig | FinetuneConfig

# What the stages log and trials can be compared by.
COSTS = ("train/step_seconds", "train/memory_gib")
PRETRAIN_METRICS = ("knn/top1", "linear/top1", "train/top1", "train/loss", "train/embedding_spread", *COSTS)
FINETUNE_METRICS = {
    "class": ("val/accuracy", "val/loss", "train/accuracy", "train/loss", *COSTS),
    "regression": ("val/mse", "val/loss", "train/loss", *COSTS),
    "distant": ("val/loss", "val/accuracy", "train/accuracy", "train/loss", *COSTS),
}
# Of these, what an evaluation gives: early stopping compares one after another.
EVALUATED = ("knn/", "linear/", "val/")
LOWER_IS_BETTER = ("mse", "mae", "loss", "step_seconds", "memory_gib")
OBJECTIVE = "objective."
"""What the parameters of a sweep's run begin with that hold its objective."""


@dataclass(frozen=True)
class Objective:
    """The metric that trials are compared by, and whether the best is its `min` or `max`."""

    metric: str
    mode: Literal["min", "max"]


@dataclass(frozen=True)
class TrialSettings:
    """A trial: a setting and a seed, its folder, and the settings of its stages, with absolute paths only."""

    name: str
    """The setting's, with the seed where there are several."""
    setting: str
    """What it shares with the trials that differ from it in the seed alone."""
    out: str
    values: dict[str, Any]
    seed: int
    """`loop.seed` of its last stage."""
    stages: dict[str, Settings]
    epoch: int = 0
    """Of a member of a population: the epoch after which it ends."""
    start: str = ""
    """Of one that goes on: folder of the trial whose last checkpoint it begins from."""

    @property
    def length(self) -> str:
        """How long its stages train, such as 10epochs."""
        return "+".join(map(_length, self.stages.values()))

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
    def pretrained(self) -> str:
        """Folder of the pretraining that it shares with other trials; empty where it shares none."""
        return self.stages["pretrain"].out if len(self.stages) > 1 else ""


def objective_of(config: SweepConfig) -> Objective:
    """Return the metric of a sweep: the setting, or else the usual one of its last stage.

    Raises:
        UserError: no stage of a trial logs the metric, or early stopping cannot follow it.
    """
    probed = "linear/top1" if config.pretrain.probe == "linear" else "knn/top1"
    usual = FINETUNE_METRICS[config.finetune.task][0] if "finetune" in stages(config) else probed
    metric = config.metric or usual
    known = {"pretrain": PRETRAIN_METRICS, "finetune": FINETUNE_METRICS[config.finetune.task]}
    last = stages(config)[-1]
    names = tuple(dict.fromkeys(each for stage in stages(config) for each in known[stage]))
    if metric.startswith("test/"):
        raise UserError(f"metric is {metric!r}: what is chosen by the test split cannot be tested on it; give {usual}")
    if metric not in names:
        raise UserError(f"{unknown('metric', metric, names)} (of --stages {config.stages})")
    followed = [each for each in known[last] if each.startswith(EVALUATED)]
    rule = "early_stopping" if config.early_stopping else "search pbt" if config.search == "pbt" else ""
    if rule and metric not in followed:
        raise UserError(f"metric is {metric!r}: {rule} compares evaluations of {last}; give {' or '.join(followed)}")
    loop = getattr(config, last).loop
    if config.early_stopping and not loop.steps and not 0 < loop.evaluate_every < loop.epochs:
        raise UserError(
            f"{last}.loop.evaluate_every is {loop.evaluate_every} of {loop.epochs} epochs: early_stopping compares "
            "evaluations before the last; give a smaller one, of at least 1"
        )
    return Objective(metric, "min" if metric.rpartition("/")[2] in LOWER_IS_BETTER else "max")


def seeds_of(config: SweepConfig) -> range:
    """Return the seeds that each setting is trained with: `loop.seed` of the last stage, and those that follow."""
    first: int = getattr(config, stages(config)[-1]).loop.seed
    return range(first, first + config.seeds)


def trial_of(config: SweepConfig, values: Mapping[str, Any], seed: int) -> TrialSettings:
    """Return the trial of a setting and a seed.

    Raises:
        UserError: its values do not fit together.
    """
    setting = name_of(values)
    number = seed - seeds_of(config).start
    settings = {stage: stage_config(config, stage, values, number) for stage in stages(config)}
    # With more epochs a sweep is extended by other trials: the rate falls along the whole training.
    length = "+".join(_length(each) for each in settings.values())
    folder = storage.join(storage.absolute(config.out), TRIALS, f"{setting},seed={seed},{length}")
    outs = {stage: storage.join(folder, stage) for stage in settings}
    if len(settings) > 1:
        # What pretrains alike pretrains once.
        own = name_of({key: value for key, value in values.items() if configured(config, "pretrain", {key: value})})
        name = ",".join(filter(None, (own, f"seed={seed}", _length(settings["pretrain"]))))
        outs["pretrain"] = storage.join(storage.absolute(config.out), PRETRAINED, name)
        settings["finetune"] = override(settings["finetune"], {"checkpoint": outs["pretrain"]})
    name = f"{setting},seed={seed}" if config.seeds > 1 else setting
    placed = {stage: replace(each, out=outs[stage]) for stage, each in settings.items()}
    return TrialSettings(name, setting, folder, dict(values), seed, placed)


def _length(settings: Settings) -> str:
    loop = settings.loop
    part = f"{loop.stop_after_epoch}of" if loop.stop_after_epoch else ""
    return f"{part}{loop.steps}steps" if loop.steps else f"{part}{loop.epochs}epochs"


def stage_config(config: SweepConfig, stage: str, values: Mapping[str, Any], number: int = 0) -> Settings:
    """Return the settings of one stage of a trial; paths are absolute, since a trial has another working directory.

    Args:
        config: the sweep.
        stage: the stage.
        values: what varies.
        number: of the seed, from 0.
    """
    base: Settings = getattr(config, stage)
    # A trial lies in another folder: left to itself it would take the database beside that.
    uri = tracking.resolve_uri(config.tracking, storage.absolute(config.out))
    changes = configured(config, stage, values) | {"loop.seed": base.loop.seed + number}
    changes |= {"tracking.uri": uri, "tracking.run_name": stage}
    changes |= {f"tracking.{key}": getattr(config.tracking, key) for key in ("experiment", "system_s")}
    settings = override(base, changes)
    paths = {"manifest": storage.absolute(settings.manifest)}
    if (weights := settings.model.backbone.weights) not in ("", "timm"):
        paths["model.backbone.weights"] = storage.absolute(weights)
    for name in ("features", "checkpoint", "labels"):
        if value := getattr(settings, name, ""):
            paths[name] = storage.absolute(value)
    return override(settings, paths)


def best_settings(config: SweepConfig, values: Mapping[str, Any], pretrained: str) -> dict[str, Settings]:
    """Return the settings of each stage with a trial's values, and all else as the sweep was given it.

    Args:
        config: the sweep.
        values: the trial's.
        pretrained: checkpoint to fine-tune from, where the trial pretrained one.
    """
    found: dict[str, Settings] = {}
    for stage in stages(config):
        changes = configured(config, stage, values)
        if stage == "finetune" and pretrained:
            changes["checkpoint"] = pretrained
        found[stage] = override(getattr(config, stage), changes)
    return found
