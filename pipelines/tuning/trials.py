"""Trials of a sweep: their settings, and all that can be checked before one of them starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from pipelines import storage, tracking
from pipelines.config import FinetuneConfig, PretrainConfig, SweepConfig, override, unknown
from pipelines.errors import UserError
from pipelines.running.resources import resources
from pipelines.running.run_folder import TRIALS
from pipelines.tuning.search_space import Dimension, configured, name_of, stages, trials

# What the stages log and a trial can be judged by.
PRETRAIN_METRICS = ("knn/top1", "train/top1", "train/loss", "train/embedding_spread")
FINETUNE_METRICS = {
    "class": ("val/accuracy", "val/loss", "train/accuracy", "train/loss"),
    "regression": ("val/mse", "val/loss", "train/loss"),
}
# Of these, what an evaluation gives: early stopping compares one after another.
EVALUATED = ("knn/", "val/")
ERRORS = ("mse", "mae", "loss")


@dataclass(frozen=True)
class Plan:
    """A trial: its name, its folder, what varies, and the settings of its stages with nothing relative in them."""

    name: str
    out: str
    values: dict[str, Any]
    stages: dict[str, PretrainConfig | FinetuneConfig]


def metric(config: SweepConfig) -> str:
    """Return the name of the metric that trials are compared by."""
    if config.metric:
        return config.metric
    if "finetune" not in stages(config):
        return "knn/top1"
    return "val/accuracy" if config.finetune.task == "class" else "val/mse"


def order(config: SweepConfig) -> str:
    """Return `min` for errors and losses, else `max`."""
    return "min" if metric(config).rpartition("/")[2] in ERRORS else "max"


def check_metric(config: SweepConfig) -> None:
    """Raise `UserError` for a metric that no stage of a trial logs, or that early stopping cannot follow."""
    known = {"pretrain": PRETRAIN_METRICS, "finetune": FINETUNE_METRICS[config.finetune.task]}
    name, last = metric(config), stages(config)[-1]
    names = tuple(dict.fromkeys(each for stage in stages(config) for each in known[stage]))
    if name not in names:
        raise UserError(f"metric is {name!r}: {unknown('metric', name, names)}")
    followed = [each for each in known[last] if each.startswith(EVALUATED)]
    if config.early_stopping and name not in followed:
        raise UserError(
            f"metric is {name!r}: early_stopping compares evaluations of {last}; give {' or '.join(followed)}"
        )


def plan(config: SweepConfig, dimensions: Mapping[str, Dimension]) -> list[Plan]:
    """Return all trials, each with the settings of its stages.

    Raises:
        UserError: a drawn value does not fit its setting.
    """
    out = storage.absolute(config.out)
    plans = []
    for values in trials(config, dimensions):
        folder = storage.join(out, TRIALS, name_of(values))
        settings = {stage: stage_config(config, stage, values, folder) for stage in stages(config)}
        plans.append(Plan(name_of(values), folder, values, settings))
    return plans


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
    if isinstance(settings, FinetuneConfig) and settings.checkpoint:
        paths["checkpoint"] = storage.absolute(settings.checkpoint)
    return override(settings, paths)


def fit_cluster(config: SweepConfig, plans: list[Plan]) -> tuple[list[Plan], int]:
    """Return the trials with their share of the decoding worked out, and how many of them run at once.

    Tune does not know what the training workers of a trial hold, so this has to.

    Raises:
        UserError: the largest trial does not fit the cluster.
    """
    settings = [each for trial in plans for each in trial.stages.values()]
    need = max(s.scale.num_workers * (s.scale.cpus_per_worker + s.data.cpus_per_decode) for s in settings)
    gpus = max(s.scale.num_workers * s.scale.gpus_per_worker for s in settings)
    total, total_gpus = resources()["CPU"], resources().get("GPU", 0.0)
    fit = int((total + 1e-6) / need)
    if gpus:
        fit = min(fit, int((total_gpus + 1e-6) / gpus))
    if fit < 1:
        raise UserError(
            f"scale.num_workers is {max(s.scale.num_workers for s in settings)}: a trial needs {need:g} CPUs and "
            f"{gpus:g} GPUs with its decoding, and the cluster has {total:g} CPUs and {total_gpus:g} GPUs; lower it, "
            "cpus_per_worker or data.cpus_per_decode"
        )
    concurrent = min(config.concurrent_trials or fit, fit, len(plans))
    shared = [
        replace(each, stages={stage: _share(s, total / concurrent) for stage, s in each.stages.items()})
        for each in plans
    ]
    return shared, concurrent


def _share(settings: PretrainConfig | FinetuneConfig, cpus: float) -> PretrainConfig | FinetuneConfig:
    scale, data = settings.scale, settings.data
    free = cpus - scale.num_workers * scale.cpus_per_worker
    tasks = max(scale.num_workers, int((free + 1e-6) / data.cpus_per_decode))
    return override(settings, {"data.decode_tasks": min(tasks, data.decode_tasks or tasks)})
