"""Sweep stage: Ray Tune over the settings of pretraining and fine-tuning; a trial runs these stages one after another.

A trial's driver is light and stays on the node of the sweep's driver, where the tracking database is; its training
workers and decode tasks go anywhere in the cluster.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler

from pipelines import finetune, pretrain, storage, tracking
from pipelines.cluster import ensure_ray, own_node, resources
from pipelines.config import FinetuneConfig, PretrainConfig, ScaleConfig, SweepConfig, UserError, override
from pipelines.space import Choice, Dimension, check, configured, name_of, parse, stages
from pipelines.stage import Stage, StageError, finished, progress, stage_run

# A trial's driver holds no CPU, only its place.
NEXT_TO_NOTHING = 0.001


def run(config: SweepConfig) -> dict[str, Any]:
    """Run all trials and return the stage's result; the same --out skips the trials that are done.

    Raises:
        UserError: the space, the settings or the cluster do not fit; before any work.
        StageError: every trial failed.
    """
    if (result := finished("sweep", config)) is not None:
        progress("sweep", f"{config.out} is finished already; give another --out to sweep anew")
        return result
    dimensions = parse(config)
    check(config, dimensions)
    prepare(config)
    with stage_run("sweep", config) as stage:
        ensure_ray()
        fitted = fit_cluster(config)
        trials = total_trials(config, dimensions)
        stage.progress(
            f"{trials} trials of {config.stages}, {fitted.concurrent_trials} at once; metric {metric(config)}"
        )
        grid = tune_all(stage, fitted, dimensions, trials)
        conclude(stage, config, grid)
    return stage.result


def prepare(config: SweepConfig) -> None:
    """Check the manifests and settings of the stages before any trial starts."""
    if "pretrain" in stages(config):
        pretrain.prepare(config.pretrain)
    if "finetune" in stages(config):
        checkpoint = "" if "pretrain" in stages(config) else config.finetune.checkpoint
        finetune.prepare(replace(config.finetune, checkpoint=checkpoint))


def metric(config: SweepConfig) -> str:
    """Return the name of the metric that trials are compared by."""
    if config.metric:
        return config.metric
    if "finetune" not in stages(config):
        return "knn/top1"
    return "val/accuracy" if config.finetune.task == "class" else "val/mse"


def order(config: SweepConfig) -> str:
    """Return `min` for errors and losses, else `max`."""
    return "min" if metric(config).rpartition("/")[2] in ("mse", "loss") else "max"


def total_trials(config: SweepConfig, dimensions: dict[str, Dimension]) -> int:
    """Return the number of trials: every combination of the choices, as often as the ranges are drawn."""
    total = config.samples
    for dimension in dimensions.values():
        total *= len(dimension.values) if isinstance(dimension, Choice) else 1
    return total


def fit_cluster(config: SweepConfig) -> SweepConfig:
    """Return the settings with the trials that run at once, and each trial's share of the decoding, worked out.

    Tune does not know what the training workers of a trial hold, so this has to.
    """
    scales = [getattr(config, stage).scale for stage in stages(config)]
    data = [getattr(config, stage).data for stage in stages(config)]
    need = max(s.num_workers * (s.cpus_per_worker + d.cpus_per_decode) for s, d in zip(scales, data, strict=True))
    total = resources()["CPU"]
    fit = int((total + 1e-6) / need)
    gpus = max(s.num_workers * s.gpus_per_worker for s in scales)
    if gpus:
        fit = min(fit, int(resources().get("GPU", 0) / gpus))
    if fit < 1:
        raise UserError(
            f"scale.num_workers is {scales[0].num_workers}: a trial needs {need:g} CPUs and {gpus:g} GPUs with its "
            f"decoding, and the cluster has {total:g} CPUs; lower it, cpus_per_worker or data.cpus_per_decode"
        )
    concurrent = min(config.concurrent_trials or fit, fit)
    return replace(
        config,
        concurrent_trials=concurrent,
        pretrain=_share(config.pretrain, total, concurrent),
        finetune=_share(config.finetune, total, concurrent),
    )


def _share(config: Any, total: float, concurrent: int) -> Any:
    scale: ScaleConfig = config.scale
    free = total / concurrent - scale.num_workers * scale.cpus_per_worker
    tasks = max(scale.num_workers, int((free + 1e-6) / config.data.cpus_per_decode))
    return replace(config, data=replace(config.data, decode_tasks=min(tasks, config.data.decode_tasks or tasks)))


def tune_all(stage: Stage, config: SweepConfig, dimensions: dict[str, Dimension], trials: int) -> tune.ResultGrid:
    """Run Tune over the space."""
    where = {own_node(): NEXT_TO_NOTHING}
    # A trial lies in another folder: left to itself it would take the database beside that.
    config = replace(config, out=stage.out, tracking=replace(config.tracking, uri=stage.tracker.uri))
    trainable = tune.with_parameters(trial, config=config, parent=stage.tracker.run_id or "")
    # Tune's own table of the experiment says less than the lines of this stage.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    scheduler = ASHAScheduler(time_attr="epoch", max_t=10_000) if config.early_stopping else None
    tuner = tune.Tuner(
        tune.with_resources(trainable, where),
        param_space={key: _domain(dimension) for key, dimension in dimensions.items()},
        tune_config=tune.TuneConfig(
            metric=metric(config),
            mode=order(config),
            num_samples=config.samples,
            max_concurrent_trials=config.concurrent_trials,
            scheduler=scheduler,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=stage.out, callbacks=[Lines(metric(config), trials)], verbose=0
        ),
    )
    return tuner.fit()


def _domain(dimension: Dimension) -> Any:
    if isinstance(dimension, Choice):
        return tune.grid_search(list(dimension.values))
    return (tune.loguniform if dimension.log else tune.uniform)(dimension.low, dimension.high)


def _trial_name(trial: Trial) -> str:
    return f"{trial.trial_id}_{name_of(trial.config)}"


class Lines(tune.Callback):
    """A line in the terminal when a trial starts and ends."""

    def __init__(self, metric: str, trials: int) -> None:
        self._metric, self._trials = metric, trials
        self._ended = 0

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say that a trial starts."""
        progress("sweep", f"trial {name_of(trial.config)} starts")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say what a trial has reached."""
        self._ended += 1
        value = trial.last_result.get(self._metric)
        reached = f"{self._metric} {value:.3f}" if isinstance(value, float) else f"no {self._metric}"
        progress("sweep", f"trial {name_of(trial.config)} done ({self._ended} of {self._trials}): {reached}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say that a trial has failed."""
        self._ended += 1
        progress("sweep", f"trial {name_of(trial.config)} failed ({self._ended} of {self._trials}): {trial.error_file}")


def trial(values: dict[str, Any], config: SweepConfig, parent: str) -> None:
    """Run the stages of one trial in a Tune worker; its stages' runs nest under its own, and that under the sweep's."""
    out = storage.join(config.out, "trials", name_of(values))
    tracker = tracking.start(
        replace(config.tracking, run_name=name_of(values)),
        stage="trial",
        out=out,
        params={f"trial.{key}": value for key, value in values.items()},
        parent_run=parent,
    )
    name = metric(config)
    found: dict[str, float] = {}
    status = "FAILED"
    try:
        for stage in stages(config):
            run = cast(Callable[..., dict[str, Any]], {"pretrain": pretrain.run, "finetune": finetune.run}[stage])
            last = stage == stages(config)[-1]
            on_row = _report(name) if last and config.early_stopping else None
            result = run(trial_config(config, stage, values, out), parent_run=tracker.run_id or "", on_row=on_row)
            found |= {key.removeprefix("best/"): value for key, value in result["metrics"].items()}
            # The best checkpoint's value, where there is one, stands for the trial rather than the last epoch's.
            found |= {k.removeprefix("best/"): v for k, v in result["metrics"].items() if k.startswith("best/")}
        status = "FINISHED"
    finally:
        tracker.log(found, step=None)
        tracker.finish(status)
    if name not in found:
        raise StageError(f"metric is {name!r}: the trial has {', '.join(sorted(found))}")
    tune.report(found)


def trial_config(config: SweepConfig, stage: str, values: dict[str, Any], out: str) -> PretrainConfig | FinetuneConfig:
    """Return the settings of one stage of a trial."""
    changes = configured(config, stage, values)
    changes |= {"out": storage.join(out, stage), "tracking.uri": config.tracking.uri, "tracking.run_name": stage}
    changes |= {"tracking.experiment": config.tracking.experiment}
    if stage == "finetune" and "pretrain" in stages(config):
        changes["checkpoint"] = storage.join(out, "pretrain")
    return cast(PretrainConfig | FinetuneConfig, override(getattr(config, stage), changes))


def _report(name: str) -> Callable[[int, dict[str, float]], None]:
    """Return what hands the metric of each evaluation to Tune's early stopping."""
    count = 0

    def report(step: int, row: dict[str, float]) -> None:
        nonlocal count
        if name in row:
            count += 1
            tune.report({name: row[name], "epoch": count})

    return report


def conclude(stage: Stage, config: SweepConfig, grid: tune.ResultGrid) -> None:
    """Write the trials' results and the best one."""
    name = metric(config)
    rows = [
        {"trial": name_of(result.config or {}), "values": result.config, name: (result.metrics or {}).get(name)}
        for result in list(grid)  # type: ignore[call-overload]
    ]
    done = [row for row in rows if row[name] is not None]
    stage.counts |= {"trials": len(rows), "failed": len(grid.errors)}
    if not done:
        error = str(grid.errors[0]).strip().splitlines()[-1] if grid.errors else "none reported its metric"
        raise StageError(f"every one of {len(rows)} trials failed, as: {error}")
    best = (max if order(config) == "max" else min)(done, key=lambda row: row[name])
    stage.metrics[name] = best[name]
    stage.details |= {"trials": rows, "best": best["trial"]}
    stage.details["checkpoint"] = _checkpoint_of(stage, config, best["trial"])
    stage.progress(f"best: {best['trial']} with {name} {best[name]:.3f}")


def _checkpoint_of(stage: Stage, config: SweepConfig, name: str) -> str:
    result = storage.read_json(stage.path("trials", name, stages(config)[-1], "result.json"))
    return str(result["checkpoint"])
