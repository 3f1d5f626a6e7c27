"""Soft labels of narrated segments: the K steps that are most like what is said, and their probabilities.

labels.parquet    a row of LABELS for each segment; in its metadata, what made it and the names of all steps

Workers import this module, which needs no torch; `reading` has what training needs.

Shapes: R segments, S steps, K steps of a label.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.data.narration.encoders import ScoreArray, StepIndex

LABELS_FILE = "labels.parquet"
LABELS = pa.schema(
    [
        ("video_id", pa.string()),
        ("video", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("text", pa.string()),
        ("steps", pa.list_(pa.int64())),
        ("probabilities", pa.list_(pa.float32())),
    ]
)
"""A segment's id in the manifest of segments, its video, its times in that, what is said, the steps that are most like
it, the likeliest first, and their probabilities, which sum to 1: 0 for those that only fill up a short label."""
MADE_BY, STEPS = b"made_by", b"steps"
"""Keys of the schema's metadata: what made the labels, and the names of the steps by their ids, as JSON."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LabelMeta:
    """What made soft labels."""

    manifest: str
    """Digest of the manifest of the videos."""
    narration: str
    """Digest of the captions' file."""
    steps: str
    """Digest of the steps."""
    encoder: str
    """The sentence encoder: name, version, digest of its weights."""
    top_k: int
    temperature: float
    shortest_s: float

    @property
    def digest(self) -> str:
        """Digest that identifies the labels."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=12).hexdigest()


def soft_labels(scores_RS: ScoreArray, top_k: int, temperature: float) -> tuple[IntArray, ScoreArray]:
    """Return the K best-scored steps (R, K) of each row, best first, and their probabilities (R, K).

    The probabilities are the softmax of score / temperature over all steps, of which the K largest are kept and made
    to sum to 1 (arXiv 2201.10990): the softmax over these K alone. Of equal scores the step with the
    lower number comes first. Unlike the paper, a step that scores 0 or less has probability 0: it has no word in common
    (TF-IDF) or no meaning (a negative cosine), and only its number would bring it among the K. Where no step scores
    more, all K probabilities are 0.
    """
    last_R = np.partition(scores_RS, -top_k, axis=1)[:, -top_k]
    steps_RK = np.empty((len(scores_RS), top_k), np.int64)
    for row, (scores_S, last) in enumerate(zip(scores_RS, last_R, strict=True)):
        candidates = np.flatnonzero(scores_S >= last)
        steps_RK[row] = candidates[np.argsort(-scores_S[candidates], kind="stable")][:top_k]
    best_RK = np.take_along_axis(scores_RS, steps_RK, axis=1).astype(np.float64)
    weights_RK = np.where(best_RK > 0, np.exp((best_RK - best_RK[:, :1]) / temperature), 0.0)
    # The best step weighs 1, where it is alike.
    return steps_RK, (weights_RK / np.maximum(weights_RK.sum(1, keepdims=True), 1.0)).astype(np.float32)


class Labeller:
    """Labels chunks of segments, as an actor of Ray Data: it holds the encoder and the vectors of the steps."""

    def __init__(self, index: StepIndex, ids: IntArray, top_k: int, temperature: float) -> None:
        self._index, self._ids = index, ids
        self._top_k, self._temperature = top_k, temperature

    def __call__(self, segments: pa.Table) -> pa.Table:
        """Return segments (SEGMENTS) with `steps` and `probabilities`, null where what is said is like no step."""
        scores_RS = np.nan_to_num(self._index.similarities(segments["text"].to_pylist()))
        steps_RK, probabilities_RK = soft_labels(scores_RS, self._top_k, self._temperature)
        # Known of nothing that is said, or opposite to all: the steps would be drawn at random.
        alike = (scores_RS.max(1) > 0).tolist()
        steps = [row if like else None for row, like in zip(self._ids[steps_RK].tolist(), alike, strict=True)]
        shares = [row if like else None for row, like in zip(probabilities_RK.tolist(), alike, strict=True)]
        columns = {"steps": steps, "probabilities": shares}
        for name, values in columns.items():
            segments = segments.append_column(name, pa.array(values, LABELS.field(name).type))
        return segments
