"""Fine-tuned models in MLflow's registry: registered with what they reached, the best one as `champion`, and read back.

A registered model is a pyfunc of a checkpoint, the package `s5` and `served_model`, so that MLflow runs it without this
repository. Two models are compared where they were tested on the same videos in the same way.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import s5
from pipelines.config import TrackingConfig
from pipelines.errors import StageError, UserError
from pipelines.tracking.client import reading, set_environment, short_reason
from pipelines.tracking.uri import VARIABLE, resolve_uri

CHAMPION = "champion"
CHECKPOINT = "checkpoint"
"""Name of the model's artifact that is the checkpoint."""
PACKAGES = ("torch", "torchvision", "timm", "einops", "numpy", "safetensors", "av", "decord")
QUIET = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
"""Settings of MLflow without which it draws bars and prints addresses."""
PREFIX = "s5."
"""Of the tags of a version that say what it was tested on."""


@dataclass(frozen=True)
class Evaluated:
    """What a model was tested on, and what it reached."""

    on: dict[str, str]
    """Digest of the manifest, split, protocol, number of clips and of videos, name of the metric."""
    value: float
    larger_is_better: bool


def register(uri: str, run_id: str | None, name: str, checkpoint: Path, tested: Evaluated) -> str:
    """Register a fine-tuned checkpoint, as champion if it beats the present one, and say so in a sentence.

    Args:
        uri: tracking URI.
        run_id: the run of its evaluation.
        name: of the registered model.
        checkpoint: its folder.
        tested: what it was tested on.

    Raises:
        StageError: MLflow does not take it.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    if not math.isfinite(tested.value):
        raise StageError(f"the model is not registered: its {tested.on['metric']} is {tested.value}")
    if run_id is None:
        raise StageError(f"MLflow at {uri} does not answer, so the model is not registered: run the same command again")
    set_environment(uri)
    for logger in ("mlflow", "mlflow.models", "mlflow.pyfunc", "mlflow.tracking", "mlflow.store"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*An input example was not provided")
    tags = {f"{PREFIX}{key}": value for key, value in tested.on.items()} | {f"{PREFIX}value": repr(tested.value)}
    try:
        with _logging_to(uri), tempfile.TemporaryDirectory(prefix="model_") as scratch, mlflow.start_run(run_id=run_id):
            folder = Path(scratch) / CHECKPOINT
            shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("optimizer.safetensors"))
            made = mlflow.pyfunc.log_model(name="model", **_pyfunc(folder))
            version = mlflow.register_model(made.model_uri, name, tags=tags).version
        return _crown(mlflow.MlflowClient(uri), name, str(version), tested)
    except (MlflowException, OSError) as error:
        raise StageError(f"MLflow at {uri} does not take the model {name!r} ({short_reason(error)})") from error


@contextmanager
def _logging_to(uri: str) -> Iterator[None]:
    """Have MLflow's functions log to a URI, which they write to the environment, and leave that as it was."""
    import mlflow

    before = os.environ.get(VARIABLE)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri("")
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def _pyfunc(checkpoint: Path) -> dict[str, Any]:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    names = ("label", "reason", "over_time")
    optional = [ColSpec("string", name, required=False) for name in names]
    numbers = [ColSpec("double", name, required=False) for name in ("probability", "value", "seconds")]
    return {
        "python_model": str(Path(__file__).with_name("served_model.py")),
        "artifacts": {CHECKPOINT: str(checkpoint)},
        "code_paths": [str(Path(s5.__file__).parent)],
        "signature": ModelSignature(
            Schema([ColSpec("string", "video")]), Schema([ColSpec("string", "video"), *optional, *numbers])
        ),
        "pip_requirements": [f"{name}=={version}" for name, version in _versions().items()],
    }


def _versions() -> dict[str, str]:
    """Return the versions of the packages that a model needs; decord is not everywhere."""
    found = {}
    for name in (*PACKAGES, "mlflow", "pandas"):
        try:
            # A local version, such as +cpu, is on no index.
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def _crown(client: Any, name: str, version: str, tested: Evaluated) -> str:
    """Give a version the alias `champion` where it is due, and say why it is or is not."""
    this = f"model {name!r} version {version} is registered"
    aliases = client.get_registered_model(name).aliases
    metric = tested.on["metric"]
    if CHAMPION not in aliases:
        client.set_registered_model_alias(name, CHAMPION, version)
        return f"{this} and is the first {CHAMPION}: {metric} {tested.value:.4g}"
    champion = client.get_model_version_by_alias(name, CHAMPION)
    before = f"version {champion.version}, the {CHAMPION}"
    for key, value in tested.on.items():
        there = champion.tags.get(f"{PREFIX}{key}")
        if there != value:
            return f"{this}, and not compared with {before}: its {key} is {there!r}, not {value!r}"
    reached = float(champion.tags[f"{PREFIX}value"])
    better = tested.value > reached if tested.larger_is_better else tested.value < reached
    compared = f"{metric} {tested.value:.4g} against {reached:.4g} of {before}"
    if not better:
        return f"{this}; {compared}, which stays"
    client.set_registered_model_alias(name, CHAMPION, version)
    return f"{this} and is {CHAMPION} now: {compared} until now"


@contextmanager
def registered_checkpoint(uri: str, tracking: TrackingConfig, out: str) -> Iterator[Path]:
    """Yield the checkpoint of a registered model, `models:/NAME@ALIAS` or `models:/NAME/VERSION`, as a folder.

    Raises:
        UserError: there is no such model, MLflow cannot be reached, or it is none that `evaluate --register` made.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    store = resolve_uri(tracking, out)
    with tempfile.TemporaryDirectory(prefix="model_") as scratch:
        with reading(store):
            pass
        try:
            # Its own arguments for the URIs do not hold for registered models.
            with _logging_to(store):
                folder = Path(download_artifacts(uri, dst_path=scratch))
        except (MlflowException, OSError) as error:
            reason = short_reason(error)
            raise UserError(f"checkpoint is {uri!r}: MLflow at {store} has no such model ({reason})") from None
        checkpoint = folder / "artifacts" / CHECKPOINT
        if not (checkpoint / "meta.json").exists():
            raise UserError(
                f"checkpoint is {uri!r}: that model is of another architecture, it holds no checkpoint of s5; give one "
                "that `evaluate --register` made"
            )
        yield checkpoint
