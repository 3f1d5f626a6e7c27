"""What several Ray Data executions at once cost: one of each worker, as `clip_batches` has them, or one for all.

    make bench-executions [ARGS="--workers 2 4 8 --steps 40"]

Decode tasks and steps sleep, so that the two ways and Ray itself are what is measured.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import TaskPoolStrategy

from pipelines.data.clip_batches import in_chunks, limit
from tests.bench.record import Row, table, write

CHUNK, BATCH, PAIR_BYTES = 8, 16, 100_000
STEP_S, DECODE_S = 0.5, 0.02
TASK_CPUS = 0.1
COORDINATOR = "ray::SplitCoordinator"


@dataclass(frozen=True)
class Report:
    """What one worker found."""

    first_s: float
    """Seconds until its first batch."""
    step_s: float
    """Mean seconds of its further steps."""
    cpu_s: float
    """CPU seconds of its process in these steps, of which the sleeping loop has none."""
    threads: int
    memory_mib: float
    ordered: bool
    """Whether its rows came in the order in which they were listed."""


def decode(rows: pa.Table) -> pa.Table:
    """Stand in for a decode task."""
    time.sleep(DECODE_S * len(rows))
    frames = pa.array([bytes(PAIR_BYTES)] * len(rows), pa.binary())
    return rows.append_column("frames", frames)


def decoded(rows: int, tasks: int) -> ray.data.Dataset:
    """Return the data set of so many rows, of which so many tasks decode chunks at once."""
    dataset = in_chunks(pa.table({"row": np.arange(rows)}), CHUNK)
    limit(dataset, tasks * TASK_CPUS, 256e6)
    return dataset.map_batches(
        decode, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS, compute=TaskPoolStrategy(tasks)
    )


@ray.remote(num_cpus=0)
class Worker:
    """Trains by sleeping."""

    def train(self, source: Any, steps: int) -> Report:
        """Take the steps on batches of a source: a number of rows, to decode them itself, or a part of a data set."""
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        batches = (decoded(source, 2) if isinstance(source, int) else source).iter_batches(
            batch_size=BATCH, prefetch_batches=2, batch_format="pyarrow"
        )
        return _steps(batches, steps)


def _steps(batches: Iterable[pa.Table], steps: int) -> Report:
    started, rows = time.perf_counter(), []
    source = iter(batches)
    rows += next(source)["row"].to_pylist()
    first = time.perf_counter()
    cpu = time.process_time()
    taken = 0
    for taken, batch in enumerate(source, 1):
        time.sleep(STEP_S)
        rows += batch["row"].to_pylist()
        if taken == steps:
            break
    used, seconds = time.process_time() - cpu, time.perf_counter() - first
    status = Path("/proc/self/status").read_text()
    threads, memory = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("Threads", "VmRSS"))
    return Report(first - started, seconds / taken, used / taken, threads, memory / 1024, rows == sorted(rows))


def coordinator_cpu_s() -> float:
    """Return the CPU seconds so far of the actor that runs an execution for all workers; 0 where there is none."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(COORDINATOR.encode()):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            continue
    return 0.0


def run(workers: int, steps: int, shared: bool) -> dict[str, Any]:
    """Train with so many workers; return their figures in the mean, and the CPU seconds of a decode task."""
    actors = [Worker.remote() for _ in range(workers)]  # type: ignore[attr-defined]
    rows = (steps + 4) * BATCH
    sources: list[Any] = [rows] * workers
    if shared:
        sources = decoded(rows * workers, 2 * workers).streaming_split(workers)
    seen: list[float] = [0.0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            seen.append(max(seen[-1], coordinator_cpu_s()))

    threading.Thread(target=watch, daemon=True).start()
    started = time.perf_counter()
    reports: list[Report] = ray.get(
        [actor.train.remote(source, steps) for actor, source in zip(actors, sources, strict=True)]
    )
    seconds = time.perf_counter() - started
    over.set()
    for actor in actors:
        ray.kill(actor)
    found = {name: mean(float(asdict(each)[name]) for each in reports) for name in asdict(reports[0])}
    tasks = workers * steps * BATCH / CHUNK
    return found | {
        "seconds": seconds,
        "coordinator_task_s": seen[-1] / tasks,
        "task_s": found["cpu_s"] * CHUNK / BATCH,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    raw: dict[str, dict[str, Any]] = {}
    for workers in options.workers:
        for shared in (False, True):
            raw[f"{workers} workers, {'one execution' if shared else 'one each'}"] = run(workers, options.steps, shared)
    names = ("first_s", "step_s", "cpu_s", "threads", "memory_mib", "ordered", "task_s", "coordinator_task_s")
    table(["case", *names], [[case, *(f"{found[name]:.3g}" for name in names)] for case, found in raw.items()])
    rows = [
        Row(f"{case}: CPU s of a decode task", found["task_s"] + found["coordinator_task_s"])
        for case, found in raw.items()
    ]
    write("executions", torch.device("cpu"), rows, raw)


if __name__ == "__main__":
    main()
