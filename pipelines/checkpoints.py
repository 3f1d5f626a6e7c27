"""Where the weights that training starts from come from: checkpoints on any storage, and the backbone's own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from pipelines import storage
from pipelines.config import UserError
from s5.backbone import Backbone
from s5.config import BackboneConfig


@contextmanager
def local_checkpoint(path: str) -> Iterator[Path]:
    """Give a checkpoint as a local folder: itself, or a copy that is deleted afterwards.

    Args:
        path: a checkpoint's folder, or the --out of a stage that made one (its best is taken).

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
            raise UserError(f"checkpoint is {path!r}: that stage made none; give the --out of pretrain or finetune")
        path = found
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


def backbone_weights(config: BackboneConfig) -> dict[str, Tensor] | None:
    """Return the weights that the backbone is to start from, or None for random ones.

    They are read here, once and before any work: a training worker may have neither the file nor a way to the hub.

    Raises:
        UserError: the file is missing or of another model, or timm cannot get its own weights.
    """
    if not config.weights:
        return None
    try:
        return Backbone(config).vit.state_dict()
    except ValueError as error:
        raise UserError(str(error)) from None
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"backbone.weights is {config.weights!r}: timm cannot get them ({reason}); give a file, or go online once"
        ) from None
