"""The simulation of many workers: limits that are known, and a slow one that follows each worker by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.bench import simulate
from tests.bench.simulate import FREE, Costs, bottleneck, drawn, efficiency, limits, read_costs, simulated, step_seconds

NOTHING = {name: value for free in FREE.values() for name, value in free.items()}
ALONE = replace(Costs(step_s=1.0, overlap_s=0.0), **NOTHING)
"""A step of a second, beside which nothing costs anything."""


def steps_of(costs: Costs, workers: int = 1, steps: int = 40) -> float:
    return simulated(costs, drawn(costs, workers, steps))


def test_one_worker_takes_the_sum_of_its_parts() -> None:
    assert steps_of(ALONE) == pytest.approx(40)
    saved = replace(ALONE, checkpoint_every=10, checkpoint_bytes=100.0, copy_bandwidth=50.0, store_bandwidth=1e9)
    assert steps_of(saved) == pytest.approx(40 + 4 * 2)
    failing = replace(ALONE, failures_per_hour=3.6, restart_s=10.0, checkpoint_every=20)
    # A failure in a thousand seconds costs a restart, and half of 20 steps.
    assert step_seconds(failing, 1) == pytest.approx(1 + (10 + 10) / 1000)


def test_what_is_slowest_sets_the_pace() -> None:
    decoding = replace(ALONE, decode_s=1.0, pairs=16, decoders=8)
    assert steps_of(decoding) == pytest.approx(40 * 2 + 1)
    store = replace(ALONE, checkpoint_every=1, checkpoint_bytes=300.0, store_bandwidth=100.0, copy_bandwidth=1e9)
    # All but the last two are written by then.
    assert steps_of(store) == pytest.approx(1 + 38 * 3, rel=0.02)
    sent = replace(ALONE, gradient_bytes=100.0, bandwidth=10.0)
    assert steps_of(sent, 2) == pytest.approx(40 * (1 + 10))
    assert steps_of(replace(sent, overlap_s=4.0), 2) == pytest.approx(40 * (1 + 6))
    assert steps_of(replace(ALONE, key_bytes=1.0, pairs=4, bandwidth=2.0), 5) == pytest.approx(40 * (1 + 4 * 2))


def slowly(costs: Costs, work: npt.NDArray[np.float64]) -> float:
    """`simulated`, with a queue and a clock of each worker."""
    steps, workers = work.shape
    period = max(simulate.supply_s(costs, workers).values())
    put: list[list[float]] = [[] for _ in range(workers)]
    took: list[list[float]] = [[] for _ in range(workers)]
    now, writes = 0.0, [0.0]
    for step in range(steps):
        ends = []
        for worker in range(workers):
            ready = (put[worker][-1] if step else 0.0) + period
            if step >= costs.prefetch:
                ready = max(ready, took[worker][step - costs.prefetch])
            put[worker].append(ready)
            took[worker].append(max(now, ready))
            ends.append(took[worker][-1] + work[step, worker])
        now = max(ends) + simulate.keys_s(costs, workers) + simulate.gradients_s(costs, workers)
        if step % costs.checkpoint_every == costs.checkpoint_every - 1:
            if len(writes) > 2:
                now = max(now, writes[-2])
            now += costs.checkpoint_bytes / costs.copy_bandwidth
            writes.append(max(now, writes[-1]) + costs.checkpoint_bytes / costs.store_bandwidth)
    return now


@pytest.mark.parametrize("seed", range(4))
def test_it_agrees_with_the_slow_one(seed: int) -> None:
    costs = Costs(spread=0.3, decode_s=0.7, prefetch=1 + seed, checkpoint_every=3, store_bandwidth=1e9)
    work = drawn(costs, 5, 60, seed)
    assert simulated(costs, work) == pytest.approx(slowly(costs, work))


def test_efficiency_falls_with_the_workers_and_names_what_it_is_lost_to() -> None:
    found = [efficiency(Costs(), workers) for workers in (1, *simulate.SIZES)]
    assert found[0] == 1
    assert found == sorted(found, reverse=True)
    assert bottleneck(ALONE, 64) == ("the model", 0.0)
    assert bottleneck(Costs(shared_execution=True), 256)[0] == "Ray Data's driver"
    assert bottleneck(Costs(failures_per_hour=1.0), 256)[0] == "failures"
    assert bottleneck(Costs(decode_s=10.0), 8)[0] == "decoding"


def test_limits_are_where_the_parts_reach_them() -> None:
    told = limits(Costs())["all-gather of keys"]
    workers = int(told.split(" from ")[1].split()[0].replace(",", ""))
    assert simulate.keys_s(Costs(), workers) == pytest.approx(simulate.NOTED * Costs().step_s, rel=0.01)
    assert limits(Costs(failures_per_hour=0.0))["failures"] == "none"


def test_costs_are_read_from_what_a_benchmark_wrote(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"raw": {"costs": {"step_s": 2.0}}}))
    assert read_costs(str(file)) == Costs(step_s=2.0)
    file.write_text(json.dumps({"steps_s": 2.0}))
    with pytest.raises(SystemExit, match=r"steps_s is no cost; there are step_s, "):
        read_costs(str(file))
