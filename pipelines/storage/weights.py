"""The weights that a stage starts from: those of a checkpoint on any storage, or the backbone's own."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from pipelines import storage
from pipelines.errors import UserError
from s5.checkpoints.checkpoint import check_architecture, digest, encoder_weights, read_model
from s5.config import BackboneConfig
from s5.errors import CheckpointError
from s5.models.backbone import Backbone
from s5.models.segments import SegmentEncoder


@contextmanager
def local_checkpoint(path: str) -> Iterator[Path]:
    """Yield a checkpoint as a local folder: itself, or a copy that is deleted afterwards.

    Args:
        path: a checkpoint's folder, or the --out of a stage that saved one (its best is taken).

    Raises:
        UserError: there is none.
    """
    path = storage.absolute(path)
    if not storage.exists(path):
        raise UserError(f"checkpoint is {path!r}: there is no such folder; give a checkpoint or the --out of a stage")
    result = storage.join(path, "result.json")
    if storage.exists(result):
        found = storage.read_json(result).get("checkpoint")
        if not found:
            raise UserError(f"checkpoint is {path!r}: that stage saved none; give the --out of pretrain or finetune")
        # The folder may have been moved.
        below = storage.join(path, "checkpoints", found.rpartition("/")[2])
        path = below if storage.exists(below) else found
    elif not storage.exists(storage.join(path, "meta.json")):
        raise UserError(f"checkpoint is {path!r}: neither a checkpoint nor the --out of a finished stage")
    if not storage.is_uri(path):
        yield Path(path)
        return
    target = Path(tempfile.mkdtemp(prefix="checkpoint_"))
    try:
        storage.download(path, target)
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)


def checkpoint_digest(path: str) -> str:
    """Return the digest of a checkpoint's weights.

    Args:
        path: as for `local_checkpoint`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        with local_checkpoint(path) as folder:
            return digest(folder)
    except CheckpointError as error:
        raise UserError(str(error)) from None


def with_trained_weights(config: BackboneConfig) -> BackboneConfig:
    """Return the settings with timm's weights for a frozen backbone that is given none."""
    untrained = config.frozen and not config.weights and not config.tokens
    return replace(config, weights="timm") if untrained else config


def backbone_weights(config: BackboneConfig) -> dict[str, Tensor] | None:
    """Return the weights that the backbone starts from, or None for random ones.

    They are read once, before any work: a training worker may have neither the file nor access to the hub.

    Raises:
        UserError: the file is missing or of another model, or timm cannot load its own weights.
    """
    if not config.weights:
        return None
    try:
        weights: dict[str, Tensor] = Backbone(config).vit.state_dict()
        return weights
    except ValueError as error:
        raise UserError(str(error)) from None
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        why = "; a frozen backbone needs trained weights, since random ones would stay so" if config.frozen else ""
        raise UserError(
            f"backbone.weights is {config.weights!r}: timm cannot load them ({reason}){why}; give a file, or go online "
            "once"
        ) from None


def of_backbone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an encoder's backbone from those of the encoder."""
    prefix = "backbone.vit."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def trained_backbone(config: BackboneConfig, path: str) -> Backbone:
    """Return a frozen backbone with the weights of a checkpoint, or where `path` is empty with its own or timm's.

    Raises:
        UserError: there are no weights, or they are of another backbone.
    """
    config = replace(config, frozen=True)
    weights = None if path else backbone_weights(with_trained_weights(config))
    try:
        if weights is None:
            with local_checkpoint(path) as folder:
                check_architecture(folder, {f"backbone.{name}": value for name, value in asdict(config).items()})
                weights = of_backbone(encoder_weights(folder))
        backbone = Backbone(replace(config, weights=""))
    except (CheckpointError, ValueError) as error:
        raise UserError(str(error)) from None
    backbone.vit.load_state_dict(weights)
    return backbone.eval()


def segment_encoder(path: str) -> SegmentEncoder:
    """Return the encoder of segments that the video model of a checkpoint is.

    Raises:
        UserError: there is none, or it reads embeddings itself.
    """
    try:
        with local_checkpoint(path) as folder:
            model, meta = read_model(folder)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    if model.config.backbone.tokens:
        raise UserError(f"checkpoint is {path!r}: its model reads cached features, not frames; give another one")
    return SegmentEncoder(model, int(meta.settings["clips"]["frames"]))


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a digest of weights, of their names, shapes and values."""
    sink = hashlib.blake2b(digest_size=12)
    for name, value in sorted(weights.items()):
        sink.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sink.update(value.detach().cpu().contiguous().numpy().data)
    return sink.hexdigest()
