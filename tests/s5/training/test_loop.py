from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from s5.batch import ClipBatch
from s5.checkpoints.checkpoint import read_meta, read_weights, restore
from s5.errors import Failure, NotFiniteError, TrainingError
from s5.training.context import SoloContext, StopPoll
from s5.training.loop import TrainingLoop
from s5.training.optim import build_optimizer
from s5.training.throughput import ThroughputWindow
from tests.s5.toys import BATCH, STEPS, batch, batches, finetune_loop, losses, lsmcl_loop, saved, stopping

pytestmark = pytest.mark.usefixtures("saves_in_turn")

Source = Callable[[int], Generator[ClipBatch]]


def broken(at: Iterable[int], stop_at: int = 0, context: SoloContext | None = None) -> Source:
    """Return a source whose steps of these numbers, from 1, have frames that are not numbers."""

    def source(start: int) -> Generator[ClipBatch]:
        for item in batches(start):
            if context is not None:
                context.stop = item.step + 1 == stop_at
            nan = torch.full(item.long.shape, torch.nan)
            yield replace(item, long=nan, short=nan) if item.step + 1 in at else item

    return source


def failing(steps: Iterable[int]) -> Source:
    """Return a source with one unreadable video in each of these steps, from 1."""

    def source(start: int) -> Generator[ClipBatch]:
        for item in batches(start):
            failures = [Failure("a", "a.mp4", "truncated")] if item.step + 1 in steps else []
            yield replace(item, failures=failures)

    return source


def test_two_runs_with_one_seed_are_identical() -> None:
    first, second = SoloContext(), SoloContext()
    lsmcl_loop(first).run()
    lsmcl_loop(second).run()
    assert len(losses(first)) == STEPS
    assert losses(first) == losses(second)
    other = SoloContext()
    lsmcl_loop(other, seed=1).run()
    assert losses(first) != losses(other)


def test_the_peak_learning_rate_scales_with_the_batch() -> None:
    loop = lsmcl_loop(SoloContext())
    peaks = [group["peak_lr"] for group in loop.optimizer.param_groups]
    for lr_batch, share in ((0, 1.0), (BATCH, 1.0), (4 * BATCH, 0.25)):
        inputs = replace(loop.inputs, optim=replace(loop.inputs.optim, lr_batch=lr_batch))
        scaled = TrainingLoop(loop.task, inputs, SoloContext())
        assert [group["peak_lr"] for group in scaled.optimizer.param_groups] == pytest.approx(
            [share * peak for peak in peaks]
        )


@pytest.mark.parametrize("make", [lsmcl_loop, finetune_loop])
@pytest.mark.parametrize(("stop_at", "log_every"), [(1, 1), (4, 1), (3, 3), (5, 3)])
def test_resume_equals_a_straight_run_bit_for_bit(
    tmp_path: Path, stop_at: int, log_every: int, make: Callable[..., TrainingLoop]
) -> None:
    """Also where the stop falls between two rows of the log."""
    straight = make(SoloContext(), log_every=log_every)
    straight.run()

    context = SoloContext(tmp_path)
    result = make(context, stopping(context, stop_at), log_every=log_every).run()
    assert (result.step, result.stopped) == (stop_at, True)
    resumed = make(SoloContext(tmp_path), log_every=log_every)
    result = resumed.run()

    assert (result.started_at, result.step, result.stopped) == (stop_at, STEPS, False)
    weights = resumed.task.state_dict()
    for name, value in straight.task.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_resume_restores_the_scale_of_an_fp16_loss(tmp_path: Path) -> None:
    """The first steps lower it: with the initial scale, other steps would be skipped."""
    straight = lsmcl_loop(SoloContext(), precision="fp16")
    straight.run()
    context = SoloContext(tmp_path)
    lsmcl_loop(context, stopping(context, 5), precision="fp16").run()
    resumed = lsmcl_loop(SoloContext(tmp_path), precision="fp16")
    resumed.run()
    torch.testing.assert_close(resumed.task.state_dict(), straight.task.state_dict(), rtol=0, atol=0)
    assert resumed.stepper.scaler.state_dict() == straight.stepper.scaler.state_dict()
    assert straight.stepper.scaler.get_scale() != torch.amp.GradScaler("cpu").get_scale()


def test_flops_are_counted_before_anything_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[bool] = []

    def count(task: torch.nn.Module, item: ClipBatch) -> float:
        counted.append(any(getattr(module, "recompute", False) for module in task.modules()))
        return 1.0

    monkeypatch.setattr("s5.training.loop.model_flops", count)
    loop = lsmcl_loop(SoloContext(), recompute=True)
    loop.run()
    assert counted == [False]
    assert any(getattr(module, "recompute", False) for module in loop.task.modules())


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    lsmcl_loop(SoloContext(tmp_path)).run()
    again = SoloContext(tmp_path)
    result = lsmcl_loop(again).run()
    assert result.started_at == result.step == STEPS
    assert again.rows == []


def test_checkpoints_are_saved_each_epoch_and_the_oldest_deleted(tmp_path: Path) -> None:
    lsmcl_loop(SoloContext(tmp_path, retain=1)).run()
    assert [path.name for path in saved(tmp_path)] == [f"step_{STEPS:08d}"]
    every = tmp_path / "every"
    lsmcl_loop(SoloContext(every, retain=9), checkpoint_every=3).run()
    assert [read_meta(path).step for path in saved(every)] == [3, 6, 8]


def test_evaluation_runs_on_its_epochs_and_at_the_end() -> None:
    context = SoloContext()
    loop = lsmcl_loop(context, evaluate=lambda: {"val/score": 0.5}, evaluate_every=0)
    result = loop.run()
    assert [step for step, row in context.rows if "val/score" in row] == [STEPS]
    assert result.metrics["val/score"] == 0.5
    assert loop.task.training


def test_a_stop_leaves_an_evaluation_out_but_not_the_last(tmp_path: Path) -> None:
    for at, stopped, steps in ((4, True, []), (STEPS, False, [4, STEPS])):
        context = SoloContext(tmp_path / str(at))
        loop = lsmcl_loop(context, stopping(context, at), evaluate=lambda: {"val/score": 0.5})
        result = loop.run()
        assert (result.step, result.stopped) == (at, stopped)
        assert [step for step, row in context.rows if "val/score" in row] == steps
        assert read_meta(saved(tmp_path / str(at))[-1]).step == at


def test_a_stop_is_polled_no_more_often_than_set() -> None:
    context = SoloContext(poll_seconds=1e9)
    loop = lsmcl_loop(context, stopping(context, 3))
    assert not loop.run().stopped


@pytest.mark.parametrize(
    ("device", "log_every", "steps"), [("cpu", 4, [1, 2, 3, 4]), ("cuda", 4, [4]), ("cuda", 50, [10])]
)
def test_workers_ask_each_other_less_often_where_the_answer_waits(
    device: str, log_every: int, steps: list[int]
) -> None:
    poll = StopPoll(SoloContext(device=torch.device(device), stop=True), log_every)
    # The collective of a single worker does not touch the device.
    assert [step for step in range(1, steps[-1] + 1) if poll(step)] == steps


@pytest.mark.parametrize("make", [lsmcl_loop, finetune_loop])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(make: Callable[..., TrainingLoop]) -> None:
    """Weights, optimiser, moving averages and running statistics: neither of the step itself nor later."""
    context = SoloContext()
    loop = make(context, broken(at=[3]), log_every=1)
    before: dict[str, torch.Tensor] = {}
    step = loop._step

    def watched(item: ClipBatch, number: int) -> tuple[dict[str, torch.Tensor], bool]:
        before.update({name: value.clone() for name, value in loop.task.state_dict().items()})
        moments = copy.deepcopy(loop.optimizer.state_dict()["state"])
        scalars, taken = step(item, number)
        assert taken == (number != 3)
        if not taken:
            assert not scalars["loss"].isfinite()
            torch.testing.assert_close(loop.task.state_dict(), before, rtol=0, atol=0)
            torch.testing.assert_close(loop.optimizer.state_dict()["state"], moments, rtol=0, atol=0)
        return scalars, taken

    loop._step = watched  # type: ignore[method-assign]
    result = loop.run()
    assert all(value.isfinite().all() for value in loop.task.state_dict().values())
    assert [row["train/skipped_steps"] for _, row in context.rows] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert [math.isnan(loss) for loss in losses(context)] == [False, False, True, False, False, False, False, False]
    assert result.metrics["train/skipped_steps_total"] == 1


def test_means_leave_out_steps_that_were_skipped() -> None:
    """Between two rows of the log too."""
    every, rare = SoloContext(), SoloContext()
    lsmcl_loop(every, broken(at=[3])).run()
    lsmcl_loop(rare, broken(at=[3]), log_every=4).run()
    expected = [losses(every)[1], losses(every)[3]]
    assert losses(rare)[1] == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run_with_their_videos(tmp_path: Path) -> None:
    loop = lsmcl_loop(SoloContext(tmp_path), broken(at=[3, 5, 6, 7]), max_skipped=2, checkpoint_every=4)
    with pytest.raises(
        NotFiniteError, match=r"in steps 5 to 7, more in a row than loop.max_skipped .*lower optim.lr"
    ) as e:
        loop.run()
    assert [step.step for step in e.value.skipped] == [5, 6, 7]
    assert e.value.skipped[0].video_ids == [f"video{row}" for row in range(4)]
    assert [read_meta(path).step for path in saved(tmp_path)] == [4]


@pytest.mark.parametrize("stop_at", [0, 7])
def test_weights_are_finite_in_every_checkpoint(tmp_path: Path, stop_at: int) -> None:
    """At the end and at a stop, and the count of skipped steps continues from there."""
    context = SoloContext(tmp_path, retain=9)
    lsmcl_loop(context, broken([6], stop_at, context), log_every=100).run()
    for path in saved(tmp_path):
        assert all(value.isfinite().all() for value in read_weights(path).values())
    result = lsmcl_loop(SoloContext(tmp_path), broken([8]), log_every=100).run()
    assert result.metrics["train/skipped_steps_total"] == (2 if stop_at else 1)


def test_failures_are_counted_over_a_stop_between_two_rows(tmp_path: Path) -> None:
    context = SoloContext(tmp_path)

    def source(start: int) -> Generator[ClipBatch]:
        for item in failing((2, 3, 6))(start):
            context.stop = item.step + 1 == 3
            yield item

    lsmcl_loop(context, source, log_every=100).run()
    assert read_meta(saved(tmp_path)[-1]).metrics["data/failures_total"] == 2
    result = lsmcl_loop(SoloContext(tmp_path), failing((2, 3, 6)), log_every=100).run()
    assert result.metrics["data/failures_total"] == 3


def test_failures_of_three_workers_are_a_whole_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean 5 / 3 in fp32, times 3, is less than 5."""
    monkeypatch.setattr("s5.distributed.world_size", lambda: 3)
    monkeypatch.setattr("s5.distributed.mean", lambda values: values / 3)
    window = ThroughputWindow(4)
    window.add(
        {"loss": torch.ones(())}, replace(batch(0), failures=[Failure("a", "a.mp4", "truncated")] * 5), 0.0, 1.0, True
    )
    assert window.row(1)["data/failures"] == 5


def test_too_many_unreadable_videos_stop_the_run() -> None:
    context = SoloContext()
    loop = lsmcl_loop(context, failing(range(1, STEPS + 1)), max_failure_share=0.1)
    with pytest.raises(TrainingError, match=r"2 of 8 videos could not be decoded, more than data.max_failure_share"):
        loop.run()
    assert [failure.reason for failure in context.rejects] == ["truncated"] * 2


@pytest.mark.parametrize("make", [lsmcl_loop, finetune_loop])
def test_a_run_in_two_parts_equals_one_in_one(tmp_path: Path, make: Callable[..., TrainingLoop]) -> None:
    straight, parts = SoloContext(), SoloContext(tmp_path)
    make(straight, evaluate_every=0).run()
    loop = make(parts, evaluate_every=0, stop_after_epoch=1)
    half = loop.run()
    assert (half.step, half.stopped) == (loop.inputs.steps_per_epoch, False)
    assert make(parts, evaluate_every=0, stop_after_epoch=1).run().step == half.step
    assert make(parts, evaluate_every=0).run().step == STEPS
    trained = [row["train/loss"] for _, row in parts.rows if "train/loss" in row]
    assert trained == losses(straight)


def test_a_resumed_run_counts_the_seconds_of_all_its_starts(tmp_path: Path) -> None:
    first = SoloContext(tmp_path)
    lsmcl_loop(first, broken((), stop_at=3, context=first)).run()
    name = sorted(path.name for path in tmp_path.glob("step_*"))[-1]
    before = read_meta(tmp_path / name).metrics["train/seconds"]
    result = lsmcl_loop(SoloContext(tmp_path)).run()
    assert result.earlier_seconds == before > 0
    assert result.metrics["train/seconds"] > before


def test_moments_find_their_weights_where_other_settings_make_other_groups(tmp_path: Path) -> None:
    first = lsmcl_loop(SoloContext(tmp_path))
    first.run()
    other = lsmcl_loop(SoloContext(tmp_path))
    # Without decay, and below every rate that a weight hints at, there is a single group.
    other.optimizer = build_optimizer(other.task, replace(other.inputs.optim, lr=1e-9, weight_decay=0.0))
    assert len(other.optimizer.param_groups) < len(first.optimizer.param_groups)
    restore(sorted(tmp_path.glob("step_*"))[-1], other.task, other.optimizer)
    expected = {
        name: first.optimizer.state[p] for name, p in first.task.named_parameters() if p in first.optimizer.state
    }
    found = {name: other.optimizer.state[p] for name, p in other.task.named_parameters() if p in other.optimizer.state}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
