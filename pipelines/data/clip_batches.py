"""Batches of clips decoded by Ray Data: rows of the clip order in, `ClipBatch`es out, for training and evaluation.

Each training worker runs its own Ray Data execution: one decode task reads a chunk of `clips_per_task` videos, tasks
run anywhere in the cluster, and batches come back in the clip order. A video that fails is retried once, then replaced
by its spares; the batch lists the failures with their reasons.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from ray.data import ExecutionOptions, ExecutionResources, TaskPoolStrategy
from ray.data.collate_fn import NumpyBatchCollateFn

from pipelines.config import DataConfig
from pipelines.data.clip_order import ClipOrder, OrderRows
from pipelines.data.decoding import known_timeouts
from pipelines.data.decoding.decode_tasks import CANDIDATE, ClipSpec, decode_chunk
from s5.batch import ClipBatch
from s5.config import ClipConfig, EvaluationProtocol, ViewsConfig
from s5.distributed import share_of
from s5.errors import Failure, VideoError
from s5.video.clip_times import clip_seed

SEGMENT_ROWS = 4096
"""Videos of one Ray Data execution: its first batch takes a second or two, and all its rows are built in advance."""
PART_BYTES = 128_000_000
"""Bytes of frames that a decode task of an evaluation returns, or one clip: a video may have hundreds of windows."""
CANDIDATE_COLUMNS = [field.name for field in CANDIDATE if field.name not in ("seed", "first_clip", "end_clip")]


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DecodedClips:
    """A `ClipSource` of frames that Ray Data's tasks decode; use it inside a process that Ray runs in."""

    clips: ClipConfig
    """Which frames."""
    frame_size: int
    """Height and width of a frame in pixels."""
    data: DataConfig
    """Chunk size, CPUs of a task, batches prefetched."""
    decode_tasks: int
    """Decode tasks that run at once for this worker."""
    protocol: EvaluationProtocol = "uniform"
    """Which clips of a video, but for pairs."""
    pairs: bool = False
    """Read a short clip beside each long one in training, in the same pass over the file."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Crops of clips in training."""
    rank: int = 0
    """This worker."""
    world_size: int = 1
    """Workers."""

    def training(self, videos: pa.Table, order: ClipOrder, seed: int, start_step: int = 0) -> Generator[ClipBatch]:
        """Yield this worker's batches of the order's steps; see `ClipSource.training`."""
        share = len(share_of(order.batch_size, self.rank, self.world_size))
        timeout_s = self.data.decode_timeout_s
        spec = ClipSpec(self.clips, self.frame_size, self.pairs, timeout_s, self.protocol, views=self.views)
        segment_steps = max(1, SEGMENT_ROWS // share)

        def segment(first: int) -> Generator[ClipBatch]:
            rows = order.rows(first, min(first + segment_steps, order.total_steps), self.rank, self.world_size)
            return _decoded(_training_rows(videos, rows, seed), spec, self.data, self.decode_tasks, share)

        starts = range(start_step, order.total_steps, segment_steps)
        batches = _chained([partial(segment, first) for first in starts], max(2, segment_steps // 8), segment_steps)
        for step, batch in enumerate(batches, start_step):
            if "" in batch.video_ids:
                tried = "; ".join(f"{failure.uri}: {failure.reason}" for failure in batch.failures)
                raise VideoError(f"step {step}: a video and all its spares fail ({tried})")
            yield replace(batch, step=step, epoch=step // order.steps_per_epoch, global_size=order.batch_size)

    def evaluation(self, videos: pa.Table, clips_per_video: int, batch_size: int) -> Generator[ClipBatch]:
        """Yield the clips of this worker's videos; see `ClipSource.evaluation`.

        Many clips of a video are read in parts of at most PART_BYTES, of which each fails alone; `inference.merge`
        leaves out the rest of that video.
        """
        mine = videos.select(CANDIDATE_COLUMNS).take(pa.array(np.arange(self.rank, len(videos), self.world_size)))
        if len(mine) == 0:
            return
        timeout_s = self.data.decode_timeout_s
        spec = ClipSpec(self.clips, self.frame_size, False, timeout_s, self.protocol, clips_per_video)
        rows, largest = _evaluation_rows(mine, spec)
        fit = max(1, PART_BYTES // (largest * spec.bytes_per_clip))
        data = replace(self.data, clips_per_task=min(self.data.clips_per_task, fit))
        for number, batch in enumerate(_decoded(rows, spec, data, self.decode_tasks, batch_size, largest)):
            yield replace(_without_failed(batch), step=number)


def _training_rows(manifest: pa.Table, rows: OrderRows, seed: int) -> pa.Table:
    """Return a table with one column, `candidates`: for each row, a list of its video and that video's spares."""
    video_RC = np.concatenate([rows.video[:, None], rows.spares], axis=1)
    counts_R = (video_RC >= 0).sum(axis=1)
    epochs = np.repeat(rows.epoch, counts_R)
    chosen = manifest.select(CANDIDATE_COLUMNS).take(pa.array(video_RC[video_RC >= 0])).combine_chunks()
    seeds = [
        clip_seed(seed, int(epoch), video_id)
        for epoch, video_id in zip(epochs, chosen["video_id"].to_pylist(), strict=True)
    ]
    whole = [None] * len(seeds)
    return _candidates(chosen, seeds, whole, whole, np.concatenate([[0], np.cumsum(counts_R)]))


def _candidates(
    videos: pa.Table,
    seeds: list[int],
    first_clips: Sequence[int | None],
    end_clips: Sequence[int | None],
    offsets: npt.NDArray[np.int64],
) -> pa.Table:
    columns = [videos[name].combine_chunks().cast(CANDIDATE.field(name).type) for name in CANDIDATE_COLUMNS]
    columns += [pa.array(values, pa.int64()) for values in (seeds, first_clips, end_clips)]
    structs = pa.StructArray.from_arrays(columns, fields=list(CANDIDATE))
    return pa.table({"candidates": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs)})


def _chained(segments: list[Callable[[], Iterator[ClipBatch]]], ahead: int, length: int) -> Generator[ClipBatch]:
    """Yield the batches of all segments; each starts in the background `ahead` batches before the one before ends."""
    with ThreadPoolExecutor(1, thread_name_prefix="clips") as pool:
        coming: Future[tuple[ClipBatch | None, Iterator[ClipBatch]]] | None = None
        for number, make in enumerate(segments):
            first, current = coming.result() if coming else _started(make)
            coming = None
            try:
                batch, delivered = first, 0
                while batch is not None:
                    delivered += 1
                    if coming is None and delivered >= length - ahead and number + 1 < len(segments):
                        coming = pool.submit(_started, segments[number + 1])
                    yield batch
                    batch = next(current, None)
            except BaseException:
                if coming is not None:
                    _close(coming.result()[1])
                raise
            finally:
                _close(current)


def _started(make: Callable[[], Iterator[ClipBatch]]) -> tuple[ClipBatch | None, Iterator[ClipBatch]]:
    iterator = make()
    return next(iterator, None), iterator


def _close(iterator: Any) -> None:
    """End a generator, which ends its Ray Data execution."""
    iterator.close()


# --- evaluation -----------------------------------------------------------------------------------------------------


def _evaluation_rows(videos: pa.Table, spec: ClipSpec) -> tuple[pa.Table, int]:
    """Return rows of one candidate for each part of a video, and the clips of the largest part."""
    most = max(1, PART_BYTES // spec.bytes_per_clip)
    parts: list[tuple[int, int, int]] = []
    for index, video in enumerate(videos.to_pylist()):
        try:
            clips = len(spec.times(video | {"first_clip": None, "end_clip": None}))
        except VideoError:
            # Too short for the clip: the task that reads it reports it.
            clips = 1
        parts += [(index, first, min(first + most, clips)) for first in range(0, clips, most)]
    indices, first_clips, end_clips = zip(*parts, strict=True)
    chosen = videos.take(pa.array(indices)).combine_chunks()
    rows = _candidates(chosen, [0] * len(parts), first_clips, end_clips, np.arange(len(parts) + 1))
    return rows, max(end - first for _, first, end in parts)


def _without_failed(batch: ClipBatch) -> ClipBatch:
    kept = [row for row, video_id in enumerate(batch.video_ids) if video_id]
    if len(kept) == len(batch.video_ids):
        return batch
    return replace(
        batch,
        video_ids=[batch.video_ids[row] for row in kept],
        long=batch.long[kept],
        seeds=batch.seeds[kept],
        labels=batch.labels[kept],
        targets=batch.targets[kept],
    )


# --- the execution --------------------------------------------------------------------------------------------------


def _decoded(
    rows: pa.Table, spec: ClipSpec, data: DataConfig, decode_tasks: int, batch_size: int, clips_per_row: int = 1
) -> Generator[ClipBatch]:
    """Run one Ray Data execution over rows of candidates and yield its batches in order."""
    chunk = data.clips_per_task
    dataset = in_chunks(rows, chunk)
    # Ray Data notices the end of a task 0.1 to 0.2 s late. Unless the user set the number, a quarter more tasks wait
    # inside Ray, which starts them at once.
    tasks = decode_tasks if data.decode_tasks else decode_tasks + -(-decode_tasks // 4)
    # Clips decoded ahead of training wait in the object store: room for twice these tasks and the prefetched batches,
    # rather than the share of the store that Ray Data would claim for each worker.
    ahead = tasks * chunk * clips_per_row + (data.prefetch_batches + 1) * batch_size
    limit(dataset, tasks * data.cpus_per_decode, max(256e6, 2 * ahead * spec.bytes_per_clip))
    decoded = dataset.map_batches(
        partial(decode_chunk, spec=spec),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=data.cpus_per_decode,
        # Also limits tasks that request no CPU.
        compute=TaskPoolStrategy(min(tasks, -(-len(rows) // chunk))),
    )
    batches: Any = decoded.iter_torch_batches(
        batch_size=batch_size,
        prefetch_batches=data.prefetch_batches,
        collate_fn=_Collate(),
        device="cpu",
    )
    yield from batches


def in_chunks(rows: pa.Table, chunk: int) -> ray.data.Dataset:
    """Return a data set with a block, and so a task, for each chunk of rows."""
    # Unlike from_arrow, this starts no tasks: those take a whole CPU each, which training workers may not leave free.
    dataset: ray.data.Dataset = ray.data.from_blocks([rows.slice(start, chunk) for start in range(0, len(rows), chunk)])
    return dataset


def limit(dataset: ray.data.Dataset, cpus: float, store_bytes: float | None = None) -> None:
    """Limit the resources of a data set's execution, preserve its order, and silence its progress output."""
    dataset.context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(cpu=cpus, object_store_memory=store_bytes)
    )
    if store_bytes is not None:
        # Otherwise Ray Data would stop decoding when half of the limit is in use.
        dataset.context.downstream_capacity_backpressure_ratio = None
    dataset.context.enable_progress_bars = False
    # Each execution logs two lines, and one that there are no progress bars.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


class _Collate(NumpyBatchCollateFn):
    """Make a `ClipBatch` of the columns of `decode_chunk`, on Ray Data's own threads."""

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> Any:
        # Arrow's memory is read-only and pins the object store: torch gets copies.
        tensors = {
            name: torch.from_numpy(np.array(batch[name]))
            for name in ("long", "short", "seed", "label", "target")
            if name in batch
        }
        failures = [Failure(**failure) for row in batch["failures"] for failure in json.loads(str(row))]
        known_timeouts.tell(failures)
        return ClipBatch(
            step=0,
            epoch=0,
            video_ids=[str(video_id) for video_id in batch["video_id"]],
            long=tensors["long"],
            short=tensors.get("short"),
            seeds=tensors["seed"],
            labels=tensors["label"],
            targets=tensors["target"],
            failures=failures,
        )
