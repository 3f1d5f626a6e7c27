"""Breakfast (Kuehne, Arslan and Serre, CVPR 2014): ten dishes, as `{train,test}.csv` with a line a video.

The video `P03-cam01-P03_cereals` is the file P03/cam01/P03_cereals.avi. There is no validation split.
"""

from __future__ import annotations

from typing import Final

from pipelines.data.annotations.shared import AnnotatedVideo, Annotations, Row, annotation_files, class_list

PROTOCOL: Final = "whole"
COLUMNS = ("file_name", "duration", "action", "class_id")
CLASSES = 10
SPLITS = ("train", "test")


def read(given: str) -> Annotations:
    """Return what the folder of train.csv and test.csv lists.

    Raises:
        UserError: a file is missing or wrong.
    """
    names: dict[int, str] = {}
    videos: list[AnnotatedVideo] = []
    what = "the folder with Breakfast's train.csv and test.csv"
    for split, file in zip(SPLITS, annotation_files(given, [f"{split}.csv" for split in SPLITS], what), strict=True):
        listed = [_video(row, split, names) for row in file.rows(COLUMNS)]
        if not listed:
            raise file.error(f"{file.short} lists no videos")
        videos += listed
    return Annotations(videos, class_list(names, CLASSES), "breakfast", "", PROTOCOL)


def _video(row: Row, split: str, names: dict[int, str]) -> AnnotatedVideo:
    video_id = row.text["file_name"]
    parts = video_id.split("-")
    if len(parts) != 3 or not all(parts) or "/" in video_id:
        raise row.error("file_name", "give PERSON-CAMERA-NAME, such as P03-cam01-P03_cereals")
    label, name = row.integer("class_id", 0, CLASSES - 1), row.required("action")
    if names.setdefault(label, name) != name:
        raise row.error("action", f"class {label} is {names[label]!r} elsewhere")
    stated_s = float(row.text["duration"]) if row.text["duration"].isdecimal() else None
    # Several cameras film each performance, and the benchmark's own splits are by person.
    where = "/".join(parts)
    return AnnotatedVideo(video_id, where, row.location, split, name, label, stated_s=stated_s, group=parts[0])
