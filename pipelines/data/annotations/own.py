"""Own videos: a folder of splits and classes, or any folder with a csv.

[{train,val,test}/][CLASS/]name.mp4             or a csv: video[,label,target,split,start_s,end_s]
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from pipelines import storage
from pipelines.data.annotations.shared import AnnotatedVideo, AnnotationFile, Annotations, Row
from pipelines.data.manifest import SPLITS

COLUMNS = ("label", "target", "split", "start_s", "end_s")
"""Columns that a csv may have beside `video`."""
MAX_CLASSES = 30_000
"""Labels that are numbers are kept as they are up to this many outputs of the head; the largest sets of classes in
use, such as ImageNet-21k, have 22,000."""
WHOLE_NUMBER = re.compile(r"\d{1,15}(\.0*)?", re.ASCII)
"""A label that is a whole number: `7`, and `7.0`, as pandas writes a column that has gaps."""

NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
FIRST_CHANGED = 3
"""Labels that a warning names."""


def from_folder(files: list[str], faults: Iterable[tuple[str, str]] = ()) -> Annotations:
    """Return the videos of a folder, given as paths below it; folder names give the split and the class.

    Args:
        files: the videos.
        faults: what should be a video and is none, each with the reason why it is rejected.
    """
    videos = [_from_path(name, video_id) for name, video_id in _ids(files).items()]
    videos += [replace(_from_path(name, name), reason=reason) for name, reason in faults]
    remedy = "their numbers follow from sorting as text; give --annotations with a column label to set them"
    return _with_labels(videos, sorted(_class_names(videos)), remedy)


def from_csv(given: str, files: list[str], name_of: Callable[[str], str] = str) -> Annotations:
    """Return the videos of a folder that a csv lists; a video may be listed several times with different stretches.

    A stretch that is listed again is rejected, with another label too: the first line counts.

    Args:
        given: the csv.
        files: the folder's videos, as paths below it.
        name_of: returns the video that is meant by a name in the csv.

    Raises:
        UserError: the file is missing, or something in it is wrong.
    """
    ids = _ids(files)
    rows = AnnotationFile(given).rows(["video"], COLUMNS)
    videos = _numbered(_without_repeats([_from_row(row, ids, name_of) for row in rows]))
    names = _class_names(videos)
    if names and all(name.isdecimal() for name in names) and max(map(int, names)) < MAX_CLASSES:
        return _with_numbers(videos, names)
    remedy = f"to keep numbers as labels, give whole numbers from 0 to {MAX_CLASSES - 1:,} alone"
    return _with_labels(videos, sorted(names), remedy)


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


def _from_row(row: Row, ids: dict[str, str], name_of: Callable[[str], str]) -> AnnotatedVideo:
    given, split = row.required("video"), row.text.get("split", "")
    if storage.is_uri(given) and storage.redacted(given) != given:
        what = f"has video {storage.redacted(given)!r} with credentials or a query; give the name alone"
        raise row.file.error(f"{row.location} {what}, and credentials by the environment")
    # No file system takes such a name, and asking for it raises.
    fault = f"{row.location} has a NUL byte in its name" if "\0" in given else ""
    name = given if fault else name_of(given)
    if split and split not in SPLITS:
        raise row.error("split", f"give {', '.join(SPLITS)} or nothing")
    target, start_s, end_s = (_number(row, column) for column in ("target", "start_s", "end_s"))
    video_id = ids.get(name, name)
    if start_s is not None or end_s is not None:
        video_id += f"@{_seconds(start_s or 0)}-{'' if end_s is None else _seconds(end_s)}"
    class_name = row.text.get("label") or None
    return AnnotatedVideo(video_id, name, row.location, split, class_name, None, target, start_s, end_s, reason=fault)


def _seconds(value: float) -> str:
    """Return seconds to the millisecond without zeros at the end."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


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


def _without_repeats(videos: list[AnnotatedVideo]) -> list[AnnotatedVideo]:
    """Return videos with the reason why a stretch that was listed before is rejected."""
    first: dict[str, AnnotatedVideo] = {}
    checked = []
    for video in videos:
        earlier = first.setdefault(video.video_id, video)
        if earlier is not video:
            other = [
                f"{column} {ours!r} rather than {theirs!r}"
                for column, ours, theirs in (
                    ("label", video.class_name, earlier.class_name),
                    ("target", video.target, earlier.target),
                    ("split", video.split, earlier.split),
                )
                if ours != theirs
            ]
            also = f" with {' and '.join(other)}" if other else ""
            reason = f"{video.location} lists it again{also}; {earlier.location} counts"
            video = replace(video, reason=reason)
        checked.append(video)
    return checked


# --- labels ---------------------------------------------------------------------------------------------------------


def _class_names(videos: list[AnnotatedVideo]) -> set[str]:
    return {video.class_name for video in videos if video.class_name is not None}


def _numbered(videos: list[AnnotatedVideo]) -> list[AnnotatedVideo]:
    """Return videos with labels such as `2.0` and `02` as `2`, where all labels are whole numbers."""
    names = _class_names(videos)
    if not all(WHOLE_NUMBER.fullmatch(name) for name in names):
        return videos
    plain = {name: str(int(name.partition(".")[0])) for name in names}
    return [v if v.class_name is None else replace(v, class_name=plain[v.class_name]) for v in videos]


def _with_numbers(videos: list[AnnotatedVideo], names: set[str]) -> Annotations:
    """Return annotations whose labels are their numbers; numbers that no video has are classes without videos."""
    count = max(map(int, names)) + 1
    annotations = _with_labels(videos, [str(label) for label in range(count)])
    if 2 * len(names) >= count:
        return annotations
    warning = (
        f"labels are numbers up to {count - 1}, so there are {count} classes, and only {len(names)} have videos: for "
        f"classes of these alone give names as labels, such as 'class {count - 1}'"
    )
    return replace(annotations, warnings=[warning])


def _with_labels(videos: list[AnnotatedVideo], names: list[str], remedy: str = "") -> Annotations:
    """Return annotations with the classes in the order of `names`; `remedy` ends the warning of changed numbers."""
    labels = {name: label for label, name in enumerate(names)}
    found = [_with_label(video, names, labels) for video in videos]
    changed = [name for name, label in labels.items() if NUMBER.fullmatch(name) and float(name) != label]
    warnings = []
    if changed:
        first = ", ".join(f"{name!r} becomes {labels[name]}" for name in changed[:FIRST_CHANGED])
        warnings = [f"labels that are numbers are renumbered ({first}; {len(changed)} in all): {remedy}"]
    return Annotations(found, names, warnings=warnings)


def _with_label(video: AnnotatedVideo, names: list[str], labels: dict[str, int]) -> AnnotatedVideo:
    if video.class_name is None:
        return video
    label = labels[video.class_name]
    # One string a class, however many videos have it.
    return replace(video, class_name=names[label], label=label)
