"""Sweep stage: Ray Tune over the settings of pretraining and fine-tuning; a trial runs these stages one after another.

A trial's driver is light and stays on the node of the sweep's driver, where the tracking database is; its training
workers and decode tasks go anywhere in the cluster.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler

from pipelines import storage, tracking
from pipelines.config import FinetuneConfig, PretrainConfig, SweepConfig
from pipelines.errors import StageError, StoppedError, UserError, last_line
from pipelines.running.progress import info
from pipelines.running.resources import ensure_ray, own_node
from pipelines.running.run_folder import RESULT
from pipelines.running.stage import Stage, finished, in_thread, signals_received, stage_run
from pipelines.stages import finetune, pretrain
from pipelines.tuning.search_space import check, parse, stages
from pipelines.tuning.trials import Plan, check_metric, fit_cluster, metric, order, plan

# A trial's driver holds no CPU, only its place.
NEXT_TO_NOTHING = 0.001
POLL_SECONDS = 0.5
# A stopped sweep waits this long for Tune to end the trials' processes; those left end with this one.
STOP_SECONDS = 15.0


def run(config: SweepConfig) -> dict[str, Any]:
    """Run all trials and return the stage's result; the same --out skips what is done and tries failed trials again.

    Raises:
        UserError: the space, the metric, the settings or the cluster do not fit; before any work.
        StageError: every trial failed.
        StoppedError: a signal asked for a stop; what is done is kept.
    """
    result = finished("sweep", config)
    if result is not None and not result["counts"]["failed"]:
        info("sweep", f"{config.out} is finished already; give another --out to sweep anew")
        return result
    dimensions = parse(config)
    check(config, dimensions)
    check_metric(config)
    plans = plan(config, dimensions)
    check_trials(config, plans)
    with stage_run("sweep", config) as stage:
        ensure_ray()
        plans, concurrent = fit_cluster(config, plans)
        by_name = {each.name: each for each in plans}
        stage.info(f"{len(plans)} trials of {config.stages}, {concurrent} at once; metric {metric(config)}")
        try:
            grid = tune_all(stage, config, by_name, concurrent)
        finally:
            tracking.end_open_runs(stage.tracker.uri, config.tracking.experiment, stage.tracker.run_id or "")
        conclude(stage, config, by_name, grid)
    return stage.result


# --- Tune -----------------------------------------------------------------------------------------------------------


def check_trials(config: SweepConfig, plans: list[Plan]) -> None:
    """Check the manifests, checkpoints and settings of every trial before one starts.

    Raises:
        UserError: names the trial, and what its stage would say.
    """
    for each in plans:
        try:
            for settings in each.stages.values():
                _check_trial(settings, metric(config), own_checkpoint="pretrain" in each.stages)
        except UserError as error:
            raise UserError(f"trial {each.name}: {error}") from None


def _check_trial(settings: PretrainConfig | FinetuneConfig, name: str, own_checkpoint: bool) -> None:
    if isinstance(settings, PretrainConfig):
        if len(pretrain.prepare(settings).probe_train) < 2 and name.startswith("knn/"):
            raise UserError(
                f"metric is {name!r}: pretrain.probe_videos is {settings.probe_videos}, and the probe needs 2 training "
                "videos with labels at least; raise it, label the videos or compare by train/loss"
            )
        return
    # A checkpoint that the trial itself is to make is not there yet.
    job = finetune.prepare(replace(settings, checkpoint="") if own_checkpoint else settings)
    if len(job.val) == 0 and name.startswith("val/"):
        raise UserError(
            f"metric is {name!r}: the manifest has no videos in split val; index --val-share makes one, or compare by "
            "train/loss"
        )


def tune_all(stage: Stage, config: SweepConfig, plans: dict[str, Plan], concurrent: int) -> tune.ResultGrid:
    """Run Tune over the trials.

    Raises:
        StoppedError: a signal asked for a stop; the trials' processes have been ended.
    """
    trainable = tune.with_parameters(trial, plans=plans, config=config, parent=stage.tracker.run_id or "")
    # Tune's own table of the experiment says less than the lines of this stage, and so do its tracebacks.
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}
    stop, lines = Stop(), Lines(metric(config), len(plans))
    tuner = tune.Tuner(
        tune.with_resources(trainable, {own_node(): NEXT_TO_NOTHING}),
        param_space={"trial": tune.grid_search(list(plans))},
        tune_config=tune.TuneConfig(
            metric=metric(config),
            mode=order(config),
            max_concurrent_trials=concurrent,
            scheduler=ASHAScheduler(time_attr="epoch", max_t=10_000) if config.early_stopping else None,
            # Saves the next trial its imports. A trial stopped early would go on training in a process that is kept.
            reuse_actors=not config.early_stopping,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=stage.out, callbacks=[lines], stop=stop, verbose=0),
    )
    return _drive(tuner, stop, lines, stage)


def _trial_name(trial: Trial) -> str:
    return f"{trial.trial_id}_{trial.config['trial']}"


class Stop(tune.Stopper):
    """Ends all trials once it is told to; Tune asks it between two events."""

    def __init__(self) -> None:
        self._told = False

    def tell(self) -> None:
        """Have all trials ended."""
        self._told = True

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether one trial is to end."""
        return self._told

    def stop_all(self) -> bool:
        """Return whether all trials are to end."""
        return self._told


def _drive(tuner: tune.Tuner, stop: Stop, lines: Lines, stage: Stage) -> tune.ResultGrid:
    """Run Tune in a thread; the main thread takes signals, after which `fit` itself would return as if it were done."""
    with signals_received(stage, "ending the running trials") as received:
        fit = in_thread(tuner.fit)
        while not fit.done() and not received:
            wait([fit], POLL_SECONDS)
        if received:
            stop.tell()
            wait([fit], STOP_SECONDS)
            raise StoppedError(
                f"stopped as asked after {lines.done} of {lines.trials} trials; these are kept, and the same command "
                "goes on with the others from their last checkpoints",
                128 + received[0],
            )
    return fit.result()


class Lines(tune.Callback):
    """A line in the terminal when a trial starts and ends."""

    def __init__(self, metric: str, trials: int) -> None:
        self.trials = trials
        self.done = 0
        self._metric = metric
        self._ended = 0

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **kwargs: Any) -> None:
        """Say that a trial starts."""
        info("sweep", f"trial {trial.config['trial']} starts")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **kwargs: Any) -> None:
        """Say what a trial has reached."""
        self.done += 1
        value = trial.last_result.get(self._metric)
        reached = f"{self._metric} {value:.3f}" if isinstance(value, float) else f"no {self._metric}"
        self._say(trial, "done", reached)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **kwargs: Any) -> None:
        """Say why a trial has failed, and where the whole story is."""
        file = trial.error_file
        self._say(trial, "failed", f"{last_line(Path(file).read_text())} (see {file})" if file else "no reason given")

    def _say(self, trial: Trial, end: str, what: str) -> None:
        self._ended += 1
        info("sweep", f"trial {trial.config['trial']} {end} ({self._ended} of {self.trials}): {what}")


# --- a trial --------------------------------------------------------------------------------------------------------


def trial(chosen: dict[str, str], plans: dict[str, Plan], config: SweepConfig, parent: str) -> None:
    """Run the stages of one trial in a Tune worker; its stages' runs nest under its own, and that under the sweep's."""
    # Tune gives a trial 2 s to return before it calls its process unfit for the next one: too few on a busy machine.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "30"
    mine = plans[chosen["trial"]]
    uri = next(iter(mine.stages.values())).tracking.uri
    tracker = tracking.start(
        replace(config.tracking, uri=uri, run_name=mine.name),
        stage="trial",
        out=mine.out,
        params={f"trial.{key}": value for key, value in mine.values.items()},
        parent_run=parent,
    )
    status, found = "FAILED", {}
    try:
        found = _run_stages(mine, config, tracker.run_id or "")
        status = "FINISHED"
    except SystemExit:
        # Tune's way to stop a trial early.
        status = "KILLED"
        raise
    finally:
        tracker.log(found, step=None)
        tracker.finish(status)
    if metric(config) not in found:
        raise StageError(f"metric is {metric(config)!r}: the trial has {', '.join(sorted(found))}")
    tune.report(found)


def _run_stages(mine: Plan, config: SweepConfig, run_id: str) -> dict[str, float]:
    """Return the metrics of a trial's stages, of the same name the later stage's."""
    found: dict[str, float] = {}
    for stage, settings in mine.stages.items():
        run = cast(Callable[..., dict[str, Any]], {"pretrain": pretrain.run, "finetune": finetune.run}[stage])
        is_last = stage == stages(config)[-1]
        on_row = _report(metric(config)) if is_last and config.early_stopping else None
        metrics = run(settings, parent_run=run_id, on_row=on_row)["metrics"]
        # The best checkpoint's value, where there is one, stands for the trial rather than the last epoch's.
        best = {key.removeprefix("best/"): value for key, value in metrics.items() if key.startswith("best/")}
        found |= {key: value for key, value in metrics.items() if not key.startswith("best/")} | best
    return found


def _report(name: str) -> Callable[[int, dict[str, float]], None]:
    """Return what hands the metric of each evaluation to Tune's early stopping."""
    count = 0

    def report(step: int, row: dict[str, float]) -> None:
        nonlocal count
        if name in row:
            count += 1
            tune.report({name: row[name], "epoch": count})

    return report


# --- afterwards -----------------------------------------------------------------------------------------------------


def conclude(stage: Stage, config: SweepConfig, plans: dict[str, Plan], grid: tune.ResultGrid) -> None:
    """Write the trials' results and the best one of those that came to their end."""
    name = metric(config)
    rows: list[dict[str, Any]] = []
    done: list[dict[str, Any]] = []
    for result in list(grid):  # type: ignore[call-overload]
        mine = plans[result.config["trial"]]
        rows.append({"trial": mine.name, "values": mine.values, name: (result.metrics or {}).get(name)})
        # A trial that was stopped early has a value and no result.
        if rows[-1][name] is not None and storage.exists(_result_of(mine)):
            done.append(rows[-1])
    stage.counts |= {"trials": len(rows), "failed": len(grid.errors)}
    if not done:
        reason = last_line(str(grid.errors[0])) if grid.errors else "none came to its end"
        raise StageError(f"every one of {len(rows)} trials failed, as: {reason}")
    best = (max if order(config) == "max" else min)(done, key=lambda row: row[name])
    stage.metrics[name] = best[name]
    stage.details |= {"trials": rows, "best": best["trial"]}
    stage.details["checkpoint"] = storage.read_json(_result_of(plans[best["trial"]]))["checkpoint"]
    stage.info(f"best: {best['trial']} with {name} {best[name]:.3f}")


def _result_of(mine: Plan) -> str:
    return storage.join(list(mine.stages.values())[-1].out, RESULT)
