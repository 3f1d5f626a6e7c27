"""What a trial's process runs: the stages of the trial, under an MLflow run of its own.

A trial of one worker trains in that process, which Tune uses for one trial after the other. That of a trial with
several workers only drives them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray import tune

from pipelines import storage, tracking
from pipelines.config import SweepConfig
from pipelines.errors import StageError, UserError
from pipelines.running.run_folder import CHECKPOINTS
from pipelines.training.launcher import name_cluster
from pipelines.tuning import population, records
from pipelines.tuning.records import Record
from pipelines.tuning.search_space import text_of
from pipelines.tuning.trial_queue import FAILED_IN, FAILURE, PRETRAINED, SECONDS, TRIAL
from pipelines.tuning.trials import Objective, TrialSettings
from s5.checkpoints.history import checkpoint_name

REPORT_SECONDS = 1.0
"""Least time between reports that only say that a trial trains; by the answer it hears of the sweep's end."""

RunStage = Callable[..., dict[str, Any]]
"""A stage's `run`: called with its settings, `parent_run` and `on_row`, it returns its result."""


def run_trial(
    chosen: Mapping[str, TrialSettings],
    config: SweepConfig,
    objective: Objective,
    runners: Mapping[str, RunStage],
    parent: str,
) -> None:
    """Run the stages of one trial; their MLflow runs nest under the trial's, and that under the sweep's."""
    # Tune gives a stopped trial 2 s to return, and else fails the next one. It finishes its step and saves; where it
    # hangs, its watchdog ends the process.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "86400"
    name_cluster()
    trial = chosen[TRIAL]
    uri = next(iter(trial.stages.values())).tracking.uri
    tracker = tracking.start(
        replace(config.tracking, uri=uri, run_name=trial.name),
        stage="trial",
        out=trial.out,
        params={f"trial.{key}": text_of(value) for key, value in trial.values.items()}
        | {"seed": trial.seed, "length": trial.length}
        | ({"member": trial.setting, "epoch": trial.epoch, "start": trial.start} if trial.epoch else {}),
        parent_run=parent,
    )
    record = replace(records.read(records.path_of(trial)), run_id=tracker.run_id or "")
    run, status = StagesOfTrial(trial, objective.metric if config.early_stopping else ""), "FAILED"
    try:
        record = run(record, runners)
        if record.status == "finished":
            record = judged(record, objective.metric)
        status = "FINISHED" if record.status == "finished" else "FAILED"
    except SystemExit:
        # Tune's way to stop a trial early.
        status = "KILLED"
        raise
    finally:
        tracker.log(record.metrics, step=None)
        tracker.finish(status)
    records.write(trial, record)
    if record.failure:
        tune.report({FAILURE: record.failure, FAILED_IN: run.stage})
    else:
        tune.report(record.metrics | {SECONDS: record.seconds})


def judged(record: Record, metric: str) -> Record:
    """Return the record of a trial at its end; without a finite value of the metric it failed."""
    if metric not in record.metrics:
        known = ", ".join(sorted(record.metrics))
        return records.failed(record, f"metric is {metric!r}: the trial has {known}")
    if not math.isfinite(value := record.metrics[metric]):
        return records.failed(record, f"{metric} is {value}")
    return record


class StagesOfTrial:
    """Runs a trial's stages.

    Args:
        trial: the trial.
        followed: metric whose evaluations Tune is told, for its early stopping; empty for none. That of the last step
            is not: there is nothing left to stop.
    """

    def __init__(self, trial: TrialSettings, followed: str) -> None:
        self._trial = trial
        self._followed = followed
        self._epoch = 0.0
        self._reported = 0.0
        self.stage = ""
        """The stage that runs, or ran last."""

    def __call__(self, record: Record, runners: Mapping[str, RunStage]) -> Record:
        """Return the record with what the stages gave, or why one failed: Tune would start it again, as it does after
        the loss of a process."""
        try:
            population.begin(self._trial)
            for stage, settings in self._trial.stages.items():
                self.stage = stage
                is_last = stage == list(self._trial.stages)[-1]
                result = runners[stage](settings, parent_run=record.run_id, on_row=self._report)
                # The best checkpoint of a member's part may be the one that it began from.
                is_part = self._trial.epoch > 0
                checkpoint = last_checkpoint(settings.out, result) if is_part else result["checkpoint"]
                metrics = record.metrics | metrics_of(result, best=not is_part)
                seconds = (record.seconds or 0.0) + result["seconds"]
                record = replace(record, metrics=metrics, seconds=seconds, checkpoint=checkpoint)
                if not is_last:
                    tune.report({PRETRAINED: True})
        except (UserError, StageError) as error:
            return records.failed(record, str(error))
        except (MemoryError, RuntimeError) as error:
            text = f"{type(error).__name__}: {error}"
            if not records.is_short_of_memory(text):
                raise
            return records.failed(record, text)
        return replace(record, status="finished")

    def _report(self, step: int, row: dict[str, float]) -> None:
        """Tell Tune that the trial trains, and its early stopping the metric of an evaluation.

        Raises:
            SystemExit: Tune ends the trial.
        """
        last, settings = list(self._trial.stages.items())[-1]
        # Each evaluation has a row of the training just before it.
        self._epoch = row.get("train/epoch", self._epoch)
        is_end = step >= settings.loop.steps if settings.loop.steps else self._epoch >= settings.loop.epochs
        if self.stage == last and self._followed in row and not is_end:
            epoch = round(self._epoch / settings.loop.evaluate_every)
            tune.report({self._followed: row[self._followed], "epoch": epoch})
        elif time.monotonic() - self._reported >= REPORT_SECONDS:
            tune.report({"step": step})
            self._reported = time.monotonic()


def last_checkpoint(out: str, result: Mapping[str, Any]) -> str:
    """Return the last checkpoint of a training stage's folder, from the stage's result."""
    return storage.join(out, CHECKPOINTS, checkpoint_name(result["counts"]["steps"]))


def metrics_of(result: Mapping[str, Any], *, best: bool) -> dict[str, float]:
    """Return a stage's metrics.

    Args:
        result: the stage's.
        best: the best checkpoint's value, where there is one, stands for that of the last epoch.
    """
    metrics = result["metrics"]
    found = {key: value for key, value in metrics.items() if not key.startswith("best/")}
    if best:
        found |= {key.removeprefix("best/"): value for key, value in metrics.items() if key.startswith("best/")}
    return found
