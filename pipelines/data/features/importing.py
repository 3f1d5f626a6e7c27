"""Foreign features: one file a video, found by the video's name, checked, and written as cached features.

Shapes: T frames, N tokens a frame, D width.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from pipelines import storage
from pipelines.data.features.arrays import FORMATS, open_array
from pipelines.data.features.cache import INDEX, FeatureMeta, ShardWriter, shard_path, shard_writer
from pipelines.errors import UserError
from s5.errors import Failure, VideoError
from s5.video.clip_times import TOLERANCE_S

ENDINGS = {f".{name}": name for name in FORMATS} | {".pth": "pt", ".hdf5": "h5"}
FRAMES, SHARE = 2, 0.02
"""Frames, and share of the length, by which features may be shorter or longer than their video."""
SHARD_FILES = 4096
"""Most videos of a shard, however small their files are."""
PROBED = 9
"""Files whose shapes say what the others should have."""
COLUMNS = ["video_id", "uri", "start_s", "end_s", "duration_s"]
ROWS = pa.schema(
    [
        *((name, pa.string()) for name in ("video_id", "uri", "path", "format", "reason")),
        *((name, pa.float64()) for name in ("start_s", "end_s", "duration_s")),
        ("shard", pa.int64()),
    ]
)
"""What a task imports: a row per video of the manifest, with its file, or with the reason why it has none."""


@dataclass(frozen=True)
class FeatureFile:
    """A file of features."""

    path: str
    name: str
    """Its path below the folder, without its ending."""
    format: str
    size: int
    changed: int
    """Time of its last change in nanoseconds."""


def list_files(folder: str, file_format: str) -> tuple[list[FeatureFile], int]:
    """Return the files of features below a folder, by name, and how many others there are.

    Args:
        folder: the folder.
        file_format: what all of them are, or `auto` for what their endings say.

    Raises:
        UserError: there are none.
    """
    root = storage.absolute(folder)
    endings = {k: v for k, v in ENDINGS.items() if file_format in ("auto", v)}
    found, others = [], 0
    for path, size, changed in _walk(root):
        stem, ending = os.path.splitext(path)
        if ending.lower() in endings:
            name = stem.removeprefix(root.rstrip("/") + "/")
            found.append(FeatureFile(path, name, endings[ending.lower()], size, changed))
        else:
            others += 1
    if not found:
        raise UserError(f"import is {folder!r}: no file below it ends in {', '.join(endings)}; give one with features")
    return sorted(found, key=lambda file: file.path), others


def _walk(root: str) -> Iterator[tuple[str, int, int]]:
    """Yield path, size and time of change of each file below a folder."""
    system, inner = storage.filesystem(root)
    prefix = root.removesuffix(inner) if storage.is_uri(root) else ""
    for info in system.get_file_info(fs.FileSelector(inner, recursive=True)):
        if info.type == fs.FileType.File:
            yield prefix + info.path, info.size, info.mtime_ns or 0


def files_digest(files: list[FeatureFile]) -> str:
    """Return a digest of files, by their names, sizes and times of change."""
    sink = hashlib.blake2b(digest_size=12)
    for file in files:
        sink.update(f"{file.name} {file.format} {file.size} {file.changed}\n".encode())
    return sink.hexdigest()


def plan(
    manifest: pa.Table, files: list[FeatureFile], folder: str, shard_bytes: float
) -> tuple[pa.Table, list[Failure]]:
    """Return a row of ROWS per video, in shards of about so many bytes, and the files that belong to no video."""
    hits, videos_of = match(manifest["video_id"].to_pylist(), manifest["uri"].to_pylist(), files)
    rows: list[dict[str, Any]] = []
    shard, filled, count = 0, 0.0, 0
    for video, hit in zip(manifest.select(COLUMNS).to_pylist(), hits, strict=True):
        reason = _mismatch(video, hit, folder, videos_of)
        size = 0 if reason else hit[0].size
        if count and (filled + size > shard_bytes or count >= SHARD_FILES):
            shard, filled, count = shard + 1, 0.0, 0
        filled, count = filled + size, count + 1
        place = {"path": "", "format": ""} if reason else {"path": hit[0].path, "format": hit[0].format}
        rows.append(video | place | {"reason": reason, "shard": shard})
    unused = [file for file in files if file.path not in videos_of]
    strangers = [
        Failure(file.name, storage.redacted(file.path), "a file of no video of the manifest") for file in unused
    ]
    return pa.Table.from_pylist(rows, ROWS), strangers


def match(
    ids: list[str], uris: list[str], files: list[FeatureFile]
) -> tuple[list[list[FeatureFile]], dict[str, set[str]]]:
    """Return the files that may be of each video, and the uris of the videos that each file, by its path, may be of.

    A file's name is a video's id; or else it ends as the path of the video's own file does, in as many folders as
    possible; or else in its id; or else in the bare name of its file. What fits one video better is not another's.
    """
    named: dict[str, list[FeatureFile]] = defaultdict(list)
    for file in files:
        name, more = file.name, "/"
        while more:
            named[name].append(file)
            _, more, name = name.partition("/")
    hits: list[list[FeatureFile]] = [[] for _ in ids]
    videos_of: dict[str, set[str]] = defaultdict(set)
    left = list(range(len(ids)))

    def search(name_of: Callable[[int], str], whole: bool = False) -> None:
        for row in left:
            fit = [file for file in named.get(name_of(row), ()) if file.name == name_of(row) or not whole]
            hits[row] = [file for file in fit if file.path not in videos_of or uris[row] in videos_of[file.path]]
        # Only then, so that videos which a file fits as well both have it.
        for row in left:
            for file in hits[row]:
                videos_of[file.path].add(uris[row])
        left[:] = [row for row in left if not hits[row]]

    search(lambda row: ids[row], whole=True)
    for folders in range(max(file.name.count("/") for file in files), 0, -1):
        search(lambda row, folders=folders: _last_parts(uris[row], folders))  # type: ignore[misc]
    search(lambda row: ids[row])
    search(lambda row: _last_parts(uris[row], 0))
    return hits, videos_of


def _last_parts(uri: str, folders: int) -> str:
    """Return the name of a file without its ending, with so many folders before it; empty where it has fewer."""
    parts = os.path.splitext(uri)[0].rsplit("/", folders + 1)[-folders - 1 :]
    return "/".join(parts) if len(parts) > folders else ""


def _mismatch(video: dict[str, Any], files: list[FeatureFile], folder: str, videos_of: dict[str, set[str]]) -> str:
    """Say why a video has no file of its own; empty where it has one."""
    if not files:
        return f"it has no file of features below {storage.redacted(folder)}"
    names = ", ".join(storage.redacted(file.path) for file in files[:3])
    if len({file.name for file in files}) < len(files):
        return f"it has {len(files)} files of features ({names}): say by --format which endings count, or rename others"
    if len(files) > 1:
        return f"it has {len(files)} files of features ({names}): name them by the ids of their videos"
    if (others := len(videos_of[files[0].path])) > 1:
        return f"{names} may be of any of {others} videos: name it by the id of its video"
    return ""


def common_shape(rows: pa.Table, folder: str) -> tuple[int, int]:
    """Return tokens N and width D that most of the first files have.

    Raises:
        UserError: no video has a file, or none of these files can be read; gives the reason of the first.
    """
    shapes: Counter[tuple[int, int]] = Counter()
    reasons = []
    with_files = rows.filter(pc.equal(rows["reason"], ""))
    for row in with_files.slice(0, PROBED).to_pylist():
        try:
            with open_array(row["path"], row["format"]) as array:
                shapes[array.shape[1:]] += 1
        except VideoError as error:
            reasons.append(f"{storage.redacted(row['path'])}: {error}")
    if not shapes:
        first = f"{rows['video_id'][0].as_py()!r}: {rows['reason'][0].as_py()}"
        why = f"no file can be read, as {reasons[0]}" if reasons else f"no video has a file of its own, as {first}"
        raise UserError(f"import is {folder!r}: {why}; give files that are named by the ids of videos")
    return shapes.most_common(1)[0][0]


# --- tasks ----------------------------------------------------------------------------------------------------------


def import_shard(rows: pa.Table, out: str, meta: FeatureMeta) -> pa.Table:
    """Write a shard from rows of ROWS, and return its rows of the index."""
    shard = rows["shard"][0].as_py()
    index = []
    with shard_writer(out, shard, meta) as writer:
        for video in rows.to_pylist():
            row = {"video_id": video["video_id"], "uri": storage.redacted(video["uri"]), "shard": shard}
            row |= {"start_s": video["start_s"], "batch": 0, "frames": 0, "reason": video["reason"]}
            if not row["reason"]:
                try:
                    row |= _import(video, writer, meta)
                except VideoError as error:
                    # What is written of it by now stays in the shard, and nothing points there.
                    row["reason"] = storage.redacted(str(error))
            index.append(row)
    table = pa.Table.from_pylist(index, INDEX)
    storage.write_table(shard_path(out, shard, "parquet"), table)
    return table


def _import(video: dict[str, Any], writer: ShardWriter, meta: FeatureMeta) -> dict[str, Any]:
    """Write the frames of a video's segment; return where they are."""
    with open_array(video["path"], video["format"]) as array:
        if array.shape[1:] != (meta.tokens, meta.width):
            raise VideoError(
                f"its features are of {array.shape[1]} tokens of width {array.shape[2]}, those of most others of "
                f"{meta.tokens} tokens of width {meta.width}"
            )
        first, stop, start_s = segment_frames(video, array.shape[0], meta.frames_per_second)
        batch = writer.batches
        times_T = start_s + np.arange(stop - first) / meta.frames_per_second
        for begin in range(first, stop, meta.chunk_frames):
            end = min(begin + meta.chunk_frames, stop)
            writer.add(times_T[begin - first : end - first], array.tokens(begin, end))
    return {"batch": batch, "frames": stop - first, "start_s": start_s}


def segment_frames(video: dict[str, Any], frames: int, frames_per_second: float) -> tuple[int, int, float]:
    """Return the first frame of a video's segment, the one after its last, and the time of the first in the video.

    Frame k of features of the whole video is the one at k / frames_per_second; otherwise they are of the segment. Where
    they may be of either, they are of the one whose length is closer, and of the whole video where both are as close.

    Raises:
        VideoError: the features are neither of the whole video nor of its segment; see `FRAMES` and `SHARE`.
    """
    start_s, end_s, whole_s = video["start_s"], video["end_s"], video["duration_s"]

    def off_s(length_s: float) -> float:
        """How far the features are off a length; infinite where they cannot have it."""
        off = abs(frames / frames_per_second - length_s)
        return off if off <= FRAMES / frames_per_second + SHARE * length_s else math.inf

    whole_off_s, segment_off_s = off_s(whole_s), off_s(end_s - start_s)
    if whole_off_s < math.inf and whole_off_s <= segment_off_s + TOLERANCE_S:
        first = min(math.floor((start_s + TOLERANCE_S) * frames_per_second), frames - 1)
        last = frames if end_s >= whole_s - TOLERANCE_S else math.ceil((end_s - TOLERANCE_S) * frames_per_second)
        return first, max(first + 1, min(last, frames)), first / frames_per_second
    if segment_off_s < math.inf:
        return 0, frames, start_s
    segment = "" if end_s - start_s >= whole_s - TOLERANCE_S else f" (its segment {end_s - start_s:g} s)"
    raise VideoError(
        f"its {frames} frames are {frames / frames_per_second:g} s at {frames_per_second:g} frames a second, but the "
        f"video is {whole_s:g} s long{segment}"
    )
