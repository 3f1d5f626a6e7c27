"""What each stage of a recipe would cost on a node: from counts of the annotations, and measured rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from pipelines.config import DataConfig, EvaluateConfig, FeaturesConfig, FinetuneConfig, PretrainConfig, RecipeConfig
from pipelines.data.features.cache import with_imported
from pipelines.errors import UserError
from pipelines.recipes.counts import (
    Listing,
    cached_frames,
    evaluated_clips,
    evaluations,
    mean_span_s,
    training_order,
)
from pipelines.recipes.facts import Facts
from pipelines.recipes.rates import DECODED_S_A_CORE, Node
from s5.config import BackboneConfig, ClipConfig, EvaluationProtocol, LSMCLConfig, ModelConfig
from s5.models.video_model import VideoModel
from s5.tasks.lsmcl import LSMCL

OPTIMIZER_BYTES = 8
"""Of AdamW's moments of a weight (fp32)."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage would take."""

    stage: str
    input: str
    clips: int = 0
    steps: int = 0
    tokens: int = 0
    """Tokens that the stage's model sees: frames of a backbone, or what a decoder reads in all of its steps."""
    memory: float = 0.0
    """Bytes on the device."""
    host: float = 0.0
    """Bytes of cached tokens in the host's memory, which is pinned where there is a GPU."""
    disk: float = 0.0
    """Bytes below --out."""
    seconds: float | None = 0.0
    """None where the node's rates do not say."""
    device_s: float | None = 0.0
    """Of them, those of the models; None where the node's rates do not say."""
    decode_s: float = 0.0
    """Seconds of one core that reads the videos."""


def model_of(settings: PretrainConfig | FinetuneConfig, features: str) -> ModelConfig:
    """Return the model of a stage; ready features that were imported stand in for its backbone."""
    return replace(settings.model, backbone=with_imported(settings.model.backbone, features))


def backbone_of(config: RecipeConfig) -> BackboneConfig:
    """Return the backbone of the first stage that has one; the others have the same.

    Raises:
        UserError: it is to be imported, so that nothing is known of it yet.
    """
    if "features" in config.stages and not config.features:
        given = config.encode.import_
        if given:
            raise UserError(
                f"encode.import is {given!r}: a dry run does not read such files; run `features --import` and give "
                "its --out as --features"
            )
        return config.encode.model.backbone
    return model_of(config.pretrain if "pretrain" in config.stages else config.finetune, config.features).backbone


def weights_of(model: ModelConfig, task: LSMCLConfig | int) -> tuple[int, int]:
    """Return the trained weights of a model, and the bytes of a checkpoint of it.

    Args:
        model: its settings.
        task: LSMCL's settings, or the number of the head's outputs.
    """
    plain = replace(model, backbone=replace(model.backbone, weights=""))
    with torch.device("meta"):
        module = VideoModel(plain, task) if isinstance(task, int) else LSMCL(plain, task)
    trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    stored = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    return trained, stored + OPTIMIZER_BYTES * trained


# --- costs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """How long a node takes for parts of a stage, and what they hold in memory."""

    node: Node
    facts: Facts
    cached: bool
    """Whether clips are read from cached features."""

    def length(self, model: ModelConfig, clips: ClipConfig) -> int:
        """Return the tokens of a clip."""
        return model.backbone.steps(clips.frames) * self.facts.tokens

    def encoding_s(self, frames: int, video_s: float, passes: float) -> float:
        """Return the seconds in which frames, spread over so much video, are read and seen so often by the backbone."""
        decoding_s = video_s / self.node.decoded_s
        model_s = frames * passes * self.facts.flops / self.node.encoder_flops
        return decoding_s + model_s if self.node.shared_cores else max(decoding_s, model_s)

    def device_s(self, frames: int, passes: float, *model_s: float | None) -> float | None:
        """Return the seconds of a backbone that sees frames so often, unless they are cached, and of other models."""
        known = [each for each in model_s if each is not None]
        encoding_s = 0 if self.cached else frames * passes * self.facts.flops / self.node.encoder_flops
        return encoding_s + sum(known) if len(known) == len(model_s) else None

    def decode_s(self, video_s: float) -> float:
        """Return the seconds in which one core reads so much video, unless it is cached."""
        return 0.0 if self.cached else video_s / DECODED_S_A_CORE

    def clips_s(self, frames: int, video_s: float, passes: float) -> float:
        """Return the seconds until the frames of clips are tokens."""
        if self.cached:
            return self.facts.stored_bytes(frames) / self.node.features_bytes_s
        return self.encoding_s(frames, video_s, passes)

    def whole(self, clips: int, frames: int) -> int:
        """Return the bytes of all cached tokens of a batch of clips; 0 where frames are read."""
        return self.facts.stored_bytes(clips * frames) if self.cached else 0

    def waiting(self, clips: int, frames: int, data: DataConfig) -> int:
        """Return the bytes of batches on the host: those kept ready, one that is read and one that is used."""
        return (data.prefetch_batches + 2) * self.whole(clips, frames)

    def decoder_s(self, decoder: str, length: int, *, trained: int, forwarded: int) -> float | None:
        """Return the seconds that a decoder takes for clips of so many tokens; None where it was not measured."""
        timing = self.node.timing(decoder, length)
        if timing is None:
            return None
        return length * (trained * timing.train_s + forwarded * timing.forward_s) / timing.tokens

    def together(self, reading_s: float, *model_s: float | None) -> float | None:
        """Return the seconds of a stage: cached tokens are read while the model runs, frames are encoded by it."""
        known = [each for each in model_s if each is not None]
        if len(known) < len(model_s):
            return None
        return max(reading_s, sum(known)) if self.cached else reading_s + sum(known)

    def memory(self, decoder: str, tokens: int, length: int, trained: int, checkpoint: int) -> float:
        """Return the bytes that training holds: weights, gradients and moments, and a decoder's share of the tokens."""
        timing = self.node.timing(decoder, length)
        activations = 0.0 if timing is None else tokens * timing.memory_mib * 2**20 / timing.tokens
        return checkpoint + 4 * trained + activations


def costs_of(config: RecipeConfig, listing: Listing, work: Work) -> Iterator[Cost]:
    """Yield the cost of each stage that runs."""
    if "index" in config.stages:
        splits = ", ".join(f"{split} {len(seconds):,}" for split, seconds in listing.seconds.items())
        seconds = len(listing.all_seconds) / work.node.probes_s
        yield Cost(stage="index", input=f"{len(listing.all_seconds):,} videos ({splits})", seconds=seconds)
    if "features" in config.stages and not config.features:
        yield features_cost(config.encode, listing, work)
    if "pretrain" in config.stages:
        yield pretrain_cost(replace(config.pretrain, features=config.features), listing, work)
    if "finetune" in config.stages:
        tuning = replace(config.finetune, features=config.features)
        yield finetune_cost(tuning, listing, work, config.seeds)
        yield evaluate_cost(config.evaluate, tuning, listing, work, config.seeds)


def features_cost(settings: FeaturesConfig, listing: Listing, work: Work) -> Cost:
    """Return the cost of encoding each frame once."""
    frames = cached_frames(listing.all_seconds, settings.frames_per_second)
    facts = work.facts
    return Cost(
        stage="features",
        input=f"{frames:,} frames",
        tokens=frames * facts.tokens,
        memory=4 * facts.parameters,
        disk=facts.stored_bytes(frames),
        seconds=work.encoding_s(frames, sum(listing.all_seconds), passes=1),
    )


def pretrain_cost(settings: PretrainConfig, listing: Listing, work: Work) -> Cost:
    """Return the cost of LSMCL on two clips of each video, and of its probes."""
    masked = settings.lsmcl.mask_ratio
    train, val = (listing.seconds.get(split, []) for split in ("train", "val"))
    order = training_order("pretrain", settings, train)
    whole = work.length(settings.model, settings.clips)
    clips, kept = 2 * order.total_steps * order.batch_size, round(whole * (1 - masked))
    probed = sum(min(len(videos), settings.probe_videos) for videos in (train, val)) if listing.labelled else 0
    probed *= evaluations(order, settings.loop.evaluate_every)
    # Without the selection, which pretraining leaves out, S5 is S4 on all tokens.
    decoder = settings.model.decoder.name.replace("s5", "vis4mer")
    model_s = work.decoder_s(decoder, kept, trained=clips, forwarded=clips)
    probes_s = work.decoder_s(decoder, whole, trained=0, forwarded=probed)
    passes = (1 if settings.model.backbone.frozen else 4) * (1 - masked if settings.lsmcl.mask_on == "patches" else 1)
    strides = settings.clips.long_stride, settings.clips.short_stride
    video_s = order.total_steps * order.batch_size * mean_span_s("uniform", settings.clips, train, *strides)
    video_s += probed * mean_span_s("uniform", settings.clips, [*train, *val], settings.clips.long_stride)
    frames = (clips + probed) * settings.clips.frames
    reading_s = work.clips_s(frames, video_s, passes)
    trained, checkpoint = weights_of(model_of(settings, settings.features), settings.lsmcl)
    batch = 2 * order.batch_size
    return Cost(
        stage="pretrain",
        input=f"{len(train):,} videos, {settings.loop.epochs} epochs of {order.batch_size}",
        clips=clips + probed,
        steps=order.total_steps,
        tokens=clips * kept + probed * whole,
        # All tokens of long and short clips, and once more where they are joined, before some are masked.
        memory=work.memory(decoder, kept * batch, kept, trained, checkpoint)
        + 2 * work.whole(batch, settings.clips.frames),
        host=work.waiting(batch, settings.clips.frames, settings.data),
        disk=settings.loop.keep_checkpoints * checkpoint,
        seconds=work.together(reading_s, model_s, probes_s),
        device_s=work.device_s(frames, passes, model_s, probes_s),
        decode_s=work.decode_s(video_s),
    )


def finetune_cost(settings: FinetuneConfig, listing: Listing, work: Work, seeds: int = 1) -> Cost:
    """Return the cost of fine-tuning with each seed, validations included."""
    train, val = (listing.seconds.get(split, []) for split in ("train", "val"))
    order = training_order("finetune", settings, train)
    protocol = listing.protocol if settings.protocol == "auto" else settings.protocol
    validated, validated_s = evaluated_clips(protocol, settings.clips, val)
    validations = evaluations(order, settings.loop.evaluate_every)
    validated *= validations
    clips, length = order.total_steps * order.batch_size, work.length(settings.model, settings.clips)
    decoder = settings.model.decoder.name
    model_s = work.decoder_s(decoder, length, trained=seeds * clips, forwarded=seeds * validated)
    video_s = clips * mean_span_s(protocol, settings.clips, train, settings.clips.long_stride)
    video_s += validations * validated_s
    passes = 1 if settings.model.backbone.frozen else 3
    frames = seeds * (clips + validated) * settings.clips.frames
    reading_s = work.clips_s(frames, seeds * video_s, passes)
    trained, checkpoint = weights_of(model_of(settings, settings.features), 1)
    return Cost(
        stage="finetune",
        input=f"{_times(seeds)}{len(train):,} videos, {settings.loop.epochs} epochs of {order.batch_size}",
        clips=seeds * (clips + validated),
        steps=seeds * order.total_steps,
        tokens=seeds * (clips + validated) * length,
        memory=work.memory(decoder, length * order.batch_size, length, trained, checkpoint),
        host=work.waiting(order.batch_size, settings.clips.frames, settings.data),
        # The best checkpoint beside the last ones.
        disk=seeds * (settings.loop.keep_checkpoints + 1) * checkpoint,
        seconds=work.together(reading_s, model_s),
        device_s=work.device_s(frames, passes, model_s),
        decode_s=work.decode_s(seeds * video_s),
    )


def evaluate_cost(
    settings: EvaluateConfig, tuned: FinetuneConfig, listing: Listing, work: Work, seeds: int = 1
) -> Cost:
    """Return the cost of evaluating what was fine-tuned with each seed."""
    videos = listing.seconds.get(settings.split, [])
    chosen = [each for each in (settings.protocol, tuned.protocol) if each != "auto"]
    protocol: EvaluationProtocol = chosen[0] if chosen else listing.protocol
    once, once_s = evaluated_clips(protocol, tuned.clips, videos, settings.clips_per_video)
    clips, video_s = seeds * once, seeds * once_s
    length = work.length(tuned.model, tuned.clips)
    model_s = work.decoder_s(tuned.model.decoder.name, length, trained=0, forwarded=clips)
    return Cost(
        stage="evaluate",
        input=f"{_times(seeds)}{len(videos):,} videos of {settings.split}, {protocol}",
        clips=clips,
        tokens=clips * length,
        memory=4 * work.facts.parameters + settings.batch_size * length * work.facts.width * 4,
        host=work.waiting(settings.batch_size, tuned.clips.frames, settings.data),
        seconds=work.together(work.clips_s(clips * tuned.clips.frames, video_s, 1), model_s),
    )


def _times(seeds: int) -> str:
    return f"{seeds} x " if seeds > 1 else ""
