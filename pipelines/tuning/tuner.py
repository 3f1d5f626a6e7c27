"""Ray Tune around the trials of a sweep: resources, early stopping, lines and signals.

A tracking database in a file keeps the processes of trials on the node of the sweep's driver.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from pipelines import storage, tracking
from pipelines.config import SweepConfig, paths
from pipelines.errors import StoppedError
from pipelines.running import progress
from pipelines.running.resources import nodes, own_node
from pipelines.running.stage import Stage, in_thread, signals_received
from pipelines.tuning import records
from pipelines.tuning.placement import Placement
from pipelines.tuning.search_space import stages
from pipelines.tuning.trial_process import RunStage, run_trial
from pipelines.tuning.trial_queue import TRIAL, Plan, TrialQueue
from pipelines.tuning.trials import Objective, TrialSettings

# For a place on a node, without what it has to give.
NEXT_TO_NOTHING = 0.001
DRIVER_BYTES = 1 << 30
"""Memory of a trial's process that drives workers."""
POLL_SECONDS = 0.5
# A stopped sweep waits this long for Tune to end the trials' processes; those left end with this one.
STOP_SECONDS = 15.0
MEDIAN_OF = 3
"""Trials that the median rule compares with at least."""
ENDS = {"stopped": "stopped early", "running": "stopped"}
"""What lines say of a trial that did not run to its end."""


def run_trials(
    stage: Stage,
    plan: Plan,
    placement: Placement,
    runners: Mapping[str, RunStage],
) -> None:
    """Run Tune over the trials of a plan, which has their records then.

    Args:
        stage: the running sweep.
        plan: the trials.
        placement: how they share the cluster.
        runners: `run` of each stage of a trial, by the stage's name; they have to pickle.

    Raises:
        StoppedError: a signal requested a stop; the trials' processes were ended.
    """
    config, objective = plan.config, plan.objective
    trainable = tune.with_parameters(
        run_trial, config=config, objective=objective, runners=runners, parent=stage.tracker.run_id or ""
    )
    # The lines of this stage say more than Tune's own table and its tracebacks.
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}
    # A trial that failed has no metric.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # Each of the many reports would add all settings to files that nobody reads; at the end Tune warns of their lack.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    stopper = StopOnRequest()
    lines = TrialLines(stage.name, plan, stopper)
    scales = [getattr(config, name).scale for name in stages(config)]
    tuner = tune.Tuner(
        tune.with_resources(trainable, lambda chosen: tune.PlacementGroupFactory([held(chosen[TRIAL], nodes())])),
        tune_config=tune.TuneConfig(
            search_alg=TrialQueue(plan, placement),
            # Until the queue has no more.
            num_samples=-1,
            max_concurrent_trials=placement.concurrent,
            scheduler=early_stopping(config, objective),
            # Saves the next trial its imports. The workers of a trial stopped early would keep training.
            reuse_actors=placement.inside or not config.early_stopping,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=stage.out,
            callbacks=[lines],
            stop=stopper,
            # Of a process that was lost; the trial resumes from its last checkpoint in another one.
            failure_config=tune.FailureConfig(max_failures=max(scale.max_failures for scale in scales)),
            verbose=0,
        ),
    )
    _drive(tuner, stopper, lines, stage)


def early_stopping(config: SweepConfig, objective: Objective) -> TrialScheduler | None:
    """Return the rule of early stopping."""
    if not config.early_stopping:
        return None
    metric, mode = objective.metric, objective.mode
    if config.stopping_rule == "asha":
        return ASHAScheduler("epoch", metric, mode, max_t=10_000)
    return MedianRule("epoch", metric, mode, grace_period=1, min_samples_required=MEDIAN_OF)


class MedianRule(MedianStoppingRule):
    """Ray's median rule, which lets trials run on while there are few to compare with, rather than pause them: one that
    is paused starts anew."""

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Take no further evaluation: all have been reported."""

    def _on_insufficient_samples(self, tune_controller: Any, trial: Trial, time: float) -> str:
        return str(TrialScheduler.CONTINUE)


def held(trial: TrialSettings, has: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the resources that the process of a trial holds.

    One that only drives workers holds memory, by which Ray spreads such processes over the nodes. It stays on this node
    where it reads or writes what may be seen here alone.

    Args:
        trial: the trial, placed.
        has: resources of each node.
    """
    bundle: dict[str, float] = {}
    if trial.here:
        bundle = {"CPU": trial.held.cpus_per_worker}
        if gpus := trial.held.gpus_per_worker:
            bundle["GPU"] = gpus
    is_database = bool(tracking.database(next(iter(trial.stages.values())).tracking.uri))
    has_room = any(node.get("memory", 0) >= DRIVER_BYTES for node in has)
    if is_database or (not trial.here and not (has_room and _is_seen_everywhere(trial))):
        bundle[own_node()] = NEXT_TO_NOTHING
    elif not trial.here:
        bundle["memory"] = DRIVER_BYTES
    return bundle


def _is_seen_everywhere(trial: TrialSettings) -> bool:
    """Return whether all that a trial reads and writes lies in object stores."""
    named = (path for settings in trial.stages.values() for path, _ in paths(settings).values())
    return all(map(storage.is_uri, named))


def _trial_name(trial: Trial) -> str:
    return f"{trial.trial_id}_{trial.config[TRIAL].name}"


def _drive(tuner: tune.Tuner, stopper: StopOnRequest, lines: TrialLines, stage: Stage) -> None:
    """Run Tune in a thread; in the main thread, `fit` would return at a signal as if it were done."""
    with signals_received(stage, "ending the running trials") as received:
        fit = in_thread(tuner.fit)
        while not fit.done() and not received:
            wait([fit], POLL_SECONDS)
        if received:
            stopper.request()
            wait([fit], STOP_SECONDS)
            raise StoppedError(
                f"stopped as requested after {lines.done} of {lines.total} trials; their results are saved, and the "
                "same command resumes the others from their last checkpoints",
                128 + received[0],
            )
    fit.result()


class StopOnRequest(tune.Stopper):
    """Ends all trials once a stop is requested; Tune asks it between two events."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Request the end of all trials."""
        self.requested = True

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether one trial is to end."""
        return self.requested

    def stop_all(self) -> bool:
        """Return whether all trials are to end."""
        return self.requested


class TrialLines(tune.Callback):
    """Prints a line when a trial starts and ends, and keeps the record of its end.

    Tune pickles it, which a running stage with its tracker does not allow: it has the stage's name.
    """

    def __init__(self, stage: str, plan: Plan, stopper: StopOnRequest) -> None:
        self.total = plan.total
        self.done = sum(record.status in records.ENDED for record in plan.records.values())
        self._stage, self._metric, self._records = stage, plan.objective.metric, plan.records
        self._stopper = stopper

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Print that a trial starts."""
        progress.info(self._stage, f"trial {trial.config[TRIAL].name} starts")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Print the metric that a trial reached, or why it failed."""
        settings: TrialSettings = trial.config[TRIAL]
        record = records.read(records.path_of(settings))
        value = record.metrics.get(self._metric, trial.metric_analysis.get(self._metric, {}).get("last"))
        if record.status == "running" and not self._stopper.requested:
            found = {self._metric: value} if isinstance(value, float) else {}
            record = records.write(settings, replace(record, status="stopped", metrics=found))
        self._records[settings.out] = record
        if record.failure:
            self._print_end(settings, "failed", record.failure)
            return
        self.done += record.status in records.ENDED
        reached = f"{self._metric} {value:.3f}" if isinstance(value, float) else f"no {self._metric}"
        self._print_end(settings, ENDS.get(record.status, "done"), reached)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Print why a trial's process was lost, and the file with the whole traceback."""
        settings: TrialSettings = trial.config[TRIAL]
        text = Path(trial.error_file).read_text() if trial.error_file else "no reason given"
        record = records.failed(records.read(records.path_of(settings)), text)
        self._records[settings.out] = records.write(settings, record)
        where = f" (see {trial.error_file})" if trial.error_file else ""
        self._print_end(settings, "failed", f"{record.failure}{where}")

    def _print_end(self, trial: TrialSettings, end: str, what: str) -> None:
        ended = sum(record.status != "running" for record in self._records.values())
        progress.info(self._stage, f"trial {trial.name} {end} ({ended} of {self.total}): {what}")
