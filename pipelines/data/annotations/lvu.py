"""LVU (Wu and Krahenbuhl, arXiv 2106.11310): nine tasks on film clips, as `lvu_1.0/TASK/{train,val,test}.csv`.

Despite their name, the files are separated by spaces; they have a header, and the video id is the second-to-last field.
Windows of 60 s at 1 frame a second are classified, and the results of a video are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from pipelines import storage
from pipelines.data.annotations.shared import (
    AnnotatedVideo,
    AnnotationFile,
    Annotations,
    Row,
    annotation_files,
    class_list,
)
from pipelines.data.manifest import SPLITS
from pipelines.errors import UserError

PROTOCOL: Final = "windows"
CLASSES = {"relationship": 4, "way_speaking": 5, "scene": 6, "director": 10, "genre": 4, "writer": 10, "year": 9}
"""Number of classes of each classification task; ids that occur in no split still have an output."""
COUNTS = {"like_ratio": ("like_count", "dislike_count"), "view_count": ("view_count",)}
"""First columns of each regression task."""
TASKS = (*CLASSES, *COUNTS)

# Means that the benchmark subtracts from its targets.
MEAN_LOG_VIEWS, MEAN_LIKES = 11.76425435683139, 9.138220535629456


def read(given: str) -> Annotations:
    """Return what a task's folder lists; the folder's name is the task.

    Raises:
        UserError: the folder is of no task, or a file is missing or wrong.
    """
    task = storage.absolute(given).rstrip("/").rpartition("/")[2]
    if task not in TASKS:
        raise UserError(
            f"annotations is {given!r}: LVU has no task {task!r}; give the folder of one of its nine tasks, "
            f"lvu_1.0/TASK with {', '.join(TASKS)}"
        )
    names: dict[int, str] = {}
    files = annotation_files(given, [f"{split}.csv" for split in SPLITS], _WHAT)
    videos = [
        _video(row, task, split, names) for split, file in zip(SPLITS, files, strict=True) for row in _rows(file, task)
    ]
    return Annotations(videos, class_list(names, CLASSES.get(task, 0)), "lvu", task, PROTOCOL)


_WHAT = "the folder of a task, such as lvu_1.0/genre, with train.csv, val.csv and test.csv"


def _rows(file: AnnotationFile, task: str) -> Iterator[Row]:
    columns = [*COUNTS.get(task, ("class_id", "class_name")), "youtube_id", "imdb_id"]
    header, *lines = file.read().split("\n")
    if header.split() != columns:
        raise file.error(
            f"{file.short} begins with {header.strip()[:80]!r}; the first line must name the columns, with spaces: "
            f"{' '.join(columns)}"
        )
    listed = 0
    for number, line in enumerate(lines, start=2):
        fields = line.split()
        if task in CLASSES and len(fields) > len(columns):
            fields = [fields[0], " ".join(fields[1:-2]), *fields[-2:]]
        if fields and len(fields) != len(columns):
            raise file.error(f"{file.short} line {number} has {len(fields)} fields, not {len(columns)}: {line[:80]!r}")
        if fields:
            listed += 1
            yield Row(file, number, dict(zip(columns, fields, strict=True)))
    if not listed:
        raise file.error(f"{file.short} lists no videos")


def _video(row: Row, task: str, split: str, names: dict[int, str]) -> AnnotatedVideo:
    video_id = row.text["youtube_id"]
    if task in COUNTS:
        return AnnotatedVideo(video_id, video_id, row.location, split, target=_target(row, task))
    label, name = row.integer("class_id", 0, CLASSES[task] - 1), row.text["class_name"]
    if names.setdefault(label, name) != name:
        raise row.error("class_name", f"class {label} is {names[label]!r} elsewhere")
    return AnnotatedVideo(video_id, video_id, row.location, split, name, label)


def _target(row: Row, task: str) -> float:
    if task == "view_count":
        return math.log(row.integer("view_count", 1)) - MEAN_LOG_VIEWS
    likes, dislikes = row.integer("like_count"), row.integer("dislike_count")
    if likes + dislikes == 0:
        raise row.error("like_count", "there must be at least one like or dislike")
    return 10 * likes / (likes + dislikes) - MEAN_LIKES
