"""The last lines of a stage on the command line: what it wrote, and which command comes next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
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
    defaults = getattr(RunConfig(), stage)
    if config.out != type(config)().out:
        # Beside this one: there the database of runs lies too.
        parent, slash, _ = config.out.rstrip("/").rpartition("/")
        changes["out"] = f"{parent}{slash}{stage}"
    shared = {key: value for key, value in flatten(config).items() if key.startswith("tracking.")}
    if stage == "finetune":
        # A checkpoint is of the same model, and features are of the same backbone.
        shared |= {key: value for key, value in flatten(config).items() if key.startswith(("model.", "clips."))}
    known = flatten(defaults)
    changes |= {key: value for key, value in shared.items() if key in known and key not in changes}
    return stage, {key: value for key, value in changes.items() if value != known[key]}


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
