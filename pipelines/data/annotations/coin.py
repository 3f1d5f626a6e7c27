"""COIN (Tang et al., arXiv 1903.02874): 180 tasks of instructional videos, as one JSON file.

{"database": {YOUTUBE_ID: {"class": name, "recipe_type": 0..179, "subset": "training", "start": s, "end": s, ...}, ...}}

Only the segment from `start` to `end` of a video is used. There is no validation split.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from pipelines.data.annotations.shared import AnnotatedVideo, AnnotationFile, Annotations, class_list

PROTOCOL: Final = "whole"
CLASSES = 180
SUBSETS = {"training": "train", "testing": "test"}


def read(given: str) -> Annotations:
    """Return what COIN.json lists.

    Raises:
        UserError: the file is missing or wrong.
    """
    file = AnnotationFile(given)
    text = file.read()
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, file))
    except json.JSONDecodeError as error:
        what = f"{file.short} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        raise file.error(f"{what}; give COIN.json") from None
    database = content.get("database") if isinstance(content, dict) else None
    if not isinstance(database, dict) or not database:
        raise file.error(f'{file.short} has no "database" of videos by their ids; give COIN.json')
    names: dict[int, str] = {}
    videos = [_video(file, video_id, entry, names) for video_id, entry in database.items()]
    return Annotations(videos, class_list(names, CLASSES), "coin", "", PROTOCOL)


def _object(pairs: list[tuple[str, Any]], file: AnnotationFile) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise file.error(f"{file.short} has the key {twice!r} twice in one object: leave it only once")
    return found


def _video(file: AnnotationFile, video_id: str, entry: Any, names: dict[int, str]) -> AnnotatedVideo:
    place = f"{file.short} entry {video_id}"
    if not isinstance(entry, dict):
        raise file.error(f"{place} is {entry!r}; give an object with class, recipe_type, subset, start and end")

    def value(key: str, kinds: type | tuple[type, ...], remedy: str) -> Any:
        found = entry.get(key)
        if not isinstance(found, kinds) or isinstance(found, bool):
            raise file.error(f"{place} has {key} {found!r}; give {remedy}")
        return found

    label, name = value("recipe_type", int, f"the task's number, 0 to {CLASSES - 1}"), value("class", str, "a name")
    subset = value("subset", str, " or ".join(SUBSETS))
    start_s, end_s = (float(value(key, (int, float), "seconds")) for key in ("start", "end"))
    if not 0 <= label < CLASSES:
        raise file.error(f"{place} has recipe_type {label}; give the task's number, 0 to {CLASSES - 1}")
    if subset not in SUBSETS:
        raise file.error(f"{place} has subset {subset!r}; give {' or '.join(SUBSETS)}")
    if not 0 <= start_s < end_s < math.inf:
        raise file.error(f"{place} has start {start_s:g} and end {end_s:g}; give 0 <= start < end, in seconds")
    if names.setdefault(label, name) != name:
        raise file.error(f"{place} has class {name!r}; recipe_type {label} is {names[label]!r} elsewhere")
    return AnnotatedVideo(video_id, video_id, place, SUBSETS[subset], name, label, start_s=start_s, end_s=end_s)
