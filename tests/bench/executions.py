"""Ray Data for many workers: an execution for each of them, as in training, against one execution for all.

    make bench-executions [ARGS="--workers 1 2 4 8 --rounds 3"]

Workers are actors that take batches as fast as they come, so that what is around decoding shows: clips are tiny. The
number of decode tasks is the same in all cases. With one execution an actor reads batches for all workers and hands
each its share, as Ray's `streaming_split` does, in the exact order of the clip order.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator
from statistics import median
from typing import Any

import pyarrow as pa
import ray
import torch

from pipelines.config import DataConfig, IndexConfig, SampleConfig, TrackingConfig
from pipelines.data.clip_batches import DecodedClips
from pipelines.data.clip_order import ClipOrder
from pipelines.data.manifest import read_manifest
from pipelines.stages import index, sample
from s5.batch import ClipBatch
from s5.config import ClipConfig
from tests.bench.data import start_ray
from tests.bench.processes import cpu_seconds, cpu_seconds_since
from tests.bench.record import Row, write

PAIRS = 4
"""Pairs of a worker's batch."""
TASKS = 8
"""Decode tasks in all."""
WARM, STEPS, AHEAD = 4, 24, 2
CLIPS = ClipConfig(frames=4, long_stride=1.0, short_stride=0.25)


def batches(manifest: pa.Table, workers: int, rank: int, world_size: int) -> Generator[ClipBatch]:
    """Yield one reader's batches of an order for so many workers."""
    order = ClipOrder(len(manifest), PAIRS * workers, 0, seed=0, steps=WARM + STEPS)
    source = DecodedClips(
        clips=CLIPS,
        frame_size=64,
        data=DataConfig(cpus_per_decode=2 / TASKS, clips_per_task=PAIRS),
        decode_tasks=max(1, TASKS // world_size),
        pairs=True,
        rank=rank,
        world_size=world_size,
    )
    return source.training(manifest, order, 0)


@ray.remote(num_cpus=0)
class Worker:
    """A training worker: takes batches, and computes nothing."""

    def read(self, manifest: pa.Table, workers: int, rank: int, first: int, last: int) -> int:
        """Take the steps of its own execution from one to another; the execution lives on between calls."""
        if first == 0:
            self._batches = batches(manifest, workers, rank, workers)
        return sum(len(next(self._batches).video_ids) for _ in range(first, last))

    def take(self, share: dict[str, Any]) -> int:
        """Take its share of a batch."""
        return len(share["video_ids"])


@ray.remote(num_cpus=0)
class Reader:
    """Reads batches for all workers by one execution."""

    def begin(self, manifest: pa.Table, workers: int) -> None:
        """Start an execution; an earlier one ends."""
        self._batches, self._workers = batches(manifest, workers, 0, 1), workers

    def shares(self) -> Any:
        """Return each worker's share of the next batch."""
        batch = next(self._batches)
        assert batch.short is not None
        found = []
        for rank in range(self._workers):
            mine = slice(rank * PAIRS, (rank + 1) * PAIRS)
            clips = {"long": batch.long[mine].numpy().copy(), "short": batch.short[mine].numpy().copy()}
            found.append({"video_ids": batch.video_ids[mine]} | clips)
        return found if self._workers > 1 else found[0]


class Case:
    """Times steps of so many workers."""

    def __init__(self, manifest: Any, most: int) -> None:
        self._manifest, self._reader = manifest, Reader.remote()
        self._actors = [Worker.remote() for _ in range(most)]

    def own(self, workers: int) -> tuple[float, float, float]:
        """Return seconds to the first batches, and seconds and CPU seconds of the counted steps; an execution each."""
        actors = list(enumerate(self._actors[:workers]))

        def steps(first: int, last: int) -> None:
            ray.get([each.read.remote(self._manifest, workers, rank, first, last) for rank, each in actors])

        return timed(steps)

    def one(self, workers: int) -> tuple[float, float, float]:
        """Return the same by one execution for all."""
        actors = self._actors[:workers]

        def steps(first: int, last: int) -> None:
            if first == 0:
                self._reader.begin.remote(self._manifest, workers)
            # Two batches ahead, as workers prefetch.
            ahead: deque[Any] = deque()
            for step in range(first, last + AHEAD):
                if step < last:
                    ahead.append(self._reader.shares.options(num_returns=workers).remote())
                if step >= first + AHEAD:
                    refs = ahead.popleft()
                    shares = refs if isinstance(refs, list) else [refs]
                    ray.get([each.take.remote(share) for each, share in zip(actors, shares, strict=True)])

        return timed(steps)


def timed(steps: Callable[[int, int], None]) -> tuple[float, float, float]:
    """Return the seconds to the first batches, and the seconds and CPU seconds of the counted steps."""
    begin = time.perf_counter()
    steps(0, 1)
    started = time.perf_counter() - begin
    steps(1, WARM)
    begin, used = time.perf_counter(), cpu_seconds()
    steps(WARM, WARM + STEPS)
    return started, time.perf_counter() - begin, cpu_seconds_since(used)


def main() -> None:
    """Measure, print, and write out/bench/executions.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], choices=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    start_ray(2)
    off = TrackingConfig(uri="off")
    with tempfile.TemporaryDirectory() as folder:
        sample.run(SampleConfig(out=f"{folder}/videos", videos=80, seconds=10, tracking=off, test_share=0, val_share=0))
        index.run(IndexConfig(videos=f"{folder}/videos", out=f"{folder}/index", tracking=off))
        manifest = ray.put(read_manifest(f"{folder}/index"))
        case = Case(manifest, max(options.workers))
        cases = {"an execution each": case.own, "one for all": case.one}
        found: dict[str, dict[int, list[tuple[float, float, float]]]] = {name: {} for name in cases}
        for _ in range(options.rounds):
            for workers in options.workers:
                for name, measure in cases.items():
                    found[name].setdefault(workers, []).append(measure(workers))
                    print(f"{name}, {workers} workers: {found[name][workers][-1]}", flush=True)
    rows = []
    for name, by_workers in found.items():
        for workers, measured in by_workers.items():
            clips = 2 * PAIRS * workers * STEPS
            first, seconds, cpu = (median(column) for column in zip(*measured, strict=True))
            rows.append(Row(f"{name}, {workers} workers: clips/s", clips / seconds))
            rows.append(Row(f"{name}, {workers} workers: CPU ms of a clip", 1000 * cpu / clips))
            rows.append(Row(f"{name}, {workers} workers: s to the first batch", first))
    write("executions", torch.device("cpu"), rows, {name: dict(each) for name, each in found.items()})


if __name__ == "__main__":
    main()
