"""The benchmarks whose annotations are read, how one is told from another, and how long their videos are."""

from __future__ import annotations

from collections.abc import Callable

from pipelines import storage
from pipelines.data.annotations import breakfast, coin, kinetics, lvu
from pipelines.data.annotations.shared import AnnotatedVideo, AnnotationFile, Annotations
from pipelines.errors import UserError
from s5.config import EvaluationProtocol

READERS: dict[str, Callable[[str], Annotations]] = {
    "lvu": lvu.read,
    "breakfast": breakfast.read,
    "coin": coin.read,
    "kinetics": kinetics.read,
}
"""Readers of annotations whose videos are named by ids without endings."""
PROTOCOLS: dict[str, EvaluationProtocol] = {
    "lvu": lvu.PROTOCOL,
    "breakfast": breakfast.PROTOCOL,
    "coin": coin.PROTOCOL,
    "kinetics": kinetics.PROTOCOL,
}
"""How each is evaluated."""
NAMES = {"lvu": "LVU", "breakfast": "Breakfast", "coin": "COIN", "kinetics": "Kinetics"}
GIVE = {
    "lvu": "the folder lvu_1.0, or that of the task in it",
    "breakfast": "the folder with Breakfast's train.csv and test.csv",
    "coin": "COIN.json",
    "kinetics": "Kinetics' folder or a csv",
}
COIN_FILE = "COIN.json"
LVU_DURATIONS = "lvu_durations.csv"


def recognise(path: str) -> str:
    """Return the benchmark whose annotations a file or folder looks like; empty for none of those that are known."""
    if not storage.is_folder(path):
        head = storage.read_bytes(path)[:4096].decode("utf-8-sig", "replace")
        return "coin" if head.lstrip().startswith("{") else _of_header(head)
    if any(storage.is_folder(storage.join(path, task)) for task in lvu.TASKS):
        return "lvu"
    if storage.exists(storage.join(path, COIN_FILE)):
        return "coin"
    files = [storage.join(path, name) for name in kinetics.FILES]
    return next((recognise(file) for file in files if storage.exists(file)), "")


def _of_header(text: str) -> str:
    header = text.partition("\n")[0].strip()
    if header.split()[-2:] == ["youtube_id", "imdb_id"]:
        return "lvu"
    columns = {name.strip() for name in header.split(",")}
    if {"file_name", "action"} <= columns:
        return "breakfast"
    return "kinetics" if set(kinetics.COLUMNS) <= columns else ""


def annotations_of(benchmark: str, task: str, path: str) -> str:
    """Return the file or folder that a benchmark's reader takes, of what a user gave.

    Args:
        benchmark: one of `READERS`.
        task: of LVU.
        path: of LVU also the folder of all tasks, of COIN also that of its file.

    Raises:
        UserError: there is nothing, or annotations of another benchmark or task.
    """
    wanted = f"{NAMES[benchmark]}'s {task}" if task else f"{NAMES[benchmark]}'s"
    fault = ""
    if not storage.exists(path):
        fault = "there is no such file or folder"
    elif (found := recognise(path)) != benchmark:
        held = f"annotations of {NAMES[found]}" if found else "no annotations that are known"
        fault = f"it holds {held}, not {wanted}"
    elif benchmark == "lvu":
        name = storage.absolute(path).rstrip("/").rpartition("/")[2]
        path = path if name == task or name in lvu.TASKS else storage.join(path, task)
        if not storage.exists(path):
            fault = f"it holds LVU's annotations without task {task}"
        elif name in lvu.TASKS and name != task:
            fault = f"it holds annotations of LVU's {name}, not {wanted}"
    elif benchmark == "coin" and storage.is_folder(path):
        path = storage.join(path, COIN_FILE)
    if fault:
        raise UserError(f"annotations is {path!r}: {fault}; give {GIVE[benchmark]}")
    return path


def lengths_s(benchmark: str, annotations: Annotations, path: str) -> dict[str, float]:
    """Return the seconds of each video, or of the segment that is used, by id, as far as the annotations state them.

    Args:
        benchmark: one of `READERS`.
        annotations: what its reader returned.
        path: what its reader took; LVU's lengths are in a file beside the folders of its tasks.

    Raises:
        UserError: LVU's file is missing, or a length is no number.
    """
    if benchmark == "lvu":
        folder = storage.absolute(path).rstrip("/").rpartition("/")[0]
        if not storage.exists(storage.join(folder, LVU_DURATIONS)):
            raise UserError(
                f"annotations is {path!r}: a dry run needs {LVU_DURATIONS} beside that folder, with the lengths of the "
                "videos; give the folder lvu_1.0 or a task in it, or put the file there"
            )
        rows = AnnotationFile(folder, LVU_DURATIONS).rows(("videoid", "duration"))
        return {row.text["videoid"]: float(row.integer("duration", 1)) for row in rows}
    return {video.video_id: seconds for video in annotations.videos if (seconds := _length_s(video)) is not None}


def _length_s(video: AnnotatedVideo) -> float | None:
    return video.stated_s if video.end_s is None else video.end_s - (video.start_s or 0.0)
