"""What Tune's rules of early stopping make of the evaluations of trials, without Ray's processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from pipelines.config import SweepConfig, override
from pipelines.errors import UserError
from pipelines.tuning import records, trial_process
from pipelines.tuning.trial_process import StagesOfTrial
from pipelines.tuning.trials import objective_of, trial_of
from pipelines.tuning.tuner import early_stopping

EPOCHS = 6
METRIC = "knn/top1"


def sweep_of(folder: Path, **changes: Any) -> SweepConfig:
    base = {"stages": "pretrain", "space": ("lsmcl.mask_ratio=0.25,0.5",), "early_stopping": True, "out": str(folder)}
    return override(SweepConfig(), base | {"pretrain.loop.epochs": EPOCHS} | changes)


def evaluations(config: SweepConfig, accuracy: float, first: int = 1) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what a trial reports at each row while it trains from an epoch on, and at its end."""
    told: list[dict[str, Any]] = []

    def pretrain(settings: Any, parent_run: str, on_row: Any) -> dict[str, Any]:
        for epoch in range(first, EPOCHS + 1):
            on_row(10 * epoch, {"train/epoch": float(epoch)})
            on_row(10 * epoch, {METRIC: accuracy})
        return {"metrics": {METRIC: accuracy}, "seconds": 1.0, "checkpoint": "there"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "report", told.append)
        patch.setattr(trial_process, "REPORT_SECONDS", 0)
        trial = trial_of(config, {"lsmcl.mask_ratio": 0.25}, 0)
        record = StagesOfTrial(trial, METRIC)(records.started(trial, {}), {"pretrain": pretrain})
    return told, record.metrics | {trial_process.SECONDS: 1.0}


class Controller:
    """Tune's, as far as the rules ask it: trials wait for their turn."""

    def get_live_trials(self) -> list[Trial]:
        return [Trial("waiting", stub=True)]


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_the_worst_of_many_stops_early_and_who_has_trained_to_the_end_counts(tmp_path: Path, rule: str) -> None:
    config = sweep_of(tmp_path, stopping_rule=rule)
    scheduler = early_stopping(config, objective_of(config))
    assert scheduler is not None
    controller: Any = Controller()
    ends: dict[float, int] = {}
    for accuracy in (0.9, 0.8, 0.7, 0.6, 0.1):
        trial = Trial("trial", stub=True)
        scheduler.on_trial_add(controller, trial)
        told, last = evaluations(config, accuracy)
        ends[accuracy] = 0
        for result in told:
            decision = scheduler.on_trial_result(controller, trial, result)
            assert decision != TrialScheduler.PAUSE
            if decision == TrialScheduler.STOP:
                break
            ends[accuracy] += METRIC in result
        else:
            scheduler.on_trial_complete(controller, trial, last)
    assert ends[0.9] == EPOCHS - 1
    assert ends[0.1] < EPOCHS - 1


def test_a_trial_that_resumed_tells_which_evaluation_it_is(tmp_path: Path) -> None:
    told, _ = evaluations(sweep_of(tmp_path), 0.5, first=4)
    assert [result["epoch"] for result in told if METRIC in result] == [4, 5]
    assert [result["step"] for result in told if METRIC not in result] == [40, 50, 60, 60]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seeds": 3}, "seeds is 3: early_stopping leaves the lucky seeds"),
        ({"pretrain.loop.evaluate_every": 0}, "evaluate_every is 0 of 6 epochs: .* give a smaller one"),
        ({"pretrain.loop.evaluate_every": 6}, "evaluate_every is 6 of 6 epochs"),
    ],
)
def test_rules_without_anything_to_compare_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises((UserError, ValueError), match=told):
        objective_of(sweep_of(tmp_path, **changes))


def test_a_metric_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    trial = trial_of(sweep_of(tmp_path), {"lsmcl.mask_ratio": 0.25}, 0)
    record = records.started(trial, {})
    for metrics, failure in (({METRIC: float("nan")}, f"{METRIC} is nan"), ({}, "the trial has")):
        found = trial_process.judged(replace(record, status="finished", metrics=metrics), METRIC)
        assert found.status == "failed"
        assert failure in found.failure
