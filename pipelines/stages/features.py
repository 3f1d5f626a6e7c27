"""Features stage: the frames of a manifest's videos, each encoded once by a frozen backbone (`data.features.cache`).

Copies of the backbone are actors of Ray Data. An actor makes whole shards: processes of its own read its videos in
chunks, some ahead, so that it holds a few chunks and never a video. Where segments are asked for, a whole video model
stands for the backbone, and the frames of a segment for one frame.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.exceptions

from pipelines import storage
from pipelines.config import FeaturesConfig
from pipelines.data.clip_batches import in_chunks, limit
from pipelines.data.decoding.decode_tasks import retried_once
from pipelines.data.decoding.video_process import VideoProcess
from pipelines.data.decoding.video_requests import ClipRequest
from pipelines.data.features.cache import (
    INDEX,
    FeatureMeta,
    FloatArray,
    backbone_settings,
    finish,
    finished_shards,
    frame_times,
    segment_times,
    shard_path,
    shard_writer,
)
from pipelines.data.features.encoding import Encoded, FrameEncoder, encode, on_host, store
from pipelines.data.manifest import digest, read_manifest
from pipelines.errors import StageError, last_line
from pipelines.running.resources import check_cluster, node_cpus
from pipelines.running.stage import Stage, finished, stage_run
from pipelines.stages import imported
from pipelines.stages.imported import summarise
from pipelines.storage.weights import segment_encoder, trained_backbone, weights_digest
from s5.errors import VideoError
from s5.models.segments import SegmentEncoder
from s5.video.reading import FrameArray

COLUMNS = ["video_id", "uri", "start_s", "end_s", "width", "height", "decoder"]
"""Columns of the manifest that encoding needs."""
STORED_AHEAD = 2
"""Encoded chunks that wait to be copied from the device and written."""


def run(config: FeaturesConfig) -> dict[str, Any]:
    """Encode all videos and return the stage's result; the same --out resumes.

    Raises:
        UserError: the manifest, the checkpoint, the settings and the cluster do not fit together; before any work.
        StageError: no video can be read, or encoding failed.
    """
    if config.import_:
        return imported.run(config)
    manifest = read_manifest(config.manifest)
    backbone: FrameEncoder
    if config.segment_s:
        backbone = segment_encoder(config.checkpoint)
    else:
        backbone = trained_backbone(config.model.backbone, config.checkpoint)
    meta = meta_of(config, backbone, digest(manifest))
    inputs = {"manifest": meta.manifest, "weights of the backbone": meta.weights}
    if (result := finished("features", config, inputs, redo="encode again")) is not None:
        return result
    decoders = decoders_each(config, check_cluster(config.scale, config.data), node_cpus())
    with stage_run("features", config, inputs=inputs) as stage:
        shards = -(-len(manifest) // config.shard_videos)
        done = finished_shards(stage.out)
        unit = f"segments of {config.segment_s:g} s" if config.segment_s else "frames"
        what = f"{meta.frames_per_second:g} {unit} a second, {meta.tokens} tokens of width {meta.width} each"
        stage.info(
            f"{len(manifest)} videos in {shards} shards, {what}, "
            f"{config.scale.num_workers} workers with {decoders} decoders each"
            + (f"; {len(done)} shards are there already" if done else "")
        )
        left = [shard for shard in range(shards) if shard not in done]
        stage.metrics["features/frames_per_second"] = encode_all(
            config, stage, meta, backbone, manifest, left, decoders
        )
        black = np.zeros((backbone.frames, *[backbone.config.frame_size] * 2, 3), np.uint8)
        index = finish(stage.out, meta, manifest, shards, on_host(encode(backbone, black, config.precision))[0])
        summarise(stage, index, meta, kept=len(done), strangers=[])
    return stage.result


def decoders_each(config: FeaturesConfig, tasks: int, nodes: list[float]) -> int:
    """Return how many of the decode tasks each worker has, at least one: it lies on one of the nodes with all of them.

    Args:
        config: workers, and CPUs of each and of a decode task.
        tasks: decode tasks that the whole cluster has CPUs for.
        nodes: CPUs of each node.
    """
    workers = config.scale.num_workers
    for decoders in range(tasks // workers, 1, -1):
        each = config.scale.cpus_per_worker + decoders * config.data.cpus_per_decode
        if sum(int(cpus / each + 1e-6) for cpus in nodes) >= workers:
            return decoders
    return 1


def meta_of(config: FeaturesConfig, backbone: FrameEncoder, manifest: str) -> FeatureMeta:
    """Return what the features are made from."""
    settings = config.model.backbone
    if isinstance(backbone, SegmentEncoder):
        weights = f"{weights_digest(backbone.model.state_dict())}, {backbone.frames} frames"
        settings = backbone.settings
    else:
        weights = weights_digest(backbone.vit.state_dict())
    return FeatureMeta(
        backbone=backbone_settings(settings),
        weights=weights,
        mean=backbone.mean.flatten().tolist(),
        std=backbone.std.flatten().tolist(),
        precision=config.precision,
        frames_per_second=1 / config.segment_s if config.segment_s else config.frames_per_second,
        manifest=manifest,
        tokens=backbone.tokens,
        width=backbone.width,
        chunk_frames=max(1, config.chunk_frames // backbone.frames),
    )


def encode_all(
    config: FeaturesConfig,
    stage: Stage,
    meta: FeatureMeta,
    backbone: FrameEncoder,
    manifest: pa.Table,
    shards: list[int],
    decoders: int,
) -> float:
    """Make the given shards, one Ray Data execution, and return the frames encoded a second."""
    started = time.monotonic()
    frames = 0

    try:
        with stage.progress_bar("encoded", len(shards), "shards") as bar:
            for index in encoded(config, stage.out, meta, backbone, manifest, shards, decoders):
                frames += sum(index["frames"].to_pylist())
                bar.advance(f"{frames} frames, {frames / (time.monotonic() - started):.1f} frames a second")
    except ray.exceptions.RayError as error:
        reason = last_line(str(error))
        raise StageError(f"encoding failed: {reason}; finished shards are kept, the same command resumes") from error
    return frames / (time.monotonic() - started)


def encoded(
    config: FeaturesConfig,
    out: str,
    meta: FeatureMeta,
    backbone: FrameEncoder,
    manifest: pa.Table,
    shards: list[int],
    decoders: int,
) -> Iterator[pa.Table]:
    """Make shards and yield the rows of the index of each, in order."""
    if not shards:
        return
    size = config.shard_videos
    numbered = manifest.select(COLUMNS).append_column("shard", pa.array(np.arange(len(manifest)) // size))
    # Only the last shard may have fewer videos, so that each of the others stays a chunk.
    dataset = in_chunks(pa.concat_tables([numbered.slice(shard * size, size) for shard in shards]), size)
    scale, cpus = config.scale, config.scale.cpus_per_worker + decoders * config.data.cpus_per_decode
    workers = min(scale.num_workers, len(shards))
    limit(dataset, workers * cpus)
    made = dataset.map_batches(
        Encoder,
        fn_constructor_args=(config, out, meta, ray.put(backbone), decoders),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=scale.gpus_per_worker or None,
    )
    tables: Any = made.iter_batches(batch_size=None, batch_format="pyarrow")
    yield from tables


class Encoder:
    """One copy of the backbone, with the processes that read frames for it, as an actor of Ray Data."""

    def __init__(self, config: FeaturesConfig, out: str, meta: FeatureMeta, backbone: Any, decoders: int) -> None:
        self.config, self.out, self.meta = config, out, meta
        self.backbone: FrameEncoder = ray.get(backbone) if isinstance(backbone, ray.ObjectRef) else backbone
        self.backbone.eval().to("cuda" if config.scale.gpus_per_worker else "cpu")
        self.pool = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
        self.ahead = 2 * decoders
        self.processes: SimpleQueue[VideoProcess] = SimpleQueue()
        for _ in range(decoders):
            self.processes.put(VideoProcess())

    def __call__(self, videos: pa.Table) -> pa.Table:
        """Make a shard of some rows of the manifest, and return its rows of the index."""
        shard = videos["shard"][0].as_py()
        rows = [
            {"video_id": video["video_id"], "uri": storage.redacted(video["uri"]), "shard": shard, "reason": ""}
            | {"start_s": video["start_s"], "batch": 0, "frames": 0}
            for video in videos.to_pylist()
        ]
        # One thread, so that a video's chunks are stored in order while the next one is encoded.
        with shard_writer(self.out, shard, self.meta) as writer, ThreadPoolExecutor(1, "store") as thread:
            stored: deque[Future[None]] = deque()
            for number, times_T, coming in self._read_ahead(videos.to_pylist(), rows):
                tokens = self._encoded(coming, rows[number])
                stored.append(thread.submit(store, writer, rows[number], times_T, tokens))
                if len(stored) > STORED_AHEAD:
                    stored.popleft().result()
            while stored:
                stored.popleft().result()
        index = pa.Table.from_pylist(rows, INDEX)
        storage.write_table(shard_path(self.out, shard, "parquet"), index)
        return index

    def _encoded(self, coming: Future[FrameArray], row: dict[str, Any]) -> Encoded | VideoError | None:
        """Tokens of a chunk, or why there are none; None of a video that has failed before."""
        try:
            frames = coming.result()
        except VideoError as error:
            return error
        return None if row["reason"] else encode(self.backbone, frames, self.config.precision)

    def _read_ahead(
        self, videos: list[dict[str, Any]], rows: list[dict[str, Any]]
    ) -> Iterator[tuple[int, FloatArray, Future[FrameArray]]]:
        """Yield a video's number, the times (T,) of a chunk and its frames to come; none more of one that failed."""
        window: deque[tuple[int, FloatArray, Future[FrameArray]]] = deque()
        for number, video in enumerate(videos):
            times = frame_times(video["start_s"], video["end_s"], self.meta.frames_per_second)
            for first in range(0, len(times), self.meta.chunk_frames):
                if rows[number]["reason"]:
                    break
                chunk = times[first : first + self.meta.chunk_frames]
                window.append((number, chunk, self.pool.submit(self._read, video, chunk)))
                if len(window) > self.ahead:
                    yield window.popleft()
        yield from window

    def _read(self, video: dict[str, Any], times_T: FloatArray) -> FrameArray:
        size = self.backbone.config.frame_size
        if self.config.segment_s:
            times_T = segment_times(times_T, self.config.segment_s, video["end_s"], self.backbone.frames)
        clips = ClipRequest([times_T], size, (video["width"], video["height"]), video["decoder"])
        process, timeout_s = self.processes.get(), self.config.data.decode_timeout_s
        try:
            return retried_once(partial(process.read, storage.absolute(video["uri"]), clips, timeout_s))[0]
        finally:
            self.processes.put(process)
