"""A dry run of one stage: its settings, what it would read, train and write, and the hours that this takes on a node.

The text is YAML whose comments are the plan: saved in a file, it is what `--config` takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import (
    EvaluateConfig,
    FeaturesConfig,
    FinetuneConfig,
    IndexConfig,
    PredictConfig,
    PretrainConfig,
    SampleConfig,
    StageConfig,
    SweepConfig,
    override,
)
from pipelines.config.settings_files import in_yaml
from pipelines.data.features.arrays import check_formats
from pipelines.data.features.cache import with_imported
from pipelines.data.features.importing import common_shape, list_files, plan
from pipelines.data.manifest import read_manifest, splits
from pipelines.data.protocols import clips_per_video
from pipelines.errors import UserError
from pipelines.recipes.costs import (
    Cost,
    Work,
    evaluate_cost,
    features_cost,
    finetune_cost,
    model_of,
    pretrain_cost,
)
from pipelines.recipes.counts import Listing, cached_frames, listing_of_manifest
from pipelines.recipes.dry_run import rates_used, table, total
from pipelines.recipes.facts import Facts, facts_of
from pipelines.recipes.rates import NODES, Node
from pipelines.recipes.roles import roles
from pipelines.storage.weights import local_checkpoint, segment_encoder, trained_backbone
from pipelines.tuning import search_space
from pipelines.tuning.draws import Values, check_size, settings_of
from pipelines.tuning.population import first_settings
from pipelines.tuning.ready_spaces import resolved
from pipelines.tuning.trials import seeds_of, trial_of
from s5.config import ClipConfig, ModelConfig
from s5.config import from_json as config_from_json

RECKONED_TRIALS = 16
"""Trials of a sweep whose cost is worked out; the others are taken to cost the same in the mean."""
NAMED_TRIALS = 8


def plan_of(stage: str, config: StageConfig, node: str = "cpu-2") -> str:
    """Return the text of a stage's dry run; nothing is written, and no video is read.

    Raises:
        UserError: there is no such node, or the stage would refuse its settings or inputs.
    """
    if node not in NODES:
        raise UserError(f"--node is {node!r}: rates were measured on {' and '.join(NODES)}; give one of them")
    costs = list(costs_of(config, NODES[node]))
    plan = [*_head(config), *table([*costs, *([total("all", costs)] if len(costs) > 1 else [])])]
    if isinstance(config, PretrainConfig | FinetuneConfig):
        plan += ["", *roles(config, costs[0], NODES[node])]
    plan += ["", "Nothing was written.", *(rates_used(NODES[node]) if any(cost.seconds for cost in costs) else [])]
    title = f"dry run of {stage} on node {node}: {NODES[node].description}"
    return "\n".join([*in_yaml(stage, config), *_comments([title, "", *plan])])


def _comments(lines: Sequence[str]) -> Iterator[str]:
    yield "#"
    for line in lines:
        yield f"# {line}".rstrip()


def _head(config: StageConfig) -> Iterator[str]:
    """Yield what is listed and what is to be tried, where there is more to say than a row has room for."""
    if manifest := getattr(config, "manifest", ""):
        rows = read_manifest(manifest)
        counts = ", ".join(f"{split} {count:,}" for split, count in splits(rows).items())
        hours = sum(listing_of_manifest(rows).all_seconds) / 3600
        yield f"manifest {manifest}: {len(rows):,} videos ({counts}), {hours:,.1f} hours"
        yield ""
    if isinstance(config, SweepConfig):
        names = [search_space.name_of(values) for values in foreseen(config)]
        more = ["..."] if len(names) > NAMED_TRIALS else []
        each = f", {config.seeds} seeds each" if config.seeds > 1 else ""
        yield f"{len(names) * config.seeds} trials of {config.stages}{each}:"
        yield from (f"  {name}" for name in [*names[:NAMED_TRIALS], *more])
        yield ""


# --- costs ----------------------------------------------------------------------------------------------------------


def costs_of(config: StageConfig, node: Node) -> Iterator[Cost]:
    """Yield what a stage would read, train and write.

    Raises:
        UserError: the stage would refuse its settings or inputs.
    """
    if isinstance(config, SampleConfig):
        yield Cost(stage="sample", input=f"{config.videos:,} videos of {config.seconds:g} s", seconds=None)
    elif isinstance(config, IndexConfig):
        yield _index_cost(config, node)
    elif isinstance(config, FeaturesConfig):
        yield _features_cost(config, node)
    elif isinstance(config, PretrainConfig | FinetuneConfig):
        yield _training_cost(config, node)
    elif isinstance(config, EvaluateConfig):
        yield from _evaluate_costs(config, node)
    elif isinstance(config, SweepConfig):
        yield from _sweep_costs(config, node)
    elif isinstance(config, PredictConfig):
        yield _predict_cost(config)
    elif manifest := getattr(config, "manifest", ""):
        yield Cost(stage=_name(config), input=f"{len(read_manifest(manifest)):,} videos", seconds=None)
    else:
        yield Cost(stage=_name(config), input="runs in MLflow", seconds=None)


def _name(config: StageConfig) -> str:
    return type(config).__name__.removesuffix("Config").lower()


def _index_cost(config: IndexConfig, node: Node) -> Cost:
    from pipelines.stages.index import list_videos

    annotations, files = list_videos(config)
    listed = len(annotations.videos)
    found = sum(not video.reason for video in annotations.videos)
    return Cost(
        stage="index", input=f"{listed:,} listed, {found:,} found; {files.described()}", seconds=found / node.probes_s
    )


def _features_cost(config: FeaturesConfig, node: Node) -> Cost:
    manifest = read_manifest(config.manifest)
    if config.import_:
        return _import_cost(config, manifest)
    listing = listing_of_manifest(manifest)
    if config.segment_s:
        return _segments_cost(config, listing, node)
    if config.checkpoint or config.model.backbone.weights:
        trained_backbone(config.model.backbone, config.checkpoint)
    return features_cost(config, listing, Work(node, facts_of(config.model.backbone), cached=False))


def _import_cost(config: FeaturesConfig, manifest: pa.Table) -> Cost:
    files, others = list_files(config.import_, config.format)
    check_formats({file.format for file in files})
    rows, strangers = plan(manifest, files, config.import_, config.shard_gigabytes * 1e9)
    tokens, width = common_shape(rows, config.import_)
    found = rows.filter(pc.equal(rows["reason"], ""))
    spans_s = pc.subtract(found["end_s"], found["start_s"]).to_pylist()
    frames = cached_frames(spans_s, config.frames_per_second)
    said = f"{len(found):,} of {len(rows):,} videos have a file, {len(strangers):,} files of no video"
    return Cost(
        stage="features",
        input=said + (f", {others:,} others left out" if others else ""),
        tokens=frames * tokens,
        disk=Facts(tokens, width, 0.0, 0).stored_bytes(frames),
        seconds=None,
    )


def _segments_cost(config: FeaturesConfig, listing: Listing, node: Node) -> Cost:
    encoder = segment_encoder(config.checkpoint)
    count = cached_frames(listing.all_seconds, 1 / config.segment_s)
    model, facts = encoder.model.config, facts_of(encoder.config)
    work = Work(node, facts, cached=False)
    length = work.length(model, ClipConfig(frames=encoder.frames))
    reading_s = work.encoding_s(count * encoder.frames, sum(listing.all_seconds), passes=1)
    decoder_s = work.decoder_s(model.decoder.name, length, trained=0, forwarded=count)
    return Cost(
        stage="features",
        input=f"{count:,} segments of {config.segment_s:g} s, {encoder.frames} frames each",
        clips=count,
        tokens=count * length,
        memory=4 * sum(weight.numel() for weight in encoder.parameters()),
        disk=Facts(encoder.tokens, encoder.width, 0.0, 0).stored_bytes(count),
        seconds=work.together(reading_s, decoder_s),
    )


def _predict_cost(config: PredictConfig) -> Cost:
    from pipelines.stages import predict

    videos, faults = predict.listed(config.videos)
    with predict.checkpoint_folder(config) as folder:
        predict.predictor_of(config, folder)
    return Cost(stage="predict", input=f"{len(videos):,} videos, {len(faults):,} rejects", seconds=None)


def _training_cost(config: PretrainConfig | FinetuneConfig, node: Node) -> Cost:
    # They import Ray Train, which no other stage needs.
    from pipelines.stages import finetune, pretrain

    listing = listing_of_manifest(read_manifest(config.manifest))
    work = Work(node, facts_of(model_of(config, config.features).backbone), bool(config.features))
    if isinstance(config, PretrainConfig):
        pretrain.build_job(config)
        return pretrain_cost(config, listing, work)
    finetune.build_job(config)
    return finetune_cost(config, listing, work)


def _evaluate_costs(config: EvaluateConfig, node: Node) -> Iterator[Cost]:
    """Yield the cost of the evaluation and, of a pretrained encoder, that of the videos that a probe learns from."""
    from pipelines.stages import evaluate

    manifest = read_manifest(config.manifest)
    with local_checkpoint(config.checkpoint) as folder:
        found = evaluate.checked(config, manifest, folder)
    model = config_from_json(ModelConfig, found.meta.model)
    # Nothing is trained, and cached features are of a frozen backbone.
    model = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, frozen=True))
    sought = FinetuneConfig(model=model, clips=found.clips, features=config.features)
    backbone = with_imported(model.backbone, config.features)
    work = Work(node, facts_of(backbone), bool(config.features))
    count = clips_per_video(found.protocol, config.clips_per_video)
    for split, videos, clips in ((config.split, found.videos, count), ("train", found.learned, 1)):
        if len(videos):
            each = dataclasses.replace(config, protocol=found.protocol, clips_per_video=clips, split=split)
            cost = evaluate_cost(each, sought, listing_of_manifest(videos), work)
            yield dataclasses.replace(cost, stage=f"evaluate {split}")


def foreseen(config: SweepConfig) -> list[Values]:
    """Return the settings that a sweep tries; draws stand in for those that TPE will propose.

    Raises:
        UserError: the space cannot be read or is too large.
    """
    config = resolved(config)
    dimensions = search_space.parse(config)
    check_size(config, dimensions)
    if config.search == "pbt":
        return first_settings(config, dimensions)
    return settings_of(dataclasses.replace(config, search="random") if config.search == "tpe" else config, dimensions)


def _sweep_costs(config: SweepConfig, node: Node) -> Iterator[Cost]:
    settings_tried = foreseen(config)
    trials = [trial_of(config, values, seed) for values in settings_tried for seed in seeds_of(config)]
    stages = search_space.stages(config)
    for stage in stages:
        settings = getattr(config, stage)
        if isinstance(settings, FinetuneConfig) and "pretrain" in stages:
            # The trial's own does not exist yet.
            settings = dataclasses.replace(settings, checkpoint="")
        # Trials that pretrain alike share it.
        runs = list({trial.stages[stage].out: trial.values for trial in trials}.values())
        reckoned = runs[:: -(-len(runs) // RECKONED_TRIALS)]
        changed = (override(settings, search_space.configured(config, stage, values)) for values in reckoned)
        costs = [_training_cost(each, node) for each in changed]
        yield total(stage, costs, f"{len(runs)} trials", times=len(runs) / len(reckoned))
