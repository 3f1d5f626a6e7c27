"""The last lines of a stage on the command line: what it wrote, and which command comes next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from itertools import chain, count
from typing import Any

from pipelines import storage
from pipelines.config import (
    FeaturesConfig,
    FinetuneConfig,
    IndexConfig,
    NarrateConfig,
    PretrainConfig,
    RunConfig,
    SampleConfig,
    StageConfig,
    TranscodeConfig,
    flatten,
)

TRACKING = "tracking.uri", "tracking.experiment"
"""Settings that say where all runs are logged."""
HARDWARE = "scale.gpus_per_worker", "scale.num_workers", "loop.precision"
"""Settings that say what a model runs on."""


def closing(config: StageConfig, result: dict[str, Any]) -> Iterator[str]:
    """Yield what a finished stage left in its --out, and the command that goes on from there, where there is one."""
    if not config.out:
        return
    names = [name for name in storage.entries(storage.absolute(config.out)) if not name.startswith(".")]
    yield f"{', '.join(names)} are in {config.out}"
    stage, changes = following(config, result)
    if stage:
        words = [word for key, value in changes.items() for word in _option(key, value)]
        yield f"next: python -m pipelines {shlex.join([stage, *words])}"


def following(config: StageConfig, result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the stage that comes next and its settings, as far as they are not the defaults; no stage where that is
    for the user to say."""
    stage, changes = _following(config, result)
    if not stage:
        return "", {}
    values, known = flatten(config), flatten(getattr(RunConfig(), stage))
    changes["out"] = _free(config.out, stage)
    shared = {key: values[key] for key in TRACKING}
    if isinstance(config, FeaturesConfig | PretrainConfig | FinetuneConfig):
        # What follows needs a device as much.
        shared |= {key: values[key] for key in HARDWARE if key in values}
        shared["scale.num_workers"] = min(shared["scale.num_workers"], known.get("loop.batch_size", sys.maxsize))
    if stage == "finetune":
        # A checkpoint is of the same model, and features are of the same backbone.
        shared |= {key: value for key, value in values.items() if key.startswith(("model.", "clips."))}
    changes |= {key: value for key, value in shared.items() if key in known and key not in changes}
    return stage, {key: value for key, value in changes.items() if value != known[key]}


def _free(out: str, stage: str) -> str:
    """Return a folder for a stage in which no run lies: beside `out`, where the database of runs lies too, but within
    a bucket, and within what lies at the root of a disk."""
    scheme, is_uri, path = out.rstrip("/").rpartition("://")
    parent, slash, _ = path.rpartition("/")
    at_root = not parent and (slash or is_uri)
    folder = f"{out.rstrip('/')}/{stage}" if at_root else f"{scheme}{is_uri}{parent}{slash}{stage}"
    names = chain([folder], (f"{folder}-{number}" for number in count(2)))
    return next(name for name in names if name != out.rstrip("/") and not storage.exists(storage.absolute(name)))


def _following(config: StageConfig, result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(config, SampleConfig):
        return "index", {"videos": config.out}
    if isinstance(config, IndexConfig | TranscodeConfig):
        return "pretrain", {"manifest": config.out}
    if isinstance(config, NarrateConfig):
        return "finetune", {"task": "distant", "manifest": config.out, "labels": config.out}
    if isinstance(config, FeaturesConfig) and not (config.import_ or config.segment_s):
        changes = {"manifest": config.manifest, "features": config.out, "checkpoint": config.checkpoint}
        return "finetune", changes | {"model.backbone.frozen": True}
    if isinstance(config, PretrainConfig):
        changes = {"manifest": config.manifest, "checkpoint": config.out, "features": config.features}
        return "finetune" if {"knn/top1", "linear/top1"} & result["metrics"].keys() else "evaluate", changes
    if isinstance(config, FinetuneConfig):
        return "evaluate", {"manifest": config.manifest, "checkpoint": config.out, "features": config.features}
    return "", {}


def _option(key: str, value: Any) -> list[str]:
    name = key.removesuffix("_").replace("_", "-")
    if isinstance(value, bool):
        head, _, leaf = name.rpartition(".")
        return [f"--{name}" if value else f"--{head}{'.' if head else ''}no-{leaf}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
