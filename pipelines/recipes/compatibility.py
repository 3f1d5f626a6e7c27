"""Whether the settings of a recipe's stages work together: what a later stage would refuse after hours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pipelines import storage
from pipelines.config import (
    EvaluateConfig,
    FeaturesConfig,
    FinetuneConfig,
    PretrainConfig,
    ProtocolSetting,
    RecipeConfig,
    StageConfig,
    flatten,
    unknown,
)
from pipelines.data.annotations.benchmarks import PROTOCOLS
from pipelines.data.features.batches import check_stride
from pipelines.data.features.cache import backbone_settings, check_backbone, read_meta, with_imported
from pipelines.data.manifest import SPLITS
from pipelines.errors import UserError
from pipelines.storage.weights import local_checkpoint, with_trained_weights
from s5.checkpoints.checkpoint import check_architecture, difference
from s5.config import BackboneConfig, ClipConfig, EvaluationProtocol
from s5.errors import CheckpointError
from s5.models.video_model import check_model
from s5.tasks.lsmcl import check_lsmcl

Training = PretrainConfig | FinetuneConfig


def check_together(config: RecipeConfig, settings: Mapping[str, StageConfig]) -> None:
    """Check the settings of all stages against each other, as far as no video and no manifest is needed.

    Args:
        config: the recipe.
        settings: those of each stage that runs, by its name.

    Raises:
        UserError: a stage would refuse them once the stages before it have run; gives the remedy.
    """
    encode = settings.get("features")
    for stage, each in settings.items():
        if isinstance(each, Training):
            if not (isinstance(encode, FeaturesConfig) and encode.import_):
                _check_model(each, config.features)
            if config.features:
                backbone = with_imported(each.model.backbone, config.features)
                check_backbone(config.features, read_meta(config.features), backbone)
            if isinstance(encode, FeaturesConfig):
                _check_encoder(stage, each, encode)
        elif isinstance(each, EvaluateConfig) and each.split not in SPLITS:
            raise UserError(unknown("evaluate.split", each.split, SPLITS))
    _check_start(config, settings)
    check_strides(config, settings, PROTOCOLS[config.benchmark])


def _check_model(each: Training, features: str) -> None:
    model = replace(each.model, backbone=with_imported(each.model.backbone, features))
    try:
        check_lsmcl(model, each.lsmcl) if isinstance(each, PretrainConfig) else check_model(model)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_encoder(stage: str, each: Training, encode: FeaturesConfig) -> None:
    """Raise `UserError` where features would be made by another backbone than the one that a stage is told of."""
    if encode.segment_s:
        raise UserError(f"encode.segment_s is {encode.segment_s:g}: a recipe trains on tokens of frames; leave it out")
    if encode.import_:
        made, read = {"name": encode.backbone}, {"name": each.model.backbone.name}
    else:
        made, read = backbone_settings(encode.model.backbone), backbone_settings(each.model.backbone)
        # What a checkpoint holds is not compared: that takes its weights.
        if not (encode.checkpoint or (isinstance(each, FinetuneConfig) and each.checkpoint)):
            made["weights"], read["weights"] = _weights(encode.model.backbone), _weights(each.model.backbone)
    for name, value in made.items():
        if read[name] != value:
            raise UserError(
                f"{stage}.model.backbone.{name} is {read[name]!r}: it reads features that stage features makes with "
                f"{value!r}; give --model.backbone.{name}, which sets it in all stages"
            )


def _weights(backbone: BackboneConfig) -> str:
    weights = with_trained_weights(replace(backbone, frozen=True)).weights
    return weights if weights == "timm" else storage.absolute(weights)


def _check_start(config: RecipeConfig, settings: Mapping[str, StageConfig]) -> None:
    """Raise `UserError` where fine-tuning cannot start from what is pretrained, or from its checkpoint."""
    tuning, pretraining = config.finetune, settings.get("pretrain")
    if "finetune" not in settings:
        return
    if isinstance(pretraining, PretrainConfig):
        wanted = flatten(tuning.model)
        if different := difference(pretraining.model, wanted):
            key, there = different
            raise UserError(
                f"finetune.model.{key} is {wanted[key]!r}: it starts from what is pretrained with {there!r}; give "
                f"--model.{key}, which sets it in all stages, or --stages without pretrain"
            )
    elif tuning.checkpoint:
        model = replace(tuning.model, backbone=with_imported(tuning.model.backbone, config.features))
        try:
            with local_checkpoint(tuning.checkpoint) as folder:
                check_architecture(folder, flatten(model))
        except CheckpointError as error:
            raise UserError(str(error)) from None


def check_strides(
    config: RecipeConfig,
    settings: Mapping[str, StageConfig],
    protocol: EvaluationProtocol,
    fps: Sequence[float] = (),
) -> None:
    """Check the strides of all clips against the cached features that they are read from.

    Args:
        config: the recipe.
        settings: those of each stage that runs, by its name.
        protocol: the benchmark's.
        fps: frame rates of the videos; without them, strides that count frames are left out.

    Raises:
        UserError: frames of clips are closer than those of the features.
    """
    encode = settings.get("features")
    if config.features:
        rate, what = read_meta(config.features).frames_per_second, f"features is {config.features!r}"
    elif isinstance(encode, FeaturesConfig):
        rate, what = encode.frames_per_second, f"encode.frames_per_second is {encode.frames_per_second:g}"
    else:
        return
    for stage, clips, read in _clips(config, settings, protocol):
        if not fps and clips.unit == "frames":
            continue
        try:
            check_stride(rate, clips, read, fps or (1.0,), pairs=stage == "pretrain")
        except UserError as error:
            raise UserError(f"{what}, too few for stage {stage}: {error}") from None


def _clips(
    config: RecipeConfig, settings: Mapping[str, StageConfig], protocol: EvaluationProtocol
) -> Iterator[tuple[str, ClipConfig, EvaluationProtocol]]:
    """Yield each stage that reads clips, what they are, and by which protocol."""

    def first(*choices: ProtocolSetting) -> EvaluationProtocol:
        return next((choice for choice in choices if choice != "auto"), protocol)

    tuned = config.finetune
    reading: dict[str, tuple[ClipConfig, EvaluationProtocol]] = {
        "pretrain": (config.pretrain.clips, "uniform"),
        "finetune": (tuned.clips, first(tuned.protocol)),
        "evaluate": (tuned.clips, first(config.evaluate.protocol, tuned.protocol)),
    }
    yield from ((stage, *each) for stage, each in reading.items() if stage in settings)
