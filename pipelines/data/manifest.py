"""The manifest: a Parquet file with one row per video, which `index` writes and every later stage reads and checks."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.errors import UserError
from s5.config import ClipConfig
from s5.video.clip_times import fits, longest_stride_s

MANIFEST = "manifest.parquet"
SPLITS = ("train", "val", "test")
BenchmarkProtocol = Literal["", "windows", "whole", "multi-clip"]
"""How a data set is evaluated: all 60 s windows (LVU), one clip of the whole video, or several clips (Kinetics)."""

SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("dataset", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("class_name", pa.string()),
        pa.field("target", pa.float64()),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("duration_s", pa.float64(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("num_frames", pa.int64(), nullable=False),
        pa.field("width", pa.int64(), nullable=False),
        pa.field("height", pa.int64(), nullable=False),
        pa.field("codec", pa.string()),
        pa.field("decoder", pa.string()),
    ]
)
"""Columns: `start_s` and `end_s` bound the segment that is used of a video of `duration_s`; sizes are in pixels as
displayed; `decoder` is the one that reads the right frames (`s5.video.reading.choose`)."""
CLASSES = b"classes"
"""Key of the schema's metadata that holds the names of all classes, as JSON, in the order of their labels."""
DESCRIPTION = b"description"
"""Key of the schema's metadata that holds a `Description`, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """Where the videos of a manifest come from."""

    dataset: str = ""
    """Benchmark, such as `lvu`; empty for own data."""
    task: str = ""
    """Task of a benchmark that has several, such as `view_count`."""
    protocol: BenchmarkProtocol = ""
    """How the benchmark is evaluated; empty where the settings decide."""
    listed: dict[str, int] = field(default_factory=dict)
    """Number of videos that the annotations list, by split; the manifest has those that can be read."""


def read_manifest(path: str) -> pa.Table:
    """Return a manifest: a parquet file, or the one in the folder that `index` wrote.

    Raises:
        UserError: it is missing, is no manifest, lacks columns or has no rows.
    """
    name = storage.join(path, MANIFEST) if storage.is_folder(path) else path
    if not storage.exists(name):
        near = _nearby(name)
        hint = f"did you mean {near}?" if near else "run `python -m pipelines index` first, or give its --out"
        raise UserError(f"manifest is {path!r}: there is no such file; {hint}")
    try:
        table = storage.read_table(name)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"manifest is {path!r}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    missing = [column for column in SCHEMA.names if column not in table.column_names]
    if missing:
        raise UserError(f"manifest is {path!r}: the columns {', '.join(missing)} are missing; write it with `index`")
    if len(table) == 0:
        raise UserError(f"manifest is {path!r}: it has no videos; run `index` on a folder that has some")
    try:
        return table.select(SCHEMA.names).cast(SCHEMA.with_metadata(table.schema.metadata))
    except (pa.ArrowInvalid, ValueError) as error:
        raise UserError(f"manifest is {path!r}: a column has the wrong type ({error}); write it with `index`") from None


def digest(table: pa.Table) -> str:
    """Return a digest of a manifest's content: any change of order, labels or segments changes it."""
    sink = hashlib.blake2b(digest_size=12)
    for batch in table.replace_schema_metadata(None).combine_chunks().to_batches():
        sink.update(batch.serialize())
    sink.update(json.dumps(classes(table)).encode())
    if (about := description(table)).dataset:
        sink.update(json.dumps([about.dataset, about.task, about.protocol]).encode())
    return sink.hexdigest()


def splits(table: pa.Table) -> dict[str, int]:
    """Return the number of videos of each split that has any."""
    counts = {str(item["values"]): int(item["counts"]) for item in pc.value_counts(table["split"]).to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: SPLITS.index(item[0]) if item[0] in SPLITS else len(SPLITS)))


def split_of(table: pa.Table, split: str) -> pa.Table:
    """Return the rows of a split, perhaps none."""
    return table.filter(pc.equal(table["split"], split))


def classes(table: pa.Table) -> list[str]:
    """Return the names of all classes in the order of their labels, those without videos too; empty for none."""
    stored = (table.schema.metadata or {}).get(CLASSES)
    if stored is not None:
        return [str(name) for name in json.loads(stored)]
    labels = [label for label in table["label"].to_pylist() if label is not None]
    names = dict(zip(table["label"].to_pylist(), table["class_name"].to_pylist(), strict=True))
    return [str(names.get(label) or label) for label in range(max(labels) + 1)] if labels else []


def description(table: pa.Table) -> Description:
    """Return the description in a manifest; an empty one if it has none."""
    return Description(**json.loads((table.schema.metadata or {}).get(DESCRIPTION, b"{}")))


def metadata(names: list[str], about: Description) -> dict[bytes, bytes]:
    """Return the metadata of a manifest's schema: the names of all classes and the description."""
    return {CLASSES: json.dumps(names).encode(), DESCRIPTION: json.dumps(asdict(about)).encode()}


# --- checks before training -----------------------------------------------------------------------------------------


def check_for_training(
    table: pa.Table,
    clips: ClipConfig,
    batch_size: int,
    *,
    labelled: bool,
    task: Literal["class", "regression", "distant"] = "class",
) -> None:
    """Check a manifest against the settings of a training run.

    Args:
        table: the manifest.
        clips: clips to be read.
        batch_size: videos of the global batch.
        labelled: the training needs labels or targets.
        task: `class` needs labels, `regression` targets; `distant` has labels of its own.

    Raises:
        UserError: split train is empty or smaller than a batch, videos of train or val are too short, labels or targets
            are missing, or a class has a single video or none in train.
    """
    train = split_of(table, "train")
    if len(train) == 0:
        counts = ", ".join(f"{split} ({count})" for split, count in splits(table).items())
        raise UserError(f"the manifest has no videos in split train, only in {counts}; put some there and run `index`")
    for split in ("train", "val"):
        rows = split_of(table, split)
        if labelled and task != "distant":
            _check_labels(rows, "label" if task == "class" else "target")
        check_clips(rows, clips)
    if labelled and task == "class":
        _check_classes(table)
    usable = len(drop_too_short(train, clips))
    if usable < 2 and not labelled:
        raise UserError(f"split train has {usable} videos: contrastive learning needs at least 2; index more videos")
    if usable < batch_size:
        dropped = f" (and {len(train) - usable} that are too short)" if usable < len(train) else ""
        raise UserError(
            f"loop.batch_size is {batch_size}: split train has {usable} videos{dropped}; give at most {usable}"
        )


def check_clips(rows: pa.Table, clips: ClipConfig) -> None:
    """Raise `UserError` where videos are too short for a long clip and `too_short` is `error`, or `drop` drops all."""
    fits_R = _fits(rows, clips)
    if clips.too_short == "shrink" or fits_R.all() or (clips.too_short == "drop" and fits_R.any()):
        return
    short = int(np.flatnonzero(~fits_R)[0])
    duration_s = rows["end_s"][short].as_py() - rows["start_s"][short].as_py()
    raise UserError(
        f"clips.long_stride is {clips.long_stride:g} {clips.unit}: {int((~fits_R).sum())} of {len(rows)} videos of "
        f"split {rows['split'][short].as_py()} are shorter than {clips.frames} frames at that stride, such as "
        f"{rows['video_id'][short].as_py()!r} with {duration_s:.2f} s; {_stride_remedy(rows, clips)}"
        f"or set clips.too_short to {'drop or ' if fits_R.any() else ''}shrink"
    )


def drop_too_short(rows: pa.Table, clips: ClipConfig) -> pa.Table:
    """Return the rows that a long clip fits; all of them unless `too_short` is `drop`."""
    return rows.filter(pa.array(_fits(rows, clips), pa.bool_())) if clips.too_short == "drop" else rows


def _fits(rows: pa.Table, clips: ClipConfig) -> npt.NDArray[np.bool_]:
    lengths = zip(_duration_s(rows), rows["fps"].to_pylist(), strict=True)
    return np.array([fits(clips, duration_s, fps) for duration_s, fps in lengths], dtype=np.bool_)


def _duration_s(rows: pa.Table) -> list[float]:
    """Return the length of each video's segment in seconds."""
    return list(pc.subtract(rows["end_s"], rows["start_s"]).to_pylist())


def _check_labels(rows: pa.Table, column: str) -> None:
    lacking = rows.filter(pc.is_null(rows[column]))
    other, task = ("target", "regression") if column == "label" else ("label", "class")
    if len(lacking) == len(rows) and len(rows) and not rows[other].null_count:
        raise UserError(
            f"the videos of split {rows['split'][0].as_py()} have a {other} but no {column}: set task to {task}"
        )
    if len(lacking):
        remedy = "class folders or a csv column label" if column == "label" else "a csv column target"
        raise UserError(
            f"{len(lacking)} of {len(rows)} videos of split {lacking['split'][0].as_py()} have no {column}, such as "
            f"{lacking['video_id'][0].as_py()!r}; give `index` {remedy}"
        )


def _stride_remedy(rows: pa.Table, clips: ClipConfig) -> str:
    """Return the advice to lower the stride, with the longest that fits all videos; empty if no stride does."""
    strides = [
        longest_stride_s(clips, duration_s, fps) * (fps if clips.unit == "frames" else 1)
        for duration_s, fps in zip(_duration_s(rows), rows["fps"].to_pylist(), strict=True)
    ]
    longest = int(min(strides) * 1000) / 1000
    if longest <= 0:
        return "lower clips.frames, "
    also = " (and clips.short_stride)" if longest < clips.short_stride else ""
    return f"give at most {longest:g}{also}, lower clips.frames, "


def labelled(videos: pa.Table) -> pa.Table:
    """Return the rows that have a label."""
    return videos.filter(pc.is_valid(videos["label"]))


def spread(videos: pa.Table, most: int) -> pa.Table:
    """Return at most so many videos, every n-th of them: a manifest is sorted by class, and all are to be seen."""
    step = max(1, -(-len(videos) // max(1, most)))
    return videos.take(pa.array(np.arange(0, len(videos), step), pa.int64()))


def lone_classes(table: pa.Table) -> tuple[list[str], list[str]]:
    """Return the names of classes with a single video, and of those with several but none in split train."""

    def counts(rows: pa.Table) -> Counter[str]:
        return Counter(name for name in rows["class_name"].to_pylist() if name is not None)

    all_counts, learned = counts(table), counts(split_of(table, "train"))
    single = sorted(name for name, count in all_counts.items() if count == 1)
    return single, sorted(name for name, count in all_counts.items() if count > 1 and name not in learned)


def _check_classes(table: pa.Table) -> None:
    if description(table).dataset:
        # A benchmark fixes its classes even if many videos are no longer available; `index` warns of them.
        return
    single, unlearned = lone_classes(table)
    for name in single:
        video_id = table.filter(pc.equal(table["class_name"], name))["video_id"][0].as_py()
        raise UserError(
            f"class {name!r} has a single video, {video_id}: it cannot be both learned and tested; "
            "add videos of that class or leave it out, and run `index` again"
        )
    for name in unlearned:
        raise UserError(
            f"class {name!r} has videos, but none in split train: put some there or leave the class out, and run "
            "`index` again"
        )


def _nearby(name: str) -> str:
    """Return a parquet file with a similar name in the same folder, if any."""
    if storage.is_uri(name):
        return ""
    folder = Path(storage.absolute(name)).parent
    names = [str(path) for path in folder.glob("*.parquet")] if folder.is_dir() else []
    return next(iter(difflib.get_close_matches(storage.absolute(name), names, n=1, cutoff=0.5)), "")
