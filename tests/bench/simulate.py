"""What pretraining with many workers would reach, from measured costs of its parts, beside what processes here reach.

    make simulate [ARGS="--costs FILE --no-measure --failures 0.01"]

Weak scaling: each worker keeps its batch. A step lasts until the slowest worker has its frames and its gradient, and
the keys and gradients of all have been exchanged. `simulated` goes through every step; failures, which are rare, are
added as the time that each costs. `tests/bench/scaling.py` runs the same parts in real processes, which sleep in place
of a model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tests.bench.record import Row, table, write

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
MEASURED = (1, 2, 4, 8)
STEPS = 400
TOLERANCE, TARGET = 0.15, 0.85
NOTED = 0.05
"""Share of a step from which on a part counts as a limit."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a worker's step is made of; docs/benchmarks.md says where the defaults come from."""

    step_s: float = 1.575
    """Seconds of a step of one worker alone: 16 pairs of 2 x 60 frames, ViT-L/16, recompute, bf16, one H200."""
    spread: float = 0.02
    """Standard deviation of the logarithm of a worker's step. Assumed."""
    pairs: int = 16
    """Pairs of clips of a worker's step."""
    decode_s: float = 0.47
    """Seconds of one core for a pair."""
    decoders: float = 8
    """Decode tasks that run for each worker."""
    pair_bytes: float = 2 * 60 * 224 * 224 * 3
    """Bytes of a pair's frames, all of which are taken to cross the network."""
    prefetch: int = 2
    """Batches that are kept ready for a worker."""
    clips_per_task: int = 8
    """Pairs of a decode task."""
    task_s: float = 0.085
    """Seconds of the thread that runs a Ray Data execution, for each decode task: at most what Ray took of the CPU time
    in all its processes."""
    shared_execution: bool = False
    """Whether one execution serves all workers; else each has its own."""
    key_bytes: float = 2 * 256 * 4
    """Bytes of a pair's two keys."""
    gradient_bytes: float = 4 * 325e6
    """Bytes of the gradients."""
    overlap_s: float = 0.5 * 1.575
    """Seconds of the backward pass in which gradients are exchanged meanwhile. Assumed: half of the step."""
    bandwidth: float = 12.5e9
    """Bytes a second between two workers, and into each of them. Assumed: 100 Gbit/s."""
    latency_s: float = 20e-6
    """Seconds of a message. Assumed."""
    shared_cores: int = 0
    """Cores that all workers share where they are processes of one machine, so that messages wait for one another; 0
    where each has its own."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    checkpoint_bytes: float = 5.2e9
    """Bytes of a checkpoint."""
    copy_bandwidth: float = 9.5e9
    """Bytes a second at which the loop copies a checkpoint before it goes on."""
    store_bandwidth: float = 0.5e9
    """Bytes a second at which one worker writes it to the store meanwhile. Assumed."""
    failures_per_hour: float = 2e-5
    """Failures of a worker: of 16,384 GPUs in 54 days 419 (The Llama 3 Herd of Models, 2407.21783, table 5)."""
    restart_s: float = 60.0
    """Seconds until training goes on after one: 10 s of imports and 40 s to the first step on the H200, and the
    notice."""


# --- parts of a step --------------------------------------------------------------------------------------------------


def supply_s(costs: Costs, workers: int) -> dict[str, float]:
    """Return the seconds between two batches of a worker, as each of the parts that bring them allows."""
    executed = costs.pairs / costs.clips_per_task * costs.task_s
    return {
        "decoding": costs.pairs * costs.decode_s / costs.decoders,
        "transfer of frames": costs.pairs * costs.pair_bytes / costs.bandwidth,
        "Ray Data's driver": executed * (workers if costs.shared_execution else 1),
    }


def contention(costs: Costs, workers: int) -> float:
    """Return how many messages wait for one core."""
    return max(1.0, workers / costs.shared_cores) if costs.shared_cores else 1.0


def keys_s(costs: Costs, workers: int) -> float:
    """Return the seconds in which all workers have both keys of all: two rings, in which each passes on all others'."""
    each = 2 * costs.latency_s + costs.pairs * costs.key_bytes / costs.bandwidth
    return contention(costs, workers) * (workers - 1) * each


def gradients_s(costs: Costs, workers: int) -> float:
    """Return the seconds that averaging the gradients over a ring takes beyond the backward pass."""
    if workers == 1:
        return 0.0
    parts = 2 * (workers - 1) * (costs.latency_s + costs.gradient_bytes / workers / costs.bandwidth)
    return max(0.0, contention(costs, workers) * parts - costs.overlap_s)


def drawn(costs: Costs, workers: int, steps: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Return the seconds (steps, workers) of each worker's steps, whose mean is `step_s`."""
    normal = np.random.default_rng(seed).standard_normal((steps, workers))
    return costs.step_s * np.exp(costs.spread * normal - costs.spread**2 / 2)


# --- all steps --------------------------------------------------------------------------------------------------------


def simulated(costs: Costs, work: npt.NDArray[np.float64]) -> float:
    """Return the seconds of all steps, without failures.

    Each worker's batches come one after another into a queue of `prefetch`. A checkpoint is copied while the loop waits
    and written meanwhile; the loop waits for the last but one to be written, as that of `s5.checkpoints.writer` does.

    Args:
        costs: of the parts.
        work: seconds of each worker's steps (steps, workers).
    """
    steps, workers = work.shape
    period, depth = max(supply_s(costs, workers).values()), max(1, costs.prefetch)
    together = keys_s(costs, workers) + gradients_s(costs, workers)
    now, queued = 0.0, np.zeros(steps + 1)
    taken = np.zeros(steps)
    written = [0.0, 0.0]
    for step in range(steps):
        # All workers take their batches at once: their queues are alike.
        made = queued[step] + period
        queued[step + 1] = max(made, taken[step - depth] if step >= depth else 0.0)
        taken[step] = max(now, queued[step + 1])
        now = taken[step] + float(work[step].max()) + together
        if (step + 1) % costs.checkpoint_every == 0:
            now = max(now, written[-2]) + costs.checkpoint_bytes / costs.copy_bandwidth
            written.append(max(now, written[-1]) + costs.checkpoint_bytes / costs.store_bandwidth)
    return float(now)


def step_seconds(costs: Costs, workers: int, steps: int = STEPS) -> float:
    """Return the mean seconds of a step, with the time that failures cost: a restart, and half of what lies between two
    checkpoints."""
    mean = simulated(costs, drawn(costs, workers, steps)) / steps
    lost = costs.restart_s + mean * costs.checkpoint_every / 2
    return mean * (1 + workers * costs.failures_per_hour / 3600 * lost)


def efficiency(costs: Costs, workers: int) -> float:
    """Return the throughput of a worker among so many, against that of one alone."""
    return step_seconds(costs, 1) / step_seconds(costs, workers)


FREE = {
    "stragglers": {"spread": 0.0},
    "decoding": {"decode_s": 0.0},
    "transfer of frames": {"pair_bytes": 0.0},
    "Ray Data's driver": {"task_s": 0.0},
    "keys": {"key_bytes": 0.0},
    "gradients": {"gradient_bytes": 0.0},
    "latency": {"latency_s": 0.0},
    "checkpoints": {"checkpoint_bytes": 0.0},
    "failures": {"failures_per_hour": 0.0},
}
"""Each part, and what makes it cost nothing."""


def bottleneck(costs: Costs, workers: int) -> tuple[str, float]:
    """Return the part without which a step would be the shortest, and by which share."""
    whole = step_seconds(costs, workers)
    gains = {name: 1 - step_seconds(replace(costs, **free), workers) / whole for name, free in FREE.items()}
    name = max(gains, key=lambda each: gains[each])
    return (name, gains[name]) if gains[name] > 1e-3 else ("the model", 0.0)


def limits(costs: Costs) -> dict[str, str]:
    """Return from how many workers on parts take more than `NOTED` of a step, or are full, and which setting helps."""
    keys = NOTED * costs.step_s / (keys_s(costs, 2))
    one = costs.step_s * costs.clips_per_task / (costs.pairs * costs.task_s)
    writing = costs.checkpoint_bytes / costs.store_bandwidth
    per_failure = costs.failures_per_hour / 3600 * (costs.restart_s + costs.checkpoint_every * costs.step_s / 2)
    return {
        "all-gather of keys": f"{NOTED:.0%} of a step from {keys:,.0f} workers on; larger steps (loop.batch_size)",
        "Ray Data's driver": f"one execution for all is full at {one:,.0f} workers; with one of each worker the share "
        f"stays at {costs.pairs / costs.clips_per_task * costs.task_s / costs.step_s:.0%}; data.clips_per_task",
        "checkpoint store": f"one worker writes for all: {writing:.0f} s, whatever their number; the loop waits where "
        f"fewer than {writing / costs.step_s:,.0f} steps lie between two (loop.checkpoint_every)",
        "failures": f"{NOTED:.0%} of the time from {NOTED / per_failure:,.0f} workers on (loop.checkpoint_every)"
        if per_failure
        else "none",
    }


# --- what is printed --------------------------------------------------------------------------------------------------


def read_costs(path: str) -> Costs:
    """Return costs from a JSON file: some of their names with numbers, or what a benchmark wrote, which has `costs`."""
    values = json.loads(Path(path).read_text())
    values = values.get("raw", values).get("costs", values)
    known = [field.name for field in fields(Costs)]
    if unknown := values.keys() - set(known):
        raise SystemExit(f"--costs is {path!r}: {', '.join(sorted(unknown))} is no cost; there are {', '.join(known)}")
    return Costs(**values)


def show(costs: Costs, sizes: Sequence[int]) -> list[Row]:
    """Print efficiency and bottleneck by size, and where limits lie; return the figures."""
    rows = []
    for workers in sizes:
        name, gain = bottleneck(costs, workers)
        pairs = workers * costs.pairs / step_seconds(costs, workers)
        rows.append([f"{workers:,}", f"{efficiency(costs, workers):.2f}", f"{pairs:,.0f}", f"{name} ({gain:.1%})"])
    table(["workers", "efficiency", "pairs/s", "largest loss"], rows)
    print()
    for name, text in limits(costs).items():
        print(f"{name}: {text}")
    print()
    return [Row("weak scaling at 256 workers, simulated", float(efficiency(costs, 256)), TARGET)]


def main() -> None:
    """Measure processes here, simulate them, and simulate many workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", metavar="FILE", help="costs in place of the defaults (JSON)")
    parser.add_argument(
        "--failures", type=float, metavar="N", help="failures of a worker an hour (spot nodes: 0.01 to 0.1)"
    )
    parser.add_argument("--no-measure", action="store_true", help="simulate alone")
    options = parser.parse_args()
    costs = read_costs(options.costs) if options.costs else Costs()
    if options.failures is not None:
        costs = replace(costs, failures_per_hour=options.failures)
    rows = show(costs, SIZES)
    raw: dict[str, object] = {"costs": asdict(costs)}
    if not options.no_measure:
        # Starts processes that import this module.
        from tests.bench.scaling import compared

        found, more = compared(MEASURED, TOLERANCE)
        raw["measured"], rows = found, rows + more
    write("simulate", torch.device("cpu"), rows, raw)


if __name__ == "__main__":
    main()
