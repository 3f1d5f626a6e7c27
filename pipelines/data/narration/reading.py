"""Soft labels read back for training.

Shapes: N segments, K steps of a label.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipelines import storage
from pipelines.data.narration.labels import LABELS_FILE, MADE_BY, STEPS, LabelMeta
from pipelines.errors import UserError
from s5.tasks.distant import StepLabels


@dataclass(frozen=True)
class NarratedSteps:
    """What a training job needs of soft labels."""

    labels: StepLabels
    names: list[str]
    """Task and text of each step, by its id."""
    digest: str
    """Digest of what made them."""


def read_labels(path: str, manifest: pa.Table) -> NarratedSteps:
    """Return the labels of a manifest's segments.

    Args:
        path: a table of labels, or the folder that `narrate` wrote.
        manifest: the segments.

    Raises:
        UserError: there are none, they are no labels, or a segment has none.
    """
    name = storage.join(path, LABELS_FILE) if storage.is_folder(path) else path
    if not storage.exists(name):
        raise UserError(f"labels is {path!r}: there is no {LABELS_FILE}; run `python -m pipelines narrate` to its end")
    try:
        table = storage.read_table(name, ["video_id", "steps", "probabilities"])
        about: Mapping[bytes, bytes] = table.schema.metadata or {}
        meta, names = LabelMeta(**json.loads(about[MADE_BY])), json.loads(about[STEPS])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"labels is {path!r}: no labels that `narrate` wrote ({reason}); give its --out") from None
    rows = {name: row for row, name in enumerate(table["video_id"].to_pylist())}
    missing = [name for name in manifest["video_id"].to_pylist() if name not in rows]
    if missing:
        raise UserError(
            f"labels is {path!r}: {len(missing)} of {len(manifest)} videos of the manifest have none, as "
            f"{missing[0]!r}; give the manifest of segments that `narrate` wrote beside them"
        )
    steps_NK = torch.from_numpy(_matrix(table["steps"]).astype(np.int64))
    probabilities_NK = torch.from_numpy(_matrix(table["probabilities"]).astype(np.float32))
    return NarratedSteps(StepLabels(rows, steps_NK, probabilities_NK), names, meta.digest)


def _matrix(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return a column of lists of one length as a matrix."""
    values: npt.NDArray[Any] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), -1)
