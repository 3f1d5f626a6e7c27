"""Breakfast (Kuehne, Arslan and Serre, CVPR 2014): ten dishes, as `{train,test}.csv` with a line a video.

The video `P03-cam01-P03_cereals` is the file P03/cam01/P03_cereals.avi. There is no validation split.
"""

from __future__ import annotations

from pipelines.data.annotations.listing import Listed, Listing, Row, class_list, files_of

COLUMNS = ("file_name", "duration", "action", "class_id")
CLASSES = 10
SPLITS = ("train", "test")


def read(given: str) -> Listing:
    """Return what the folder of train.csv and test.csv lists.

    Raises:
        UserError: a file is missing or wrong.
    """
    names: dict[int, str] = {}
    videos: list[Listed] = []
    what = "the folder with Breakfast's train.csv and test.csv"
    for split, file in zip(SPLITS, files_of(given, [f"{split}.csv" for split in SPLITS], what), strict=True):
        listed = [_video(row, split, names) for row in file.rows(COLUMNS)]
        if not listed:
            raise file.error(f"{file.short} lists no videos")
        videos += listed
    return Listing(videos, class_list(names, CLASSES), "breakfast", "", "whole")


def _video(row: Row, split: str, names: dict[int, str]) -> Listed:
    video_id = row.text["file_name"]
    parts = video_id.split("-")
    if len(parts) != 3 or not all(parts) or "/" in video_id:
        raise row.wrong("file_name", "give PERSON-CAMERA-NAME, such as P03-cam01-P03_cereals")
    label, name = row.whole("class_id", 0, CLASSES - 1), row.given("action")
    if names.setdefault(label, name) != name:
        raise row.wrong("action", f"class {label} is {names[label]!r} elsewhere")
    return Listed(video_id, "/".join(parts), row.place, split, name, label)
