"""The stages on Ray, tracked in MLflow: `python -m pipelines STAGE`, or `run("pretrain", config)` from Python."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from s5 import __version__ as __version__

if TYPE_CHECKING:
    from pipelines.config import StageConfig


def run(stage: str, config: StageConfig) -> dict[str, Any]:
    """Run a stage and return its result, as `result.json` below its --out holds it.

    Args:
        stage: name of the stage, such as `pretrain`.
        config: its settings, such as `pipelines.config.PretrainConfig`; `pipelines.config.presets.preset(NAME)` has
            whole ones, and `pipelines.config.override` changes them by dotted keys.

    Raises:
        UserError: there is no such stage, the settings are of another one, or they do not fit its inputs.
        StageError: the stage could not be finished.
    """
    from pipelines.config import STAGES, RunConfig, unknown
    from pipelines.errors import UserError

    if stage not in STAGES:
        raise UserError(unknown("stage", stage, STAGES))
    wanted = type(getattr(RunConfig(), stage))
    if not isinstance(config, wanted):
        raise UserError(f"config is a {type(config).__name__}: stage {stage!r} takes a {wanted.__name__}")
    result: dict[str, Any] = importlib.import_module(f"pipelines.stages.{stage}").run(config)
    return result
