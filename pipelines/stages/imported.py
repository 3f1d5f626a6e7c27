"""Features of other programs, as `features --import` reads them: planned here, written by tasks of Ray Data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.exceptions

from pipelines.config import FeaturesConfig
from pipelines.data.clip_batches import limit
from pipelines.data.features.arrays import check_formats
from pipelines.data.features.cache import IMPORTED, FeatureMeta, finish, finished_shards
from pipelines.data.features.importing import common_shape, files_digest, import_shard, list_files, plan
from pipelines.data.manifest import digest, read_manifest
from pipelines.errors import StageError, last_line
from pipelines.running.resources import check_cluster
from pipelines.running.stage import Stage, finished, stage_run
from s5.errors import Failure


def run(config: FeaturesConfig) -> dict[str, Any]:
    """Import features and return the stage's result; the same --out resumes.

    Raises:
        UserError: the folder, the manifest and the settings do not fit together; before any work.
        StageError: no video has features that can be read.
    """
    manifest = read_manifest(config.manifest)
    files, others = list_files(config.import_, config.format)
    check_formats({file.format for file in files})
    inputs = {"manifest": digest(manifest), "set of feature files": files_digest(files)}
    if (result := finished("features", config, inputs, redo="import again")) is not None:
        return result
    rows, strangers = plan(manifest, files, config.import_, config.shard_gigabytes * 1e9)
    meta = meta_of(config, inputs, *common_shape(rows, config.import_))
    tasks = check_cluster(None, config.data)
    with stage_run("features", config, inputs=inputs) as stage:
        shards = int(rows["shard"][-1].as_py()) + 1
        done = finished_shards(stage.out)
        formats = ", ".join(f"{count} {name}" for name, count in Counter(file.format for file in files).items())
        stage.info(
            f"{len(rows)} videos in {shards} shards, files of features: {formats}"
            + (f", {others} others left out" if others else "")
            + f"; {meta.tokens} tokens of width {meta.width} a frame, by {config.backbone}"
            + (f"; {len(done)} shards are there already" if done else "")
        )
        left = [shard for shard in range(shards) if shard not in done]
        import_all(config, stage, meta, rows, left, tasks)
        # A clip that is longer than its video is filled with zeros, as in ViS4mer.
        index = finish(stage.out, meta, manifest, shards, np.zeros((meta.tokens, meta.width), np.float16))
        summarise(stage, index, meta, kept=len(done), strangers=strangers)
    return stage.result


def meta_of(config: FeaturesConfig, inputs: dict[str, str], tokens: int, width: int) -> FeatureMeta:
    """Return what the features are made from."""
    return FeatureMeta(
        backbone={"name": config.backbone},
        weights=IMPORTED + inputs["set of feature files"],
        mean=[],
        std=[],
        precision="",
        frames_per_second=config.frames_per_second,
        manifest=inputs["manifest"],
        tokens=tokens,
        width=width,
        chunk_frames=config.chunk_frames,
    )


def import_all(
    config: FeaturesConfig, stage: Stage, meta: FeatureMeta, rows: pa.Table, shards: list[int], tasks: int
) -> None:
    """Make the given shards, one Ray Data execution."""
    started, frames = time.monotonic(), 0
    try:
        with stage.progress_bar("imported", len(shards), "shards") as bar:
            for index in imported(config, stage.out, meta, rows, shards, tasks):
                frames += pc.sum(index["frames"]).as_py()
                bar.advance(f"{frames} frames, {frames / (time.monotonic() - started):.1f} frames a second")
    except ray.exceptions.RayError as error:
        reason = last_line(str(error))
        raise StageError(f"importing failed: {reason}; finished shards are kept, the same command resumes") from error
    stage.metrics["features/frames_per_second"] = frames / (time.monotonic() - started)


def imported(
    config: FeaturesConfig, out: str, meta: FeatureMeta, rows: pa.Table, shards: list[int], tasks: int
) -> Iterator[pa.Table]:
    """Make shards and yield the rows of the index of each, in order."""
    if not shards:
        return
    firsts = np.flatnonzero(np.diff(rows["shard"].to_numpy(), prepend=-1))
    stops = [*firsts[1:], len(rows)]
    dataset = ray.data.from_blocks([rows.slice(firsts[shard], stops[shard] - firsts[shard]) for shard in shards])
    limit(dataset, tasks * config.data.cpus_per_decode)
    made = dataset.map_batches(
        import_shard,
        fn_kwargs={"out": out, "meta": meta},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=config.data.cpus_per_decode,
    )
    tables: Any = made.iter_batches(batch_size=None, batch_format="pyarrow")
    yield from tables


def summarise(stage: Stage, index: pa.Table, meta: FeatureMeta, kept: int, strangers: list[Failure]) -> None:
    """Set the counts of the result, list what could not be read and files of no video, and print both.

    Raises:
        StageError: no video could be read.
    """
    rows = index.to_pylist()
    failures = [Failure(row["video_id"], row["uri"], row["reason"]) for row in rows if row["reason"]]
    stage.replace_rejects(failures + strangers)
    if len(failures) == len(rows):
        raise StageError(
            f"none of the {len(rows)} videos can be read, as {failures[0].video_id!r}: {failures[0].reason}"
        )
    videos, frames = len(rows) - len(failures), sum(row["frames"] for row in rows)
    gigabytes = frames * meta.tokens * meta.width * 2 / 1e9
    stage.counts |= {"videos": videos, "rejects": len(failures), "frames": frames}
    stage.counts |= {"shards_kept": kept, "strangers": len(strangers)}
    stage.metrics |= {"features/gigabytes": gigabytes}
    files = f", {len(strangers)} files of no video" if strangers else ""
    stage.info(f"{frames} frames of {videos} videos, {gigabytes:.2f} GB, {len(failures)} rejects{files} -> {stage.out}")
