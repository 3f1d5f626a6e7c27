"""Register the model that `evaluate` has tested in MLflow."""

from __future__ import annotations

from pathlib import Path

from pipelines.config import EvaluateConfig
from pipelines.errors import UserError
from pipelines.running.stage import Stage
from pipelines.tracking.uri import OFF, resolve_uri
from s5.checkpoints.checkpoint import Meta


def check(config: EvaluateConfig, meta: Meta) -> None:
    """Raise `UserError` where a model is to be registered and cannot be."""
    if config.register and meta.pretrained:
        raise UserError(f"register is {config.register!r}: a pretrained encoder predicts nothing; leave it out")
    if config.register and resolve_uri(config.tracking, config.out) == OFF:
        raise UserError(f"register is {config.register!r}: tracking.uri is 'off'; give that of an MLflow")


def register(stage: Stage, config: EvaluateConfig, folder: Path, manifest: str, meta: Meta) -> None:
    """Register the model of a checkpoint's folder with what it reached on the manifest of that digest."""
    # It imports MLflow, which takes seconds.
    from pipelines.tracking.registry import Evaluated
    from pipelines.tracking.registry import register as register_model

    metric = f"{config.split}/{'accuracy' if meta.kind == 'class' else 'mse'}"
    on = {"manifest": manifest, "protocol": str(stage.details["protocol"])}
    on |= {"split": config.split, "metric": metric, "videos": str(int(stage.metrics[f"{config.split}/videos"]))}
    on |= {"clips": str(int(stage.metrics[f"{config.split}/clips"]))}
    tested = Evaluated(on, stage.metrics[metric], larger_is_better=meta.kind == "class")
    stage.info(register_model(stage.tracker.uri, stage.tracker.run_id, config.register, folder, tested))
