"""A checkpoint: a folder that rebuilds itself, of safetensors and JSON alone.

model.safetensors      weights and buffers of the task that was trained
optimizer.safetensors  moments and step counts of the optimiser
meta.json              kind, step, model settings, classes, and all settings of the run
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s5.config import ModelConfig, from_json
from s5.model import VideoModel

FORMAT = 1
MODEL, OPTIMIZER, META = "model.safetensors", "optimizer.safetensors", "meta.json"
# Settings of the model that do not change the encoder's weights or what they compute.
FREE = (
    "decoder.selection.",
    "decoder.dropout",
    "decoder.ssm.lr",
    "decoder.attention.implementation",
    "backbone.weights",
    "backbone.frozen",
)

# Decoders whose weights are the same, those that pretraining does not make apart.
INTERCHANGEABLE = {"s5", "vis4mer", "vtm"}

Kind = Literal["lsmcl", "class", "regression"]


class CheckpointError(ValueError):
    """A checkpoint that is not there, is damaged, or does not fit; the message says which and what to do."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a checkpoint says of itself."""

    kind: Kind
    """The task: `lsmcl` (an encoder), or `class` or `regression` (a fine-tuned model)."""
    step: int
    """Optimiser steps taken: also the position in the clip plan."""
    model: dict[str, Any]
    """Settings of the model (ModelConfig)."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in the order of the head's outputs."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All settings of the run."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics at that step."""
    commit: str = "unknown"
    """Commit of the code."""
    format: int = FORMAT
    """Version of this layout."""


def save(folder: Path, task: nn.Module, optimizer: torch.optim.Optimizer, meta: Meta) -> None:
    """Write a checkpoint; meta.json comes last, so that a folder without it is known to be cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().contiguous() for key, value in task.state_dict().items()}, folder / MODEL)
    moments = {
        f"{index}.{name}": value.detach().contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(moments, folder / OPTIMIZER)
    (folder / META).write_text(json.dumps(asdict(meta), indent=2))


def read_meta(folder: Path) -> Meta:
    """Return what a checkpoint says of itself.

    Raises:
        CheckpointError: the folder is no checkpoint, is damaged, or has a layout of another version.
    """
    try:
        values = json.loads((folder / META).read_text())
        meta = Meta(**values)
    except FileNotFoundError:
        raise CheckpointError(f"{str(folder)!r} is no checkpoint: it has no {META}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {str(folder)!r} has a damaged {META}: {error}") from None
    if meta.format != FORMAT:
        raise CheckpointError(f"checkpoint {str(folder)!r} has layout {meta.format}: this version reads {FORMAT}")
    return meta


def digest(folder: Path) -> str:
    """Return what identifies a checkpoint: a digest of its weights."""
    with (folder / MODEL).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=12)).hexdigest()


def read_weights(folder: Path, name: str = MODEL) -> dict[str, Tensor]:
    """Return the tensors of one of a checkpoint's files, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_file(folder / name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {str(folder)!r} is damaged: {name}: {error}") from None


def restore(folder: Path, task: nn.Module, optimizer: torch.optim.Optimizer) -> Meta:
    """Load a checkpoint into the task and optimiser that it was saved from, and return its meta data.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model.
    """
    meta = read_meta(folder)
    weights = read_weights(folder)
    try:
        task.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {str(folder)!r} is of another architecture: {error}") from None
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in read_weights(folder, OPTIMIZER).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta


def encoder_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint's video model: the online encoder of LSMCL, or the fine-tuned model."""
    prefix = "encoder." if read_meta(folder).kind == "lsmcl" else "model."
    return {k.removeprefix(prefix): v for k, v in read_weights(folder).items() if k.startswith(prefix)}


def load_model(folder: Path) -> tuple[VideoModel, Meta]:
    """Build a checkpoint's video model from its own settings and weights, in evaluation mode.

    Raises:
        CheckpointError: the folder is no checkpoint, or is damaged.
    """
    meta = read_meta(folder)
    weights = encoder_weights(folder)
    outputs = {"class": len(meta.classes), "regression": 1}.get(meta.kind)
    # The weights are all in the checkpoint: the file that the backbone started from need not be there any more.
    config = from_json(ModelConfig, meta.model | {"backbone": meta.model["backbone"] | {"weights": ""}})
    model = VideoModel(config, outputs)
    if meta.kind == "lsmcl":
        model.load_pretrained(weights)
    else:
        model.load_state_dict(weights)
    return model.eval(), meta


def check_architecture(folder: Path, wanted: dict[str, Any]) -> None:
    """Compare a checkpoint's architecture with the one that is to be trained, without reading its weights.

    Args:
        folder: the checkpoint.
        wanted: settings of the model to be trained, by dotted keys (`decoder.blocks`).

    Raises:
        CheckpointError: they differ; names the setting and both values.
    """
    there = asdict(from_json(ModelConfig, read_meta(folder).model))
    for key, value in wanted.items():
        if key.startswith(FREE):
            continue
        found: Any = there
        for part in key.split("."):
            found = found[part]
        if found != value and not (key == "decoder.name" and {found, value} <= INTERCHANGEABLE):
            raise CheckpointError(
                f"checkpoint {str(folder)!r} is of another architecture: model.{key} is {found!r} there and {value!r} "
                f"here; give --model.{key} {found}, or the same --preset or --config"
            )


def is_complete(folder: Path) -> bool:
    """Return whether a folder is a checkpoint whose files all open."""
    try:
        read_meta(folder)
        for name in (MODEL, OPTIMIZER):
            with safe_open(folder / name, framework="pt") as content:
                content.keys()
    except (CheckpointError, SafetensorError, OSError):
        return False
    return True
