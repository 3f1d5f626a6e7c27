"""The format of a checkpoint: a folder of safetensors and JSON alone, from which its model can be rebuilt.

model.safetensors      weights and buffers of the task that was trained
optimizer.safetensors  moments and step counts of the optimiser
meta.json              kind, step, model settings, classes, all settings of the run, and digests of the other files

meta.json is written last: a folder without it is an interrupted save. Its own digest is its last key.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from s5.config import EvaluationProtocol, ModelConfig, from_json
from s5.errors import CheckpointError, DamagedError
from s5.models.video_model import VideoModel

FORMAT = 2
MODEL, OPTIMIZER, META = "model.safetensors", "optimizer.safetensors", "meta.json"
# Settings of the model that do not change the encoder's weights or what they compute.
NOT_COMPARED = (
    "decoder.selection.",
    "decoder.dropout",
    "decoder.ssm.lr",
    "decoder.attention.implementation",
    "backbone.weights",
    "backbone.frozen",
)

# Decoders with the same weights: they differ only in the selection, which pretraining leaves out.
INTERCHANGEABLE = {"s5", "vis4mer", "vtm"}

Kind = Literal["lsmcl", "distant", "class", "regression"]


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The meta data of a checkpoint."""

    kind: Kind
    """The task: `lsmcl` or `distant` (a pretrained encoder), or `class` or `regression` (a fine-tuned model)."""
    step: int
    """Optimiser steps taken: also the position in the clip order."""
    model: dict[str, Any]
    """Settings of the model (ModelConfig)."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes, or of the written steps, in the order of the head's outputs."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All settings of the run."""
    protocol: EvaluationProtocol | Literal[""] = ""
    """Which clips a fine-tuned model was trained and validated on; empty where the settings alone say it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Last value of every metric at that step."""
    evaluated: dict[str, float] = field(default_factory=dict)
    """Metrics of the evaluation of these weights; empty where there was none at that step."""
    extra: dict[str, float] = field(default_factory=dict)
    """State of training besides weights and moments, such as the scale of an fp16 loss."""
    commit: str = "unknown"
    """Commit of the code."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each other file; filled in when they are written."""
    format: int = FORMAT
    """Version of this format."""

    @property
    def pretrained(self) -> bool:
        """Whether it is an encoder that later training starts from, rather than a model for a labelled task."""
        return self.kind in ("lsmcl", "distant")


def contents(task: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the tensors that each file of a checkpoint holds, as they are: on their device, not copied."""
    # By name: the optimiser's own numbers depend on its groups, and so on the settings.
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in task.named_parameters()}
    moments = {f"{name}.{key}": value.detach() for name, state in states.items() for key, value in state.items()}
    return {MODEL: {name: value.detach() for name, value in task.state_dict().items()}, OPTIMIZER: moments}


def meta_bytes(meta: Meta) -> bytes:
    """Return the content of meta.json."""
    values = asdict(meta)
    return json.dumps(values | {"digest": _digest(values)}, indent=2).encode()


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def parse_meta(content: bytes, where: str) -> Meta:
    """Return the content of a meta.json.

    Args:
        content: of the file.
        where: the checkpoint's path or URI, for messages.

    Raises:
        DamagedError: it is not what was written.
        CheckpointError: its format is of another version.
    """
    try:
        values = dict(json.loads(content))
        digest = values.pop("digest", None)
        if digest is not None and digest != _digest(values):
            raise DamagedError(where, f"{META} is not what was saved (digests differ)")
        if (version := values.get("format")) != FORMAT:
            raise CheckpointError(
                f"checkpoint {where!r} has format {version!r}, and this version reads {FORMAT}: use the version that "
                f"wrote it (commit {values.get('commit', 'unknown')}), or train again with another --out"
            )
        if digest is None:
            raise DamagedError(where, f"{META} has no digest")
        return Meta(**values)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise DamagedError(where, f"{META}: {error}") from None


def read_meta(folder: Path) -> Meta:
    """Return the meta data of a checkpoint.

    Raises:
        CheckpointError: the folder is no checkpoint, is damaged, or has a format of another version.
    """
    try:
        return parse_meta((folder / META).read_bytes(), str(folder))
    except FileNotFoundError:
        raise DamagedError(str(folder), f"it has no {META}: no checkpoint, or an interrupted save") from None
    except OSError as error:
        raise _unreadable(folder, META, error) from None


def verify(folder: Path, names: tuple[str, ...] = (MODEL, OPTIMIZER)) -> Meta:
    """Compare a checkpoint's files with the digests taken when they were saved, and return its meta data.

    Raises:
        DamagedError: a file is missing, or not what was saved; says which.
        CheckpointError: it has a format of another version.
    """
    meta = read_meta(folder)
    for name in names:
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise DamagedError(str(folder), f"{name} is missing") from None
        except OSError as error:
            raise _unreadable(folder, name, error) from None
        if found != meta.files.get(name):
            raise DamagedError(str(folder), f"{name} is not what was saved (digests differ)")
    return meta


def _unreadable(folder: Path, name: str, error: OSError) -> Exception:
    """Return what to raise: a bad sector is damage; any other cause may be temporary."""
    return DamagedError(str(folder), f"{name}: {error.strerror}") if error.errno == errno.EIO else error


def digest(folder: Path) -> str:
    """Return what identifies a checkpoint: the digest of its weights.

    Raises:
        CheckpointError: the folder is no checkpoint, or is damaged.
    """
    return read_meta(folder).files[MODEL]


def restore(folder: Path, task: nn.Module, optimizer: torch.optim.Optimizer) -> Meta:
    """Load a checkpoint into a task and optimiser like those that it was saved from, and return its meta data.

    Digests are not compared: see `verify`.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model.
    """
    meta = read_meta(folder)
    _load(task, read_weights(folder, MODEL), folder)
    names = {parameter: name for name, parameter in task.named_parameters()}
    trained = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}  # an earlier version saved its keys, in place of names
    for key, value in read_weights(folder, OPTIMIZER).items():
        name, _, moment = key.rpartition(".")
        state.setdefault(int(name) if name.isdecimal() else trained.index(name), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta


def read_weights(folder: Path, name: str = MODEL) -> dict[str, Tensor]:
    """Return the tensors of one of a checkpoint's files, on the CPU; digests are not compared.

    Raises:
        DamagedError: the file is missing, or is no safetensors file.
    """
    try:
        return load_file(folder / name)
    except (SafetensorError, OSError) as error:
        raise DamagedError(str(folder), f"{name}: {error}") from None


def encoder_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint's video model: the online encoder of LSMCL, or the fine-tuned model.

    Raises:
        CheckpointError: the folder is no checkpoint, or its weights are damaged.
    """
    prefix = "encoder." if verify(folder, (MODEL,)).kind == "lsmcl" else "model."
    return {k.removeprefix(prefix): v for k, v in read_weights(folder, MODEL).items() if k.startswith(prefix)}


def read_model(folder: Path) -> tuple[VideoModel, Meta]:
    """Build a checkpoint's video model from its own settings and weights, in evaluation mode.

    Raises:
        CheckpointError: the folder is no checkpoint, is damaged, or its weights are of another architecture.
    """
    meta = read_meta(folder)
    weights = encoder_weights(folder)
    outputs = {"class": len(meta.classes), "distant": len(meta.classes), "regression": 1}.get(meta.kind)
    # The checkpoint holds all weights: the file that the backbone started from may be gone.
    decoder = meta.model["decoder"]
    # Before it was a setting, evaluation drew no noise.
    decoder = decoder | {"selection": {"noise": "training"} | decoder["selection"]}
    config = from_json(
        ModelConfig, meta.model | {"backbone": meta.model["backbone"] | {"weights": ""}, "decoder": decoder}
    )
    model = VideoModel(config, outputs)
    if meta.kind == "lsmcl":
        model.load_pretrained(weights)
    else:
        _load(model, weights, folder)
    return model.eval(), meta


def _load(module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        # The first line names the class alone.
        reason = " ".join(str(error).splitlines()[1].split())
        raise CheckpointError(f"checkpoint {str(folder)!r} is of another architecture: {reason}") from None


def _check_frame_encoder(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `CheckpointError` where imported features stand in for the frame encoder there alone, or here alone."""
    here = wanted.get("backbone.tokens", there["tokens"])
    if there["tokens"] and not here:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} has no frame encoder, it was trained on imported features of "
            f"{there['name']!r}; give --features with those, or another checkpoint"
        )
    if here and not there["tokens"]:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} has a frame encoder of its own, {there['name']!r}, and the features are "
            "imported ones; give features that it computed, or a checkpoint trained on these"
        )


def check_architecture(folder: Path, wanted: dict[str, Any]) -> None:
    """Compare a checkpoint's architecture with the one that is to be trained, without reading its weights.

    Args:
        folder: the checkpoint.
        wanted: settings of the model to be trained, by dotted keys (`decoder.blocks`).

    Raises:
        CheckpointError: they differ; names the setting and both values.
    """
    there = from_json(ModelConfig, read_meta(folder).model)
    _check_frame_encoder(folder, asdict(there.backbone), wanted)
    if different := difference(there, wanted):
        key, found = different
        raise CheckpointError(
            f"checkpoint {str(folder)!r} is of another architecture: model.{key} is {found!r} there and "
            f"{wanted[key]!r} here; give --model.{key} {found}, or the same --preset or --config"
        )


def difference(model: ModelConfig, wanted: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the first setting, and its value in `model`, for which weights of the model are not those wanted.

    Args:
        model: settings of the model that was trained.
        wanted: settings of the model to be trained, by dotted keys.
    """
    there = asdict(model)
    for key, value in wanted.items():
        if key.startswith(NOT_COMPARED):
            continue
        found: Any = there
        for part in key.split("."):
            found = found[part]
        if found != value and not (key == "decoder.name" and {found, value} <= INTERCHANGEABLE):
            return key, found
    return None
