"""Stage `index`: probe videos into a manifest.

VIDEOS/[{train,val,test}/][CLASS/]name.mp4     or any layout with a csv: video[,label,target,split,start_s,end_s]
OUT/manifest.parquet                           one row a video that decodes (see manifest.py)
OUT/rejects.parquet                            video_id, uri, reason of every other
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pipelines import storage
from pipelines.clips import in_chunks, limit
from pipelines.cluster import ensure_ray, resources
from pipelines.config import DataConfig, IndexConfig, UserError, unknown
from pipelines.decode import probe_chunk
from pipelines.manifest import CLASSES, MANIFEST, SCHEMA, SPLITS, splits
from pipelines.stage import REJECTS, Stage, stage_run
from s5.video import Failure

EXTENSIONS = ("mp4", "avi", "mkv", "mov", "webm", "m4v", "mpg", "mpeg", "ts", "wmv", "flv", "ogv", "3gp")
"""Endings of the files that are taken for videos."""
COLUMNS = ("video", "label", "target", "split", "start_s", "end_s")
"""Columns that a csv may have; the first it must have."""
MAX_LABEL = 1000
"""Numbers in a csv from here on, such as years, are names of classes rather than labels."""
FIRST_REASONS = 3
"""Reasons told where no video can be read."""
PROGRESS_S = 10.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Listed:
    """A video as the folder or the csv has it; empty or None where neither says anything."""

    video_id: str
    name: str
    """Path below the folder."""
    uri: str
    split: str = ""
    class_name: str | None = None
    target: float | None = None
    start_s: float | None = None
    end_s: float | None = None
    reason: str = ""
    """Why it is rejected before it is probed."""


def run(config: IndexConfig) -> dict[str, Any]:
    """Probe all videos and write the manifest and the rejects.

    Returns:
        The stage's result; counts of `videos`, `rejects`, `ignored` files and the videos of each split.

    Raises:
        UserError: there are no videos, none can be read, or the csv is wrong.
    """
    listed, ignored = list_videos(config)
    ensure_ray()
    with stage_run("index", config) as stage:
        names = class_names(listed, numbered=bool(config.annotations))
        stage.progress(f"{len(listed)} videos in {len(names)} classes below {config.videos}; {ignored} other files")
        rows, rejects = probe_all(listed, config.data, stage)
        storage.remove(stage.path(REJECTS))
        stage.reject(rejects)
        if not rows:
            storage.remove(stage.path(MANIFEST))
            reasons = "; ".join(f"{reject.video_id!r}: {reject.reason}" for reject in rejects[:FIRST_REASONS])
            raise UserError(f"none of the {len(rejects)} videos can be read ({reasons}); see {stage.path(REJECTS)}")
        table = manifest_of(rows, names, config)
        storage.write_table(stage.path(MANIFEST), table)
        _tell(stage, table, len(rejects), ignored)
    return stage.result


def _tell(stage: Stage, table: pa.Table, rejects: int, ignored: int) -> None:
    counts = splits(table)
    stage.counts |= {"videos": len(table), "rejects": rejects, "ignored": ignored, **counts}
    hours = sum(table["duration_s"].to_pylist()) / 3600
    stage.metrics |= {"index/videos": float(len(table)), "index/rejects": float(rejects), "index/hours": hours}
    for name, count in Counter(table["class_name"].to_pylist()).items():
        if name is not None and count == 1:
            stage.progress(f"warning: class {name!r} has a single video, which cannot be both learnt and tested")
    shares = ", ".join(f"{split} {count}" for split, count in counts.items())
    stage.progress(f"{len(table)} videos ({shares}), {hours:.2f} hours, {rejects} rejects -> {stage.path(MANIFEST)}")


# --- listing --------------------------------------------------------------------------------------------------------


def list_videos(config: IndexConfig) -> tuple[list[Listed], int]:
    """Return the videos of the folder or the csv by id, and the number of the folder's other files.

    Raises:
        UserError: the folder or csv is missing or has no videos, or the csv is wrong.
    """
    files, ignored = _video_files(config.videos)
    if config.annotations:
        listed = _from_csv(config, files)
        where = f"annotations is {config.annotations!r}: it lists no videos"
        ignored += len(set(files) - {video.name for video in listed})
    else:
        listed = [_from_folder(name, video_id, config.videos) for name, video_id in _ids(files).items()]
        where = f"videos is {config.videos!r}: no videos below it"
    if not listed:
        raise UserError(f"{where}; looked for files that end in {', '.join(EXTENSIONS)}")
    return sorted(listed, key=lambda video: video.video_id), ignored


def _video_files(folder: str) -> tuple[list[str], int]:
    """Return the names of a folder's video files and the number of other files; hidden ones are neither."""
    if not storage.is_folder(folder):
        raise UserError(f"videos is {folder!r}: there is no such folder")
    system, inner = storage.filesystem(folder)
    infos = system.get_file_info(fs.FileSelector(inner, recursive=True))
    files = [info.path.removeprefix(inner.rstrip("/") + "/") for info in infos if info.type == fs.FileType.File]
    visible = [name for name in files if not any(part.startswith(".") for part in name.split("/"))]
    videos = sorted(name for name in visible if name.rpartition(".")[2].lower() in EXTENSIONS)
    return videos, len(visible) - len(videos)


def _ids(files: list[str]) -> dict[str, str]:
    """Return the id of each file: its name without the ending, where no two are the same."""
    stems = Counter(name.rpartition(".")[0] for name in files)
    return {name: stem if stems[stem := name.rpartition(".")[0]] == 1 else name for name in files}


def _from_folder(name: str, video_id: str, folder: str) -> Listed:
    split, _, rest = name.partition("/")
    if split not in SPLITS or not rest:
        split, rest = "", name
    class_name, _, below = rest.partition("/")
    return Listed(video_id, name, storage.join(storage.absolute(folder), name), split, class_name if below else None)


def _from_csv(config: IndexConfig, files: list[str]) -> list[Listed]:
    where = f"annotations is {config.annotations!r}"
    if not storage.exists(config.annotations):
        raise UserError(f"{where}: there is no such file")
    try:
        text = storage.read_bytes(config.annotations).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where}: not a text file in UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = [name.strip() for name in reader.fieldnames or []]
    for name in header:
        if name not in COLUMNS:
            raise UserError(f"{where}: {unknown('column', name, COLUMNS)}")
    if "video" not in header:
        raise UserError(f"{where}: the column video is missing; the first line must name the columns, with commas")
    reader.fieldnames = header
    ids, listed, lines = _ids(files), list[Listed](), dict[str, int]()
    for row in reader:
        video = _from_line(row, reader.line_num, where, config.videos, ids)
        if video.video_id in lines:
            raise UserError(
                f"{where}: line {reader.line_num} lists {row['video']!r} again (line {lines[video.video_id]})"
            )
        lines[video.video_id] = reader.line_num
        listed.append(video)
    return listed


def _from_line(row: dict[str, Any], line: int, where: str, folder: str, ids: dict[str, str]) -> Listed:
    """Return the video of one line of a csv; a video may be listed several times with different stretches."""
    if None in row or None in row.values():
        raise UserError(f"{where}: line {line} has not as many fields as the header")
    text = {key: value.strip() for key, value in row.items()}
    name, split = text["video"], text.get("split", "")
    if not name:
        raise UserError(f"{where}: line {line} names no video")
    if split and split not in SPLITS:
        raise UserError(f"{where}: line {line} has the split {split!r}; give {', '.join(SPLITS)} or nothing")
    target, start_s, end_s = (_number(text.get(key, ""), key, line, where) for key in ("target", "start_s", "end_s"))
    video_id = ids.get(name, name)
    if start_s is not None or end_s is not None:
        video_id += f"@{start_s or 0:g}-{'' if end_s is None else f'{end_s:g}'}"
    return Listed(
        video_id=video_id,
        name=name,
        uri=storage.join(storage.absolute(folder), name),
        split=split,
        class_name=text.get("label") or None,
        target=target,
        start_s=start_s,
        end_s=end_s,
        reason="" if name in ids else "file not found",
    )


def _number(text: str, column: str, line: int, where: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf") or (column != "target" and value < 0):
        raise UserError(
            f"{where}: line {line} has {column} {text!r}; give a number{'' if column == 'target' else ' >= 0'}"
        )
    return value


def class_names(listed: list[Listed], numbered: bool) -> list[str]:
    """Return the names of the classes in the order of their labels, over all splits: sorted.

    A csv whose labels are all numbers below MAX_LABEL gives the labels themselves (`numbered`): they stay what they
    are, and one that no video has keeps its place.
    """
    names = sorted({video.class_name for video in listed if video.class_name is not None})
    if numbered and names and all(name.isdecimal() and str(int(name)) == name for name in names):
        count = max(map(int, names)) + 1
        return [str(label) for label in range(count)] if count <= MAX_LABEL else names
    return names


# --- probing --------------------------------------------------------------------------------------------------------


def probe_all(listed: list[Listed], data: DataConfig, stage: Stage) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Return a row for each video that can be read (its facts and what was listed) and the others, each in order."""
    rows: list[dict[str, Any]] = []
    rejects: list[Failure] = []
    started = told = time.monotonic()
    for done, (video, facts) in enumerate(zip(listed, _probed(listed, data), strict=True), start=1):
        reason = video.reason or facts["reason"] or _stretch_fault(video, facts["duration_s"])
        if reason:
            rejects.append(Failure(video.video_id, video.uri, reason))
        else:
            rows.append(facts | asdict(video))
        if time.monotonic() - told > PROGRESS_S or done == len(listed):
            told = time.monotonic()
            rate = done / (told - started)
            stage.progress(f"probed {done} of {len(listed)} videos, {rate:.1f} a second, {len(rejects)} rejects")
    return rows, rejects


def _stretch_fault(video: Listed, duration_s: float) -> str:
    start_s, end_s = video.start_s or 0.0, duration_s if video.end_s is None else video.end_s
    if start_s >= duration_s:
        return f"start_s {start_s:g} lies beyond the end of the video ({duration_s:.2f} s)"
    return f"end_s {end_s:g} is not after start_s {start_s:g}" if end_s <= start_s else ""


def _probed(listed: list[Listed], data: DataConfig) -> Iterator[dict[str, Any]]:
    """Yield the facts of each video in order, or the reason why there are none; one Ray Data execution."""
    cpus = resources().get("CPU", 0.0)
    if data.cpus_per_decode > cpus:
        raise UserError(f"data.cpus_per_decode is {data.cpus_per_decode:g}: the cluster has {cpus:g} CPUs; lower it")
    # null: not to be opened.
    table = pa.table({"uri": pa.array([None if video.reason else video.uri for video in listed], pa.string())})
    tasks = data.decode_tasks or int(cpus / data.cpus_per_decode)
    dataset = in_chunks(table, data.clips_per_task)
    limit(dataset, tasks * data.cpus_per_decode)
    probed = dataset.map_batches(probe_chunk, batch_size=None, batch_format="pyarrow", num_cpus=data.cpus_per_decode)
    batches: Any = probed.iter_batches(batch_size=None, batch_format="pyarrow")
    for batch in batches:
        yield from batch.to_pylist()


# --- the manifest ---------------------------------------------------------------------------------------------------


def manifest_of(rows: list[dict[str, Any]], names: list[str], config: IndexConfig) -> pa.Table:
    """Return the manifest's table: labels by class name, stretches cut to the video, videos held out."""
    labels = {name: label for label, name in enumerate(names)}
    dataset = config.dataset or storage.absolute(config.videos).rstrip("/").rpartition("/")[2]
    for row in rows:
        name = row["class_name"]
        row |= {"dataset": dataset, "label": None if name is None else labels[name]}
        row |= {"start_s": row["start_s"] or 0.0, "end_s": min(row["end_s"] or row["duration_s"], row["duration_s"])}
    shares = {"val": config.val_share, "test": config.test_share}
    present = {row["split"] for row in rows}
    hold_out(rows, {split: share for split, share in shares.items() if split not in present}, config.seed)
    for row in rows:
        row["split"] = row["split"] or "train"
    metadata = {CLASSES: json.dumps(names).encode()}
    return pa.Table.from_pylist(rows, SCHEMA.with_metadata(metadata))


def hold_out(rows: list[dict[str, Any]], shares: dict[str, float], seed: int) -> None:
    """Move shares of each class's training videos to other splits, chosen by hash; one stays for training."""

    def place(row: dict[str, Any]) -> bytes:
        return hashlib.blake2b(f"{seed}/{row['video_id']}".encode()).digest()

    by_class: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        if row["split"] in ("", "train"):
            by_class.setdefault(row["class_name"], []).append(row)
    for members in by_class.values():
        spread = iter(sorted(members, key=place)[:-1])
        for split, share in shares.items():
            for row in islice(spread, round(len(members) * share)):
                row["split"] = split
