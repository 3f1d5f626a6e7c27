from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from s5.batch import ClipBatch
from s5.checkpoint import read_meta
from s5.loop import Fit, SoloContext, TrainingError
from s5.video import Failure
from tests.s5.toys import STEPS, batches, finetune_fit, losses, lsmcl_fit, saved


def test_two_runs_with_one_seed_are_identical() -> None:
    first, second = SoloContext(), SoloContext()
    lsmcl_fit(first).run()
    lsmcl_fit(second).run()
    assert len(losses(first)) == STEPS
    assert losses(first) == losses(second)
    other = SoloContext()
    lsmcl_fit(other, seed=1).run()
    assert losses(first) != losses(other)


@pytest.mark.parametrize("make", [lsmcl_fit, finetune_fit])
@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_resume_equals_a_straight_run_bit_for_bit(
    tmp_path: Path, stop_at: int, make: Callable[[SoloContext], Fit]
) -> None:
    straight = make(SoloContext())
    straight.run()

    result = make(SoloContext(tmp_path, stop_at=stop_at)).run()
    assert (result.step, result.stopped) == (stop_at, True)
    resumed = make(SoloContext(tmp_path))
    result = resumed.run()

    assert (result.started_at, result.step, result.stopped) == (stop_at, STEPS, False)
    weights = resumed.task.state_dict()
    for name, value in straight.task.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    lsmcl_fit(SoloContext(tmp_path)).run()
    again = SoloContext(tmp_path)
    result = lsmcl_fit(again).run()
    assert result.started_at == result.step == STEPS
    assert again.rows == []


def test_checkpoints_come_each_epoch_and_the_oldest_go(tmp_path: Path) -> None:
    lsmcl_fit(SoloContext(tmp_path, keep=1)).run()
    assert [path.name for path in saved(tmp_path)] == [f"step_{STEPS:08d}"]
    every = tmp_path / "every"
    lsmcl_fit(SoloContext(every, keep=9), checkpoint_every=3).run()
    assert [read_meta(path).step for path in saved(every)] == [3, 6, 8]


def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path) -> None:
    lsmcl_fit(SoloContext(tmp_path, keep=2)).run()
    before, last = saved(tmp_path)
    (last / "model.safetensors").write_bytes((last / "model.safetensors").read_bytes()[:1000])
    with SoloContext(tmp_path).latest_checkpoint() as latest:
        assert latest == before


def test_evaluation_runs_on_its_epochs_and_at_the_end() -> None:
    context = SoloContext()
    fit = lsmcl_fit(context, evaluate_every=0)
    fit.evaluate = lambda: {"val/score": 0.5}
    result = fit.run()
    assert [step for step, row in context.rows if "val/score" in row] == [STEPS]
    assert result.metrics["val/score"] == 0.5
    assert fit.task.training


def test_a_loss_that_is_not_finite_stops_with_the_remedy() -> None:
    def broken(start: int) -> Generator[ClipBatch]:
        for item in batches(start):
            yield replace(item, long=item.long.float() * torch.nan) if item.step == 2 else item

    with pytest.raises(TrainingError, match=r"train/loss is nan at step 3: lower optim.lr"):
        lsmcl_fit(SoloContext(), broken).run()


def test_too_many_unreadable_videos_stop_the_run() -> None:
    def failing(start: int) -> Generator[ClipBatch]:
        for item in batches(start):
            yield replace(item, failures=[Failure("a", "a.mp4", "truncated")])

    context = SoloContext()
    fit = lsmcl_fit(context, failing)
    fit.max_failure_share = 0.1
    with pytest.raises(TrainingError, match=r"2 of 8 videos could not be decoded, more than data.max_failure_share"):
        fit.run()
    assert [failure.reason for failure in context.rejects] == ["truncated"] * 2
