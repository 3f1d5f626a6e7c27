"""Kinetics-400, -600 and -700 (Kay et al., arXiv 1705.06950): csv files, a line a clip of about 10 s.

A clip is the file YOUTUBEID_SSSSSS_EEEEEE.mp4, of its start and end in whole seconds. The label of a class is its
index in the sorted class names of the training split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pipelines import storage
from pipelines.data.annotations.shared import AnnotatedVideo, AnnotationFile, Annotations, Row
from pipelines.errors import UserError

PROTOCOL: Final = "multi-clip"
COLUMNS = ("youtube_id", "time_start", "time_end", "split")
OPTIONAL = ("label", "is_cc")
"""Columns that a file may lack: the test split may come without labels."""
FILES = ("train.csv", "val.csv", "validate.csv", "test.csv")
SPLITS = {"train": "train", "val": "val", "validate": "val", "test": "test"}


def read(given: str) -> Annotations:
    """Return what a csv file, or those in a folder, list; the split is in column `split`.

    Raises:
        UserError: a file is missing or wrong, or a label is not among those of train.
    """
    rows = [(row, SPLITS[_split(row)]) for file in _files(given) for row in file.rows(COLUMNS, OPTIONAL)]
    names = sorted({row.required("label") for row, split in rows if split == "train" and "label" in row.text})
    if not names:
        raise UserError(f"annotations is {given!r}: no clip of split train has a label, and those define the classes")
    labels = {name: label for label, name in enumerate(names)}
    return Annotations(list(_videos(rows, labels)), names, "kinetics", "", PROTOCOL)


def _files(given: str) -> list[AnnotationFile]:
    if not storage.is_folder(given):
        return [AnnotationFile(given)]
    files = [AnnotationFile(given, name) for name in FILES]
    found = [file for file in files if storage.exists(file.path)]
    if not found:
        raise AnnotationFile(given).error(f"there is none of {', '.join(FILES)} in it; give Kinetics' folder or a csv")
    return found


def _split(row: Row) -> str:
    split = row.text["split"]
    if split not in SPLITS:
        raise row.error("split", f"give {', '.join(SPLITS)}")
    return split


def _videos(rows: list[tuple[Row, str]], labels: dict[str, int]) -> Iterator[AnnotatedVideo]:
    first: dict[tuple[str, str], str] = {}
    for row, split in rows:
        start_s, end_s = row.integer("time_start"), row.integer("time_end")
        if end_s <= start_s:
            raise row.error("time_end", f"give a time after time_start, {start_s}")
        name = row.text.get("label") or None
        if name not in labels and (name or split != "test"):
            raise row.error("label", "give a class of split train") if "label" in row.text else _unlabelled(row)
        video_id = f"{row.required('youtube_id')}_{start_s:06d}_{end_s:06d}"
        place = row.location
        earlier = first.setdefault((video_id, split), place)
        # The same seconds may be annotated with two classes: the first counts.
        reason = "" if earlier == place else f"listed again in {place}, after {earlier}"
        label = labels[name] if name else None
        stated_s = float(end_s - start_s)
        yield AnnotatedVideo(video_id, video_id, place, split, name, label, stated_s=stated_s, reason=reason)


def _unlabelled(row: Row) -> UserError:
    return row.file.error(f"{row.location} is of split {row.text['split']} and has no label, which only test may lack")
