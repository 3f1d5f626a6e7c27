"""Recipe stage: the other stages one after another, from annotations and videos to a row of the paper's tables.

OUT/index, features, pretrain, finetune/seed_N, evaluate/seed_N, report    the --out of each stage
OUT/row.json    the row: published results and ours

The same command goes on where it stood: each stage resumes, and one that is finished is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipelines import storage
from pipelines.config import INPUTS, EvaluateConfig, FinetuneConfig, PretrainConfig, RecipeConfig
from pipelines.data.manifest import check_for_training, read_manifest, split_of
from pipelines.data.protocols import checked_clips, protocol_of
from pipelines.errors import UserError
from pipelines.recipes import steps
from pipelines.recipes.compatibility import check_strides
from pipelines.recipes.dry_run import plan_of
from pipelines.recipes.row import ROW, in_words, row_of
from pipelines.recipes.steps import Step, settings_of, steps_of
from pipelines.running.resources import ensure_ray
from pipelines.running.run_folder import RESULT, SHARDS, RunFolder
from pipelines.running.stage import Stage, finished, stage_run
from pipelines.stages import evaluate, features, finetune, index, pretrain, report
from pipelines.storage.weights import checkpoint_digest

RUNNERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "index": index.run,
    "features": features.run,
    "pretrain": pretrain.run,
    "finetune": finetune.run,
    "evaluate": evaluate.run,
    "report": report.run,
}
SKIPPING = ("features", "pretrain", "finetune")
"""Stages that leave a finished run as it is by themselves, once they have seen that its inputs are the same."""


def run(config: RecipeConfig) -> dict[str, Any]:
    """Run all stages of a recipe and return the stage's result; the same --out resumes.

    Raises:
        UserError: there is no such recipe, it has not what it needs, or a stage's settings and inputs do not fit.
        StageError: a stage failed, or was asked to stop; what it saved is kept.
    """
    steps.check(config)
    if config.dry_run:
        print(plan_of(config), flush=True)
        return {}
    steps.refuse_another(config)
    if has_row(steps_of(config)) and (result := finished("recipe", config, redo="run the recipe again")) is not None:
        return result
    with stage_run("recipe", config) as stage:
        ensure_ray()
        found = run_steps(stage, config)
        stage.counts["steps"] = len(found)
        conclude(stage, config, found)
    return stage.result


def has_row(todo: Sequence[Step]) -> bool:
    """Return whether all is there that the row is of; other folders of a finished recipe may be deleted."""
    measured = [step for step in todo if step.stage in ("finetune", "evaluate")]
    return all(RunFolder.of(step.stage, step.config).exists(RESULT) for step in measured)


def run_steps(stage: Stage, config: RecipeConfig) -> dict[str, dict[str, Any]]:
    """Run the steps that are not finished, and return the result of each."""
    found: dict[str, dict[str, Any]] = {}
    todo = steps_of(config)
    if config.manifest:
        check_training(config, todo)
    for number, step in enumerate(todo, start=1):
        result = earlier_result(step)
        if result is not None:
            stage.info(f"{number}/{len(todo)} {step.name}: finished already")
        else:
            stage.info(f"{number}/{len(todo)} {step.name} -> {step.config.out}")
            result = RUNNERS[step.stage](step.config)
        found[step.name] = result
        if step.stage == "index":
            check_training(config, todo)
    return found


def check_training(config: RecipeConfig, todo: Sequence[Step]) -> None:
    """Check the manifest against the stages that read its videos, before hours go into features.

    Raises:
        UserError: videos are too few, too short or of too high a frame rate, labels are missing, or a split is empty.
    """
    settings = settings_of(todo)
    pretraining, tuning = settings.get("pretrain"), settings.get("finetune")
    if isinstance(pretraining, PretrainConfig):
        manifest = read_manifest(pretraining.manifest)
        check_for_training(manifest, pretraining.clips, pretraining.loop.batch_size, labelled=False)
    if isinstance(tuning, FinetuneConfig):
        manifest = read_manifest(tuning.manifest)
        clips = checked_clips(tuning.clips, protocol_of(manifest, tuning.protocol))
        check_for_training(manifest, clips, tuning.loop.batch_size, labelled=True, task=tuning.task)
        if not len(split_of(manifest, config.evaluate.split)):
            raise UserError(f"evaluate.split is {config.evaluate.split!r}: no video of it can be read; give another")
    if isinstance(reading := pretraining or tuning, PretrainConfig | FinetuneConfig):
        manifest = read_manifest(reading.manifest)
        check_strides(config, settings, protocol_of(manifest), manifest["fps"].to_pylist())


def earlier_result(step: Step) -> dict[str, Any] | None:
    """Return the result of a finished run of a stage that would otherwise run again, if there is one.

    Its inputs are results of the steps before, which have seen whether they are the same; but a checkpoint may have
    been trained again since it was evaluated.

    Raises:
        UserError: it ran with other settings.
    """
    if step.stage in SKIPPING:
        return None
    folder = RunFolder.of(step.stage, step.config)
    before = folder.check_stage()
    inputs = (before or {}).get(INPUTS, {})
    result = replace(folder, inputs=inputs).finished()
    if before is None or not isinstance(step.config, EvaluateConfig):
        return result
    if inputs.get("checkpoint") == checkpoint_digest(step.config.checkpoint):
        return result
    folder.remove(RESULT)
    storage.remove_folder(folder.path(SHARDS))
    return None


def conclude(stage: Stage, config: RecipeConfig, found: dict[str, dict[str, Any]]) -> None:
    """Write the row and print it; without fine-tuning, say where the pretrained checkpoint is."""
    evaluated = [result for name, result in found.items() if name.startswith("evaluate/")]
    if not evaluated:
        if "pretrain" in found:
            stage.details["checkpoint"] = found["pretrain"]["checkpoint"]
            stage.info(
                f"pretrained; fine-tune from it with --finetune.checkpoint {storage.absolute(config.out)}/pretrain"
            )
        return
    row = row_of(config, evaluated)
    stage.metrics |= {"recipe/mean": row["mean"], "recipe/videos": float(row["videos"])}
    stage.details["row"] = row
    path = stage.folder.write_json(ROW, row)
    stage.tracker.artifact(path)
    stage.info(in_words(row))
    stage.info(f"wrote {path}")
