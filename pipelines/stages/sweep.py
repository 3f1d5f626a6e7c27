"""Sweep stage: Ray Tune over settings of pretraining and fine-tuning; a trial runs these stages one after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from pipelines import storage, tracking
from pipelines.config import FinetuneConfig, PretrainConfig, SweepConfig
from pipelines.errors import StageError, UserError, last_line
from pipelines.running.progress import info
from pipelines.running.resources import ensure_ray
from pipelines.running.stage import Stage, finished, stage_run
from pipelines.stages import finetune, pretrain
from pipelines.tuning.search_space import check, parse
from pipelines.tuning.trials import OBJECTIVE, Objective, TrialSettings, fit_cluster, objective_of, trial_settings
from pipelines.tuning.tuner import FAILURE, RunStage, run_trials

RUNNERS: dict[str, RunStage] = {"pretrain": pretrain.run, "finetune": finetune.run}


def run(config: SweepConfig) -> dict[str, Any]:
    """Run all trials and return the stage's result; the same --out skips finished trials and retries failed ones.

    Raises:
        UserError: the space, the metric, the settings or the cluster do not fit; before any work.
        StageError: every trial failed.
        StoppedError: a signal requested a stop; finished trials are saved.
    """
    result = finished("sweep", config)
    if result is not None and not result["counts"]["failed"]:
        info("sweep", f"{config.out} is finished already; give another --out to sweep again")
        return result
    dimensions = parse(config)
    check(config, dimensions)
    objective = objective_of(config)
    trials = trial_settings(config, dimensions)
    check_trials(trials, objective)
    # Without the setting, its value depends on other settings, which the report need not understand.
    chosen = {f"{OBJECTIVE}{name}": value for name, value in asdict(objective).items()}
    with stage_run("sweep", config, params=chosen) as stage:
        ensure_ray()
        trials, concurrent = fit_cluster(config, trials)
        by_name = {trial.name: trial for trial in trials}
        stage.info(f"{len(trials)} trials of {config.stages}, {concurrent} at once; metric {objective.metric}")
        try:
            grid = run_trials(stage, config, by_name, objective, concurrent, RUNNERS)
        finally:
            tracking.end_open_runs(stage.tracker.uri, config.tracking.experiment, stage.tracker.run_id or "")
        conclude(stage, by_name, objective, list(grid), list(grid.errors))  # type: ignore[call-overload]
    return stage.result


def check_trials(trials: Iterable[TrialSettings], objective: Objective) -> None:
    """Check the manifests, checkpoints and settings of every trial before one starts.

    Raises:
        UserError: names the trial, and what its stage would say.
    """
    for trial in trials:
        try:
            for settings in trial.stages.values():
                _check_trial(settings, objective.metric, own_checkpoint="pretrain" in trial.stages)
        except UserError as error:
            raise UserError(f"trial {trial.name}: {error}") from None


def _check_trial(settings: PretrainConfig | FinetuneConfig, metric: str, own_checkpoint: bool) -> None:
    if isinstance(settings, PretrainConfig):
        if len(pretrain.build_job(settings).probe_train) < 2 and metric.startswith("knn/"):
            raise UserError(
                f"metric is {metric!r}: pretrain.probe_videos is {settings.probe_videos}, and the probe needs 2 "
                "training videos with labels at least; raise it, label the videos or compare by train/loss"
            )
        return
    # A checkpoint that the trial's own pretraining writes does not exist yet.
    job = finetune.build_job(replace(settings, checkpoint="") if own_checkpoint else settings)
    if len(job.val) == 0 and metric.startswith("val/"):
        raise UserError(
            f"metric is {metric!r}: the manifest has no videos in split val; index --val-share makes one, or compare "
            "by train/loss"
        )


def conclude(
    stage: Stage,
    trials: Mapping[str, TrialSettings],
    objective: Objective,
    results: Sequence[Any],
    errors: Sequence[Exception],
) -> None:
    """Write the trials' results, and the best of the trials that finished.

    Args:
        stage: the running sweep.
        trials: the trials by their names.
        objective: the metric that they are compared by.
        results: Tune's result of each trial.
        errors: the errors of those whose processes were lost.

    Raises:
        StageError: no trial finished.
    """
    metric = objective.metric
    rows: list[dict[str, Any]] = []
    done: list[dict[str, Any]] = []
    failures = [last_line(str(error)) for error in errors]
    for result in results:
        trial, found = trials[result.config["trial"]], result.metrics or {}
        rows.append({"trial": trial.name, "values": trial.values, metric: found.get(metric)})
        failures += [found[FAILURE]] if found.get(FAILURE) else []
        # A trial that was stopped early has a value and no result.
        if rows[-1][metric] is not None and storage.exists(trial.result):
            done.append(rows[-1])
    stage.counts |= {"trials": len(rows), "failed": len(failures)}
    if not done:
        reason = failures[0] if failures else "none finished"
        raise StageError(f"every one of {len(rows)} trials failed, as: {reason}")
    best = (max if objective.mode == "max" else min)(done, key=lambda row: row[metric])
    stage.metrics[metric] = best[metric]
    stage.details |= {"trials": rows, "best": best["trial"]}
    stage.details["checkpoint"] = storage.read_json(trials[best["trial"]].result)["checkpoint"]
    stage.info(f"best: {best['trial']} with {metric} {best[metric]:.3f}")
