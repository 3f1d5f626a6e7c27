"""Weak scaling of real processes here, beside what `simulate` says of them.

Each process takes batches from a thread that makes them in time, sleeps as long as its step would take, gathers keys
and averages gradients with all others by gloo, and waits for copies of checkpoints that a thread writes. Sleeping
leaves the cores free: 8 processes fit 2.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from s5 import distributed
from tests.bench.record import Row, table
from tests.bench.simulate import Costs, drawn, efficiency, step_seconds

HERE = Costs(
    step_s=0.4,
    spread=0.2,
    pairs=8,
    decode_s=0.16,
    decoders=4,
    pair_bytes=0.0,
    task_s=0.0,
    gradient_bytes=4e4,
    overlap_s=0.0,
    shared_cores=len(os.sched_getaffinity(0)),
    checkpoint_every=10,
    checkpoint_bytes=4e8,
    copy_bandwidth=2e9,
    store_bandwidth=1e8,
    failures_per_hour=0.0,
)
"""A step of 0.4 s that varies by 20 %, a batch in 0.32 s. Messages are measured before."""
STEPS, WARM = 40, 10
SENT = 1_000_000
"""Numbers by which the speed of messages is measured."""
KEY_WIDTH = 256


def work(rank: int, workers: int, costs: Costs, file: str, seconds: Any) -> None:
    """Take the steps of one worker; rank 0 appends the seconds of all steps to `seconds`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=workers)
    keys = torch.zeros(costs.pairs, KEY_WIDTH)
    gradients = torch.zeros(int(costs.gradient_bytes / 4))
    batches: queue.Queue[None] = queue.Queue(max(1, costs.prefetch))
    store = threading.Semaphore(2)
    writing = threading.Lock()

    def decode() -> None:
        for _ in range(WARM + STEPS):
            time.sleep(costs.pairs * costs.decode_s / costs.decoders)
            batches.put(None)

    def save() -> None:
        with writing:
            time.sleep(costs.checkpoint_bytes / costs.store_bandwidth)
        store.release()

    threading.Thread(target=decode, daemon=True).start()
    sleeps = drawn(costs, workers, WARM + STEPS, seed=workers)[:, rank]
    for step, sleep in enumerate(sleeps):
        if step == WARM:
            dist.barrier()
            started = time.perf_counter()
        batches.get()
        time.sleep(float(sleep))
        exchange(keys, gradients, workers)
        if (step + 1) % costs.checkpoint_every == 0 and rank == 0:
            store.acquire()
            time.sleep(costs.checkpoint_bytes / costs.copy_bandwidth)
            threading.Thread(target=save, daemon=True).start()
    dist.barrier()
    if rank == 0:
        seconds.append((time.perf_counter() - started) / STEPS)
    dist.destroy_process_group()


def exchange(keys: torch.Tensor, gradients: torch.Tensor, workers: int) -> None:
    """Gather two keys of each pair and average the gradients, as a step of LSMCL does."""
    for _ in range(2):
        distributed.gather(keys, workers * len(keys))
    if workers > 1:
        dist.all_reduce(gradients)


def message(rank: int, workers: int, costs: Costs, file: str, seconds: Any) -> None:
    """Time what two workers send each other: gathering keys, and averaging one number and many."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=workers)
    found = []
    for size in (1, SENT):
        times = []
        for _ in range(50):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(torch.zeros(size))
            times.append(time.perf_counter() - started)
        found.append(median(times))
    if rank == 0:
        seconds.extend(found)
    dist.destroy_process_group()


def run(target: Any, workers: int, costs: Costs) -> list[float]:
    """Run a function in so many processes and return the seconds that rank 0 notes."""
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        seconds = manager.list()
        mp.spawn(target, (workers, costs, os.path.join(folder, "store"), seconds), nprocs=workers)
        return list(seconds)


def with_messages(costs: Costs) -> Costs:
    """Return the costs with what two processes here are measured to send: each sends a half, twice."""
    small, large = run(message, 2, costs)
    return replace(costs, latency_s=small / 2, bandwidth=4 * SENT / max(large - small, 1e-6))


def compared(sizes: Sequence[int], tolerance: float) -> tuple[dict[str, Any], list[Row]]:
    """Measure steps of so many processes, print them beside the simulated ones, and return both."""
    costs = with_messages(HERE)
    measured = {workers: run(work, workers, costs)[0] for workers in sizes}
    alone = measured[sizes[0]]
    lines, off = [], []
    for workers, seconds in measured.items():
        said = step_seconds(costs, workers)
        off.append(abs(said / seconds - 1))
        reached, expected = alone / seconds, efficiency(costs, workers)
        figures = [1e3 * seconds, 1e3 * said]
        lines.append([str(workers), *(f"{each:.1f}" for each in figures), f"{reached:.2f}", f"{expected:.2f}"])
    table(["processes", "step ms, measured", "simulated", "efficiency, measured", "simulated"], lines)
    row = Row(
        f"simulated steps of {', '.join(map(str, sizes))} processes here: largest error", max(off), tolerance, "lower"
    )
    return {"costs": asdict(costs), "step_seconds": {str(workers): each for workers, each in measured.items()}}, [row]
