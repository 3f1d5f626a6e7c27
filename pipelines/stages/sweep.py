"""Sweep stage: Ray Tune over settings of pretraining and fine-tuning; a trial runs these stages one after another."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from pipelines import tracking
from pipelines.config import FinetuneConfig, PretrainConfig, SweepConfig, to_json
from pipelines.errors import StageError, UserError
from pipelines.running.progress import info
from pipelines.running.resources import ensure_ray
from pipelines.running.stage import Stage, stage_run
from pipelines.stages import finetune, pretrain
from pipelines.tuning import results
from pipelines.tuning.placement import fit_cluster
from pipelines.tuning.plans import examples, finished, plan_of
from pipelines.tuning.population import line_of
from pipelines.tuning.ready_spaces import resolved
from pipelines.tuning.search_space import parse
from pipelines.tuning.trial_process import RunStage
from pipelines.tuning.trial_queue import Plan
from pipelines.tuning.trials import OBJECTIVE, best_settings, trial_of
from pipelines.tuning.tuner import run_trials

RUNNERS: dict[str, RunStage] = {"pretrain": pretrain.run, "finetune": finetune.run}
BEST = "best"
"""Folder below --out with the settings of each stage that were best: `--config` takes them."""
SCHEDULE = f"{BEST}/schedule.json"
"""Values of a population's best member in the course of its training."""
SHOWN = 12
"""Settings that are printed at the end."""


def run(config: SweepConfig) -> dict[str, Any]:
    """Run all trials and return the stage's result; the same --out skips finished trials and retries failed ones.

    Raises:
        UserError: the space, the metric, the settings or the cluster do not fit; before any work.
        StageError: every trial failed.
        StoppedError: a signal requested a stop; finished trials are saved.
    """
    config = resolved(config)
    if (result := finished(config)) is not None:
        info("sweep", f"{config.out} is finished already; give another --out to sweep again, or more to sweep over")
        return result
    plan = plan_of(config, check_stage)
    # Without the setting, its value depends on other settings, which the report need not understand.
    chosen = {f"{OBJECTIVE}{name}": value for name, value in asdict(plan.objective).items()}
    placement = None
    if plan.waiting or plan.proposals:
        ensure_ray()
        placement = fit_cluster(config, examples(config, parse(config)), plan.most_at_once)
    with stage_run("sweep", config, params=chosen) as stage:
        if (few := plan.total // config.seeds) < config.samples and config.search == "random":
            stage.info(f"the space has about {few} settings only, fewer than {config.samples} samples")
        if placement is not None:
            stage.info(
                f"{plan.total} trials of {config.stages}, {len(plan.records)} of them done, {placement.concurrent} at "
                f"once; metric {plan.objective.metric}"
            )
            try:
                run_trials(stage, plan, placement, RUNNERS)
            finally:
                tracking.end_open_runs(stage.tracker.uri, config.tracking.experiment, stage.tracker.run_id or "")
        conclude(stage, plan)
    return stage.result


def check_stage(settings: PretrainConfig | FinetuneConfig, metric: str, makes_checkpoint: bool) -> dict[str, str]:
    """Check a stage of a trial as the stage does itself, and that it gives the metric; return its inputs' digests.

    Args:
        settings: of the stage.
        metric: that trials are compared by.
        makes_checkpoint: whether the checkpoint comes from the trial's own pretraining, and does not exist yet.

    Raises:
        UserError: what the stage would say.
    """
    if isinstance(settings, PretrainConfig):
        probe = metric.partition("/")[0]
        if probe in ("knn", "linear") and settings.probe not in (probe, "both"):
            raise UserError(f"metric is {metric!r}: pretrain.probe is {settings.probe!r}; give {probe} or both")
        pretraining = pretrain.build_job(settings)
        if len(pretraining.probe_train) < 2 and metric.startswith("knn/"):
            raise UserError(
                f"metric is {metric!r}: pretrain.probe_videos is {settings.probe_videos}, and the probe needs 2 "
                "training videos with labels at least; raise it, label the videos or compare by train/loss"
            )
        return pretraining.inputs
    job = finetune.build_job(replace(settings, checkpoint="") if makes_checkpoint else settings)
    if len(job.val) == 0 and metric.startswith("val/"):
        raise UserError(
            f"metric is {metric!r}: the manifest has no videos in split val; index --val-share makes one, or compare "
            "by train/loss"
        )
    return job.inputs


def conclude(stage: Stage, plan: Plan) -> None:
    """Write sweep.parquet, the settings with their means, and the best ones as files that `--config` takes; of a
    population the schedule of the best member.

    Raises:
        StageError: no trial finished.
    """
    config, metric = plan.config, plan.objective.metric
    dimensions, found = parse(config), list(plan.records.values())
    stage.tracker.artifact(stage.folder.write_table(results.TABLE, results.table(list(dimensions), plan.records)))
    # Members of a population are compared at their end; one that failed before took over another.
    end = plan.population.ends[-1] if plan.population else 0
    failures = [record.failure for record in found if record.failure]
    failed = [record for record in found if record.failure and record.epoch == end]
    stage.counts |= {"trials": len(found), "failed": len(failed)}
    compared = {out: record for out, record in plan.records.items() if record.epoch == end}
    rows = results.settings_table(dimensions, compared, plan.objective)
    if not rows:
        reason = failures[0] if failures else "none finished"
        what = "no member is left of the population" if plan.population else f"every one of {len(found)} trials failed"
        raise StageError(f"{what}, as: {reason}")
    best = results.best_trial(compared, rows[0]["setting"], plan.objective)
    stage.metrics[metric] = rows[0][metric]["mean"]
    stage.details |= {"settings": rows, "best": rows[0]["setting"], "checkpoint": best.checkpoint}
    if rows[0]["seeds"] > 1:
        stage.info("means and 95 % intervals over seeds:")
    for row in rows[:SHOWN]:
        stage.info(results.in_words(row, metric))
    if len(rows) > SHOWN:
        stage.info(f"and {len(rows) - SHOWN} more settings in {results.TABLE}")
    if plan.population is not None:
        schedule = results.schedule(line_of(best, plan.records), plan.objective)
        stage.details["schedule"] = schedule
        stage.info(f"schedule of the best: {stage.folder.write_json(SCHEDULE, schedule)}")
        stage.info(f"best: {rows[0]['setting']} with {metric} {rows[0][metric]['mean']:.3f}, in {best.checkpoint}")
        return
    pretrained = trial_of(config, best.values, best.seed).pretrained
    for name, settings in best_settings(config, best.values, pretrained).items():
        path = stage.folder.write_json(f"{BEST}/{name}.json", to_json(name, settings))
        stage.info(f"best settings of {name}, for --config: {path}")
    stage.info(f"best: {rows[0]['setting']} with {metric} {rows[0][metric]['mean']:.3f}")
