"""Own videos: a folder of splits and classes, or any folder with a csv.

[{train,val,test}/][CLASS/]name.mp4             or a csv: video[,label,target,split,start_s,end_s]
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from pipelines.data.annotations.shared import AnnotatedVideo, AnnotationFile, Annotations, Row
from pipelines.data.manifest import SPLITS

COLUMNS = ("label", "target", "split", "start_s", "end_s")
"""Columns that a csv may have beside `video`."""
MAX_LABEL = 1000
"""Larger numbers in a csv, such as years, are class names rather than labels."""


def from_folder(files: list[str]) -> Annotations:
    """Return the videos of a folder, given as paths below it; folder names give the split and the class."""
    return _with_labels([_from_path(name, video_id) for name, video_id in _ids(files).items()], numbered=False)


def from_csv(given: str, files: list[str]) -> Annotations:
    """Return the videos of a folder that a csv lists; a video may be listed several times with different segments.

    Raises:
        UserError: the file is missing, or something in it is wrong.
    """
    ids = _ids(files)
    return _with_labels([_from_row(row, ids) for row in AnnotationFile(given).rows(["video"], COLUMNS)], numbered=True)


def _ids(files: list[str]) -> dict[str, str]:
    """Return the id of each file: its name without the ending, where no two are the same."""
    stems = Counter(name.rpartition(".")[0] for name in files)
    return {name: stem if stems[stem := name.rpartition(".")[0]] == 1 else name for name in files}


def _from_path(name: str, video_id: str) -> AnnotatedVideo:
    split, _, rest = name.partition("/")
    if split not in SPLITS or not rest:
        split, rest = "", name
    class_name, _, below = rest.partition("/")
    return AnnotatedVideo(video_id, name, f"the folder as {name}", split, class_name if below else None)


def _from_row(row: Row, ids: dict[str, str]) -> AnnotatedVideo:
    name, split = row.required("video"), row.text.get("split", "")
    if split and split not in SPLITS:
        raise row.error("split", f"give {', '.join(SPLITS)} or nothing")
    target, start_s, end_s = (_number(row, column) for column in ("target", "start_s", "end_s"))
    video_id = ids.get(name, name)
    if start_s is not None or end_s is not None:
        video_id += f"@{start_s or 0:g}-{'' if end_s is None else f'{end_s:g}'}"
    class_name = row.text.get("label") or None
    return AnnotatedVideo(video_id, name, row.location, split, class_name, None, target, start_s, end_s)


def _number(row: Row, column: str) -> float | None:
    if not (text := row.text.get(column, "")):
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (column != "target" and value < 0):
        raise row.error(column, f"give a number{'' if column == 'target' else ' >= 0'}")
    return value


def _with_labels(videos: list[AnnotatedVideo], numbered: bool) -> Annotations:
    names = class_names(videos, numbered)
    labels = {name: label for label, name in enumerate(names)}
    found = [video if video.class_name is None else replace(video, label=labels[video.class_name]) for video in videos]
    return Annotations(found, names)


def class_names(videos: list[AnnotatedVideo], numbered: bool) -> list[str]:
    """Return the names of the classes in the order of their labels, over all splits: sorted.

    If all labels of a csv are numbers below MAX_LABEL (`numbered`), they are the labels themselves, and numbers that no
    video has are classes without videos.
    """
    names = sorted({video.class_name for video in videos if video.class_name is not None})
    if numbered and names and all(name.isdecimal() and str(int(name)) == name for name in names):
        count = max(map(int, names)) + 1
        return [str(label) for label in range(count)] if count <= MAX_LABEL else names
    return names
