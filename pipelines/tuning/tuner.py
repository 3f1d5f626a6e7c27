"""Ray Tune around the trials of a sweep: resources, early stopping, lines, signals, and what a trial's process runs.

A trial of one worker trains in its own process, which Tune uses for one trial after the other. That of a trial with
several workers only drives them. A tracking database in a file keeps these processes on the node of the sweep's driver.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler

from pipelines import tracking
from pipelines.config import SweepConfig
from pipelines.errors import StageError, StoppedError, UserError, last_line
from pipelines.running import progress
from pipelines.running.resources import own_node
from pipelines.running.stage import Stage, in_thread, signals_received
from pipelines.training.launcher import name_cluster
from pipelines.tuning.search_space import text_of
from pipelines.tuning.trials import Objective, TrialSettings

# For a place on a node, without what it has to give.
NEXT_TO_NOTHING = 0.001
FAILURE = "failure"
"""Name of what a trial reports that failed by itself, and would fail again."""
POLL_SECONDS = 0.5
# A stopped sweep waits this long for Tune to end the trials' processes; those left end with this one.
STOP_SECONDS = 15.0

RunStage = Callable[..., dict[str, Any]]
"""A stage's `run`: called with its settings, `parent_run` and `on_row`, it returns its result."""


def run_trials(
    stage: Stage,
    config: SweepConfig,
    trials: Mapping[str, TrialSettings],
    objective: Objective,
    concurrent: int,
    runners: Mapping[str, RunStage],
) -> tune.ResultGrid:
    """Run Tune over the trials.

    Args:
        stage: the running sweep.
        config: its settings.
        trials: the trials by their names.
        objective: the metric that they are compared by.
        concurrent: trials at once.
        runners: `run` of each stage of a trial, by the stage's name; they have to pickle.

    Raises:
        StoppedError: a signal requested a stop; the trials' processes were ended.
    """
    trainable = tune.with_parameters(
        run_trial,
        trials=trials,
        config=config,
        objective=objective,
        runners=runners,
        parent=stage.tracker.run_id or "",
    )
    # The lines of this stage say more than Tune's own table and its tracebacks.
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}
    # A trial that failed has no metric.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    stopper, lines = StopOnRequest(), TrialLines(stage.name, objective.metric, len(trials))
    max_failures = max(settings.scale.max_failures for each in trials.values() for settings in each.stages.values())
    tuner = tune.Tuner(
        tune.with_resources(trainable, lambda chosen: _resources(trials[chosen["trial"]])),
        param_space={"trial": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(
            metric=objective.metric,
            mode=objective.mode,
            max_concurrent_trials=concurrent,
            scheduler=ASHAScheduler(time_attr="epoch", max_t=10_000) if config.early_stopping else None,
            # Saves the next trial its imports. The workers of a trial stopped early would keep training.
            reuse_actors=all(trial.here for trial in trials.values()) or not config.early_stopping,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=stage.out,
            callbacks=[lines],
            stop=stopper,
            # Of a process that was lost; the trial resumes from its last checkpoint in another one.
            failure_config=tune.FailureConfig(max_failures=max_failures),
            verbose=0,
        ),
    )
    return _drive(tuner, stopper, lines, stage)


def _resources(trial: TrialSettings) -> tune.PlacementGroupFactory:
    """Return what the process of a trial holds."""
    bundle: dict[str, float] = {}
    if trial.here:
        bundle = {"CPU": trial.held.cpus_per_worker}
        if gpus := trial.held.gpus_per_worker:
            bundle["GPU"] = gpus
    uri = next(iter(trial.stages.values())).tracking.uri
    if not trial.here or tracking.database(uri):
        bundle[own_node()] = NEXT_TO_NOTHING
    return tune.PlacementGroupFactory([bundle])


def _trial_name(trial: Trial) -> str:
    return f"{trial.trial_id}_{trial.config['trial']}"


def _drive(tuner: tune.Tuner, stopper: StopOnRequest, lines: TrialLines, stage: Stage) -> tune.ResultGrid:
    """Run Tune in a thread; in the main thread, `fit` would return at a signal as if it were done."""
    with signals_received(stage, "ending the running trials") as received:
        fit = in_thread(tuner.fit)
        while not fit.done() and not received:
            wait([fit], POLL_SECONDS)
        if received:
            stopper.request()
            wait([fit], STOP_SECONDS)
            raise StoppedError(
                f"stopped as requested after {lines.done} of {lines.trials} trials; their results are saved, and the "
                "same command resumes the others from their last checkpoints",
                128 + received[0],
            )
    return fit.result()


class StopOnRequest(tune.Stopper):
    """Ends all trials once a stop is requested; Tune asks it between two events."""

    def __init__(self) -> None:
        self._requested = False

    def request(self) -> None:
        """Request the end of all trials."""
        self._requested = True

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether one trial is to end."""
        return self._requested

    def stop_all(self) -> bool:
        """Return whether all trials are to end."""
        return self._requested


class TrialLines(tune.Callback):
    """Prints a line when a trial starts and ends.

    Tune pickles it, which a running stage with its tracker does not allow: it has the stage's name.
    """

    def __init__(self, stage: str, metric: str, trials: int) -> None:
        self.trials = trials
        self.done = 0
        self._stage, self._metric = stage, metric
        self._ended = 0

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Print that a trial starts."""
        progress.info(self._stage, f"trial {trial.config['trial']} starts")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Print the metric that a trial reached, or why it failed."""
        if reason := trial.last_result.get(FAILURE):
            self._print_end(trial, "failed", reason)
            return
        self.done += 1
        value = trial.last_result.get(self._metric)
        reached = f"{self._metric} {value:.3f}" if isinstance(value, float) else f"no {self._metric}"
        self._print_end(trial, "done", reached)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Print why a trial failed, and the file with the whole traceback."""
        file = trial.error_file
        reason = f"{last_line(Path(file).read_text())} (see {file})" if file else "no reason given"
        self._print_end(trial, "failed", reason)

    def _print_end(self, trial: Trial, end: str, what: str) -> None:
        self._ended += 1
        progress.info(self._stage, f"trial {trial.config['trial']} {end} ({self._ended} of {self.trials}): {what}")


# --- in a Tune worker -----------------------------------------------------------------------------------------------


def run_trial(
    chosen: dict[str, str],
    trials: Mapping[str, TrialSettings],
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
    trial = trials[chosen["trial"]]
    uri = next(iter(trial.stages.values())).tracking.uri
    tracker = tracking.start(
        replace(config.tracking, uri=uri, run_name=trial.name),
        stage="trial",
        out=trial.out,
        params={f"trial.{key}": text_of(value) for key, value in trial.values.items()},
        parent_run=parent,
    )
    status, found = "FAILED", {}
    on_row = _reporter(objective.metric) if config.early_stopping else None
    failure = ""
    try:
        found = _run_stages(trial, runners, tracker.run_id or "", on_row)
        status = "FINISHED"
    except (UserError, StageError) as error:
        # Tune would start it again, as it does after the loss of a process.
        failure = str(error)
    except SystemExit:
        # Tune's way to stop a trial early.
        status = "KILLED"
        raise
    finally:
        tracker.log(found, step=None)
        tracker.finish(status)
    if not failure and objective.metric not in found:
        failure = f"metric is {objective.metric!r}: the trial has {', '.join(sorted(found))}"
    tune.report({FAILURE: failure} if failure else found)


def _run_stages(
    trial: TrialSettings,
    runners: Mapping[str, RunStage],
    run_id: str,
    on_row: Callable[[int, dict[str, float]], None] | None,
) -> dict[str, float]:
    """Return the metrics of a trial's stages; where two have one of the same name, the later stage's."""
    found: dict[str, float] = {}
    last = list(trial.stages)[-1]
    for stage, settings in trial.stages.items():
        result = runners[stage](settings, parent_run=run_id, on_row=on_row if stage == last else None)
        metrics = result["metrics"]
        # The best checkpoint's value, where there is one, stands for the trial rather than the last epoch's.
        best = {key.removeprefix("best/"): value for key, value in metrics.items() if key.startswith("best/")}
        found |= {key: value for key, value in metrics.items() if not key.startswith("best/")} | best
    return found


def _reporter(metric: str) -> Callable[[int, dict[str, float]], None]:
    """Return the function that reports the metric of each evaluation to Tune's early stopping."""
    count = 0

    def report(step: int, row: dict[str, float]) -> None:
        nonlocal count
        if metric in row:
            count += 1
            tune.report({metric: row[metric], "epoch": count})

    return report
