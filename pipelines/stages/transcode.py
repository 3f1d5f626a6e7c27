"""Stage `transcode`: re-encode a manifest's videos, small and in short groups of pictures: cheap to read.

OUT/videos/*/*.mp4      a file for each file of the manifest, named by the id of its first video; H.264 without sound
OUT/manifest.parquet    the same videos with the same ids, labels and times; other uri, width, height, codec and decoder
OUT/rejects.parquet     video_id, uri, reason of those that cannot be read to their end

Frames keep their times. It prints the bytes before and after, and measures the seconds that a clip pair takes to read.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pyarrow as pa
import ray

from pipelines import storage
from pipelines.config import TranscodeConfig
from pipelines.data.decoding.transcode_tasks import encode_chunk, pair_seconds
from pipelines.data.indexing.probing import in_tasks
from pipelines.data.manifest import MANIFEST, classes, description, digest, metadata, read_manifest, splits
from pipelines.errors import StageError
from pipelines.running.resources import ensure_ray
from pipelines.running.run_folder import VIDEOS
from pipelines.running.stage import Stage, finished, stage_run
from s5.errors import Failure
from s5.video.clip_times import stride_s

SHORTEST_GOP_S = 0.25
"""Seconds between two key frames, at least, where the clips decide: key frames are large."""
MEASURED_PAIRS = 3
"""Clip pairs that are timed of each measured video."""


def run(config: TranscodeConfig) -> dict[str, Any]:
    """Transcode what is not there yet and write the new manifest; the same --out resumes.

    Returns:
        The stage's result; counts of `videos`, `files`, those `kept` from an earlier start and `rejects`, and as
        metrics the bytes before and after and the seconds of a clip pair on one core.

    Raises:
        UserError: the manifest is none, no video can be read, or --out holds other work.
        StageError: new videos cannot be written.
    """
    manifest = read_manifest(config.manifest)
    inputs = {"manifest": digest(manifest)}
    if (result := finished("transcode", config, inputs, redo="transcode again")) is not None:
        return result
    ensure_ray()
    with stage_run("transcode", config, inputs=inputs) as stage:
        files = files_of(manifest, config, stage.path(VIDEOS))
        _remove_parts(stage)
        stage.info(f"{len(manifest)} videos in {len(files)} files, to a short side of {config.short_side}")
        made = encode_all(files, config, stage)
        table, rejects = new_manifest(manifest, files, made)
        stage.replace_rejects(rejects)
        if len(table) == 0:
            raise stage.none_readable()
        summarise(stage, made, len(table), len(rejects))
        measure(manifest, table, config, stage)
        stage.folder.write_table(MANIFEST, table)
        stage.counts |= splits(table)
        stage.info(f"{len(table)} of {len(manifest)} videos -> {stage.path(MANIFEST)}")
    return stage.result


def files_of(manifest: pa.Table, config: TranscodeConfig, folder: str) -> pa.Table:
    """Return what `encode_chunk` takes: a row for each file of a manifest, several of whose videos may share one."""
    rows: dict[str, dict[str, Any]] = {}
    for row in manifest.select(["uri", "video_id", "fps", "num_frames"]).to_pylist():
        if row["uri"] not in rows:
            gop_s = config.gop_s or max(SHORTEST_GOP_S, stride_s(config.clips, config.clips.short_stride, row["fps"]))
            rows[row["uri"]] = row | {"path": storage.join(folder, file_name(row["video_id"])), "gop_s": gop_s}
    return pa.Table.from_pylist(list(rows.values()))


def file_name(video_id: str) -> str:
    """Return the name of a video's new file, which any storage takes and no other video has; one of 256 folders."""
    digest = hashlib.blake2b(video_id.encode(), digest_size=8).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", video_id)[-60:].strip("_")
    return f"{digest[:2]}/{readable}-{digest}.mp4"


def _remove_parts(stage: Stage) -> None:
    """Delete what tasks that were killed have left half-written; on object stores there is none."""
    if not storage.is_uri(stage.out):
        for part in Path(stage.path(VIDEOS)).glob("*/.*.part"):
            part.unlink(missing_ok=True)


def encode_all(files: pa.Table, config: TranscodeConfig, stage: Stage) -> list[dict[str, Any]]:
    """Return the outcome of each file, in order: rows of `transcode_tasks.ENCODED`.

    Raises:
        StageError: a new video cannot be written.
    """
    work = partial(
        encode_chunk,
        short_side=config.short_side,
        quality=config.quality,
        speed=config.speed,
        timeout_s=config.data.decode_timeout_s,
    )
    made: list[dict[str, Any]] = []
    rejects = 0
    with stage.progress_bar("transcoded", len(files), "files") as bar:
        for row in in_tasks(files, work, config.data):
            if row["unwritable"]:
                raise StageError(
                    f"{row['unwritable']}: make room or repair the storage, and run the same command again"
                )
            made.append(row)
            rejects += bool(row["reason"])
            bar.advance(f"{rejects} rejects")
    return made


def new_manifest(manifest: pa.Table, files: pa.Table, made: list[dict[str, Any]]) -> tuple[pa.Table, list[Failure]]:
    """Return the manifest of the new files, and the videos of those that could not be read."""
    found = {file["uri"]: file | row for file, row in zip(files.to_pylist(), made, strict=True)}
    rows: list[dict[str, Any]] = []
    rejects: list[Failure] = []
    for video in manifest.to_pylist():
        file = found[video["uri"]]
        if file["reason"]:
            rejects.append(Failure(video["video_id"], video["uri"], file["reason"]))
        else:
            changed = {name: file[name] for name in ("width", "height", "codec", "decoder")}
            rows.append(video | changed | {"uri": file["path"]})
    about = metadata(classes(manifest), description(manifest))
    return pa.Table.from_pylist(rows, manifest.schema.with_metadata(about)), rejects


def summarise(stage: Stage, made: list[dict[str, Any]], videos: int, rejects: int) -> None:
    """Set the counts of the result and the bytes before and after, and print these."""
    done = [row for row in made if not row["reason"]]
    before, after = (sum(row[f"bytes_{when}"] for row in done) for when in ("before", "after"))
    stage.counts |= {"videos": videos, "files": len(done), "kept": sum(row["kept"] for row in done), "rejects": rejects}
    stage.metrics |= {"transcode/bytes_before": float(before), "transcode/bytes_after": float(after)}
    share = f", {after / before:.0%} of" if before else " against"
    stage.info(f"{after / 1e6:.1f} MB on disk{share} the {before / 1e6:.1f} MB before")


def measure(old: pa.Table, new: pa.Table, config: TranscodeConfig, stage: Stage) -> None:
    """Time clip pairs of a few videos from the old and the new files, in turn, on one core, and print both.

    Files were read before: what is timed is opening and decoding, not the storage.
    """
    if config.measured_videos == 0:
        return
    sample = new.to_pylist()[:: max(1, -(-len(new) // config.measured_videos))]
    earlier = {row["video_id"]: row for row in old.to_pylist()}
    pairs = [(earlier[row["video_id"]], row) for row in sample]
    clips = replace(config.clips, too_short="shrink")
    task: Any = ray.remote(num_cpus=config.data.cpus_per_decode)(pair_seconds)
    found = task.remote(pairs, clips, config.short_side, config.data.decode_timeout_s, MEASURED_PAIRS)
    seconds: list[tuple[float, float]] = ray.get(found)
    if not seconds:
        stage.info("warning: no clip pair could be read to measure what is gained")
        return
    before, after = fmean(first for first, _ in seconds), fmean(second for _, second in seconds)
    gain = median(first / second for first, second in seconds)
    stage.metrics |= {
        "transcode/pair_seconds_before": before,
        "transcode/pair_seconds_after": after,
        "transcode/pair_speedup": gain,
    }
    stage.info(
        f"clip pairs a second on one core, {len(seconds)} videos: {1 / after:.1f} against {1 / before:.1f} before; "
        f"median of the videos {gain:.1f} times as fast"
    )
