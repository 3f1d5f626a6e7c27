"""A prediction as a row of predictions.parquet, as a line of JSON, and as lines on a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa

from s5.evaluation.prediction import Stretch, VideoPrediction

STRETCH = pa.struct(
    [
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("label", pa.string()),
        ("probability", pa.float64()),
        ("value", pa.float64()),
    ]
)
PREDICTED = pa.schema(
    [
        ("video", pa.string()),
        ("reason", pa.string()),
        ("seconds", pa.float64()),
        ("label", pa.string()),
        ("probability", pa.float64()),
        ("value", pa.float64()),
        ("scores", pa.list_(pa.float64())),
        ("clips", pa.int64()),
        ("over_time", pa.list_(STRETCH)),
        ("decode_s", pa.float64()),
        ("model_s", pa.float64()),
        ("rest_s", pa.float64()),
    ]
)
"""A video's prediction, or the `reason` why there is none: `label` and `probability` of a model of classes, with the
probability of each class in `scores`; `value` in regression; `over_time` of windows; and what it took in seconds."""
TOP = 5
"""Classes of a line of JSON."""
NAME_CHARACTERS, LABEL_CHARACTERS = 40, 32


def row_of(video: str, found: VideoPrediction) -> dict[str, Any]:
    """Return the row of a prediction."""
    took = found.seconds
    return {name: None for name in PREDICTED.names} | {
        "video": video,
        "seconds": found.end_s,
        **_said(found),
        "scores": list(found.values) if found.classes else None,
        "clips": found.clips,
        "over_time": [{"start_s": part.start_s, "end_s": part.end_s, **_said(part)} for part in found.over_time],
        "decode_s": took.decode,
        "model_s": took.model,
        "rest_s": took.rest,
    }


def reject_of(video: str, reason: str) -> dict[str, Any]:
    """Return the row of a video that cannot be read."""
    return {name: None for name in PREDICTED.names} | {"video": video, "reason": reason}


def _said(part: Stretch) -> dict[str, Any]:
    if part.classes:
        return {"label": part.label, "probability": part.probability, "value": None}
    return {"label": None, "probability": None, "value": part.value}


def json_line(row: dict[str, Any], classes: Sequence[str]) -> str:
    """Return a row as JSON without what it lacks; of the probabilities the highest, by class."""
    found = {key: value for key, value in row.items() if value is not None and key != "scores"}
    if row["scores"]:
        best = sorted(zip(row["scores"], classes, strict=True), reverse=True)[:TOP]
        found["top"] = {name: score for score, name in best}
    if row["over_time"] is not None:
        found["over_time"] = [{k: v for k, v in part.items() if v is not None} for part in row["over_time"]]
    return json.dumps(found, ensure_ascii=False)


def table_head() -> str:
    """Return the first line of the table."""
    return f"{'video':{NAME_CHARACTERS}}  {'length':>8}  prediction"


def table_lines(row: dict[str, Any]) -> Iterator[str]:
    """Yield a row as lines of a table: the video, and below it what is said over time, equal labels as one."""
    name = row["video"]
    name = name if len(name) <= NAME_CHARACTERS else f"…{name[1 - NAME_CHARACTERS :]}"
    if row["reason"]:
        yield f"{name:{NAME_CHARACTERS}}  cannot be read: {row['reason']}"
        return
    yield f"{name:{NAME_CHARACTERS}}  {clock(row['seconds']):>8}  {_shown(row)}"
    for _, group in groupby(row["over_time"], key=lambda part: part["label"]):
        parts = list(group)
        # Values differ from window to window: there are none to join.
        for joined in [parts] if parts[0]["label"] else [[part] for part in parts]:
            mean = joined[0] | {"probability": sum(part["probability"] or 0.0 for part in joined) / len(joined)}
            stretch = f"{clock(joined[0]['start_s'])} to {clock(joined[-1]['end_s'])}"
            yield f"{stretch:>{NAME_CHARACTERS + 10}}  {_shown(mean)}"


def _shown(said: dict[str, Any]) -> str:
    if said["value"] is not None:
        return f"{said['value']:.4g}"
    return f"{said['label'][:LABEL_CHARACTERS]:{LABEL_CHARACTERS}}  {said['probability']:6.1%}"


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours where there are any."""
    whole = math.floor(seconds + 1e-6)
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
