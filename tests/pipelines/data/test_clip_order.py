"""The clip plan: complete, reproducible and independent of the number of workers."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.data.clip_order import SPARES, ClipOrder, OrderRows

PLANS = [(48, 16, 3), (50, 16, 4), (33, 16, 2), (16, 16, 3), (17, 16, 3), (18, 16, 2), (100, 4, 2)]


def _table(rows: OrderRows) -> np.ndarray:
    columns = [rows.step, rows.epoch, rows.position, rows.video]
    return np.concatenate([np.stack(columns, axis=1), rows.spares], axis=1)


def _joined(parts: list[OrderRows]) -> np.ndarray:
    table = np.concatenate([_table(part) for part in parts])
    return table[np.lexsort((table[:, 2], table[:, 0]))]


@pytest.mark.parametrize(("videos", "batch", "epochs"), PLANS)
def test_every_epoch_has_each_video_at_most_once_and_whole_batches(videos: int, batch: int, epochs: int) -> None:
    plan = ClipOrder(videos, batch, epochs, seed=1)
    rows = plan.rows(0, plan.total_steps)
    assert plan.total_steps == videos // batch * epochs
    for epoch in range(epochs):
        seen = rows.video[rows.epoch == epoch]
        assert len(seen) == videos // batch * batch
        assert len(np.unique(seen)) == len(seen)
    assert rows.video.max() < videos


@pytest.mark.parametrize(("videos", "batch", "epochs"), PLANS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_workers_share_the_order(videos: int, batch: int, epochs: int, world: int) -> None:
    plan = ClipOrder(videos, batch, epochs, seed=2)
    whole = _table(plan.rows(0, plan.total_steps))
    parts = [plan.rows(0, plan.total_steps, rank, world) for rank in range(world)]
    np.testing.assert_array_equal(_joined(parts), whole)
    assert all((np.diff(part.step) >= 0).all() for part in parts)


@pytest.mark.parametrize("start", [0, 1, 3, 5, 11])
def test_a_run_resumes_at_any_step_on_another_number_of_workers(start: int) -> None:
    plan = ClipOrder(50, 16, 4, seed=3)
    before = [plan.rows(0, start, rank, 2) for rank in range(2)]
    after = [plan.rows(start, plan.total_steps, rank, 5) for rank in range(5)]
    np.testing.assert_array_equal(_joined(before + after), _table(plan.rows(0, plan.total_steps)))


@pytest.mark.parametrize(("videos", "batch", "epochs"), PLANS)
def test_spares_are_never_of_the_same_batch_nor_twice(videos: int, batch: int, epochs: int) -> None:
    plan = ClipOrder(videos, batch, epochs, seed=4)
    rows = plan.rows(0, plan.total_steps)
    expected = min(SPARES, videos - batch)
    for step in range(plan.total_steps):
        mine = rows.step == step
        spares = rows.spares[mine]
        assert not set(spares[spares >= 0]) & set(rows.video[mine])
        assert ((spares >= 0).sum(axis=1) == expected).all()
        assert all(len(set(row[row >= 0])) == expected for row in spares)
        if videos - batch >= SPARES * batch:
            assert len(np.unique(spares)) == spares.size


def _slow_spares(plan: ClipOrder, order: np.ndarray, index: int) -> np.ndarray:
    """The whole pool of substitutes, turned to where the batch is: left-over videos, then the furthest batches."""
    size, used = plan.batch_size, plan.steps_per_epoch * plan.batch_size
    others = np.roll(order[:used], -(index + 1) * size)[: used - size]
    pool = np.concatenate([np.roll(order[used:], -index * size), np.roll(others, -(len(others) // 2))])
    spares = np.full((size, SPARES), -1)
    for column in range(min(SPARES, len(pool))):
        shift = column * (size if len(pool) >= SPARES * size else len(pool) // SPARES)
        spares[:, column] = pool[(np.arange(size) + shift) % len(pool)]
    return spares


@pytest.mark.parametrize(
    ("videos", "batch"), [(videos, batch) for videos, batch, _ in PLANS] + [(1, 1), (2, 1), (7, 3)]
)
def test_spares_are_those_of_the_whole_pool(videos: int, batch: int) -> None:
    plan = ClipOrder(videos, batch, 1, seed=7)
    slow = [_slow_spares(plan, plan.order(0), index) for index in range(plan.total_steps)]
    np.testing.assert_array_equal(plan.rows(0, plan.total_steps).spares, np.concatenate(slow))


def test_left_over_videos_are_the_first_spares() -> None:
    plan = ClipOrder(50, 16, 1, seed=5)
    rows = plan.rows(0, plan.total_steps)
    left_over = set(range(50)) - set(rows.video)
    for step in range(plan.total_steps):
        assert set(rows.spares[rows.step == step][:2, 0]) == left_over


def test_what_is_left_over_changes_from_epoch_to_epoch() -> None:
    plan = ClipOrder(20, 16, 10, seed=6)
    rows = plan.rows(0, plan.total_steps)
    assert len(np.unique(rows.video)) == 20
    assert not np.array_equal(rows.video[:16], rows.video[16:32])


def test_the_order_depends_on_the_seed_alone() -> None:
    first, again, other = (ClipOrder(50, 10, 2, seed).rows(0, 10).video for seed in (-1, -1, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # Fixed values: a resumed run must find the order that it started with, whatever the version.
    assert ClipOrder(10, 10, 1, 0).order(0).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 16: give 1 to 5"):
        ClipOrder(5, 16, 1, 0)
    plan = ClipOrder(32, 16, 1, 0)
    with pytest.raises(ValueError, match="world_size is 17: give at most the batch size, 16"):
        plan.rows(0, 1, 0, 17)
    with pytest.raises(ValueError, match="steps 0 to 3"):
        plan.rows(0, 3)
    assert len(plan.rows(2, 2).video) == 0
