"""The steps of a recipe: which stages run, with which settings, and in which folders below its --out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pipelines import storage, tracking
from pipelines.config import RecipeConfig, StageConfig, override, unknown
from pipelines.config.paper import RECIPES
from pipelines.config.recipes import GROUPS
from pipelines.data.annotations.benchmarks import NAMES, annotations_of
from pipelines.data.manifest import description, read_manifest
from pipelines.errors import UserError
from pipelines.running.run_folder import RunFolder
from pipelines.tracking.uri import OFF


@dataclass(frozen=True)
class Step:
    """One run of a stage."""

    name: str
    """The stage, and the seed where it runs for several: its folder below --out."""
    stage: str
    config: StageConfig


def check(config: RecipeConfig) -> None:
    """Check that a recipe is named, has what it starts from, and has settings that work together.

    It starts from videos and annotations of its benchmark, or a manifest.

    Raises:
        UserError: it is not, has not, or a stage would refuse its settings.
    """
    if not config.name:
        raise UserError(f"no recipe is named: give `recipe NAME` with one of {', '.join(RECIPES)}")
    if config.name not in RECIPES:
        raise UserError(unknown("recipe", config.name, tuple(RECIPES)))
    if config.manifest:
        _check_manifest(config)
    else:
        _check_listing(config)
    settings = settings_of(steps_of(config))
    # It builds models: imported last, it leaves other mistakes their answer within a second.
    from pipelines.recipes.compatibility import check_together

    check_together(config, settings)


def _check_listing(config: RecipeConfig) -> None:
    if "index" not in config.stages:
        raise UserError(f"stages is {config.stages!r}: without index, give the manifest that it made as --manifest")
    for name in ("annotations",) if config.dry_run else ("videos", "annotations"):
        if not getattr(config, name):
            remedy = "or the manifest that `index` made of them as --manifest"
            raise UserError(f"{name} is '': recipe {config.name} needs --{name}, those of its benchmark, {remedy}")
    annotations_of(config.benchmark, config.task, config.annotations)


def _check_manifest(config: RecipeConfig) -> None:
    for name in ("videos", "annotations"):
        if getattr(config, name):
            raise UserError(
                f"{name} is {getattr(config, name)!r}: the manifest names the videos; leave one of them out"
            )
    if config.dry_run:
        raise UserError(
            "dry_run is True: it counts what the annotations list; give --annotations in place of --manifest"
        )
    about = description(read_manifest(config.manifest))
    if (about.dataset, about.task) != (config.benchmark, config.task):
        held = " ".join(filter(None, (NAMES.get(about.dataset, "own videos"), about.task)))
        wanted = " ".join(filter(None, (NAMES[config.benchmark], config.task)))
        raise UserError(
            f"manifest is {config.manifest!r}: it is of {held}, and recipe {config.name} needs {wanted}; index that"
        )


def refuse_another(config: RecipeConfig) -> None:
    """Raise `UserError` where --out holds the run of another recipe or stage."""
    earlier = (RunFolder.of("recipe", config).check_stage() or {}).get("name", config.name)
    if earlier != config.name:
        raise UserError(f"--out {config.out!r} holds a run of recipe {earlier!r}, not {config.name!r}: give another")


def steps_of(config: RecipeConfig) -> list[Step]:
    """Return the steps in their order; paths are absolute. There is no report where nothing is tracked."""
    uri = tracking.resolve_uri(config.tracking, config.out)
    return [
        Step(name, stage, _settings(config, name, stage, changes, uri))
        for name, stage, changes in _changes(config)
        if not (stage == "report" and uri == OFF)
    ]


def settings_of(todo: Sequence[Step]) -> dict[str, StageConfig]:
    """Return the settings of each stage that runs, by its name; of several seeds, those of the last."""
    return {step.stage: step.config for step in todo}


def _changes(config: RecipeConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, stage and settings that differ from the recipe's own, of each step."""
    out, stages = storage.absolute(config.out), config.stages
    reading = {"manifest": storage.absolute(config.manifest) if config.manifest else storage.join(out, "index")}
    if "index" in stages and not config.manifest:
        given = annotations_of(config.benchmark, config.task, config.annotations)
        changes = {"source": config.benchmark, "videos": storage.absolute(config.videos)}
        yield "index", "index", changes | {"annotations": storage.absolute(given)}
    if config.features:
        features = {"features": storage.absolute(config.features)}
    else:
        features = {"features": storage.join(out, "features")} if "features" in stages else {}
    if "features" in stages and not config.features:
        yield "features", "features", reading
    if "pretrain" in stages:
        yield "pretrain", "pretrain", reading | features
    start = {"checkpoint": storage.join(out, "pretrain")} if "pretrain" in stages else {}
    for seed in range(config.seeds) if "finetune" in stages else ():
        tuned = f"finetune/seed_{seed}"
        yield tuned, "finetune", reading | features | start | {"loop.seed": seed}
        yield f"evaluate/seed_{seed}", "evaluate", reading | features | {"checkpoint": storage.join(out, tuned)}
    if "report" in stages:
        yield "report", "report", {"runs": (out,)}


def _settings(config: RecipeConfig, name: str, stage: str, changes: dict[str, Any], uri: str) -> StageConfig:
    logged: dict[str, Any] = {"tracking.uri": uri, "tracking.run_name": name}
    logged |= {f"tracking.{key}": getattr(config.tracking, key) for key in ("experiment", "system_s")}
    out = storage.join(storage.absolute(config.out), *name.split("/"))
    try:
        return cast(StageConfig, override(getattr(config, GROUPS[stage]), changes | logged | {"out": out}))
    except UserError as error:
        raise UserError(f"settings of stage {stage} ({GROUPS[stage]}.KEY): {error}") from None
