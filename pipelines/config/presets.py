"""The presets: whole settings of all stages by name, derived from each other in a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.config import RunConfig, override, unknown
from pipelines.config.paper import RECIPES
from pipelines.errors import UserError


def base() -> RunConfig:
    """The defaults: 16-frame clips, ViT-B/16 at 224 pixels, one worker."""
    return RunConfig()


def tiny() -> dict[str, Any]:
    """Settings of both training stages that suit two CPU cores: a small frame encoder and half a CPU a task."""
    changes: dict[str, Any] = {
        "model.backbone.name": "vit_tiny_patch16_224",
        "model.backbone.frame_size": 64,
        "model.backbone.depth": 2,
        "model.backbone.embed_dim": 64,
        "model.backbone.num_heads": 2,
        "model.decoder.width": 128,
        "model.decoder.blocks": 2,
        "model.decoder.dropout": 0.0,
        "scale.cpus_per_worker": 0.5,
        "data.cpus_per_decode": 0.5,
    }
    return {f"{stage}.{key}": value for key, value in changes.items() for stage in ("pretrain", "finetune")}


def in_sweep(changes: dict[str, Any]) -> dict[str, Any]:
    """Return changes of the training stages, together with the same changes of a sweep's trials."""
    return changes | {f"sweep.{key}": value for key, value in changes.items() if key.startswith(("pre", "fine"))}


def quickstart() -> RunConfig:
    """The whole line on the `easy` sample data set within minutes on two CPU cores."""
    clips = {"clips.frames": 16, "clips.long_stride": 4.0, "clips.short_stride": 1.0}
    training = tiny() | {f"{stage}.{key}": v for key, v in clips.items() for stage in ("pretrain", "finetune")}
    training |= {
        "pretrain.lsmcl.hidden": 256,
        "pretrain.lsmcl.dim": 64,
        # Colour tells the steps apart here, so it is not to be learned as noise.
        "pretrain.views.jitter": 0.0,
        "pretrain.optim.lr": 1e-3,
        "pretrain.loop.batch_size": 28,
        "pretrain.loop.epochs": 15,
        "pretrain.loop.log_every": 5,
        "pretrain.loop.evaluate_every": 5,
        "pretrain.scale.num_workers": 2,
        "finetune.optim.lr": 4e-3,
        "finetune.loop.batch_size": 8,
        "finetune.loop.epochs": 12,
        "finetune.loop.log_every": 17,
        "finetune.loop.evaluate_every": 3,
    }
    sweep = {
        # 16 frames over 16 s and over 64 s: the steps of an activity, or their order as well.
        "sweep.space": ("clips.long_stride=1,4",),
        "sweep.seeds": 3,
        # From scratch, so that the effect is that of the clips alone.
        "sweep.stages": "finetune",
        "sweep.finetune.loop.epochs": 6,
        "sweep.finetune.loop.evaluate_every": 0,
    }
    halves = {f"{stage}.{key}": 0.5 for stage in ("index", "evaluate") for key in ("data.cpus_per_decode",)}
    return override(base(), {"sample.videos": 240} | in_sweep(training) | sweep | halves)


def videos() -> RunConfig:
    """Pretraining on a folder of videos of any kind and length, within minutes on two CPU cores."""
    changes = {
        "pretrain.model.backbone.frame_size": 112,
        "pretrain.clips.frames": 8,
        "pretrain.clips.long_stride": 0.5,
        "pretrain.clips.short_stride": 0.1,
        "pretrain.clips.too_short": "shrink",
        "pretrain.views.jitter": 0.4,
        "pretrain.loop.batch_size": 0,
        "pretrain.loop.steps": 100,
        "pretrain.loop.checkpoint_every": 50,
        "evaluate.split": "train",
        "evaluate.clips_per_video": 4,
    }
    return override(quickstart(), changes)


def distant() -> RunConfig:
    """Distant supervision of an encoder of narrated segments, in the sizes of arXiv 2201.10990, and its embeddings.

    Theirs is a TimeSformer: here a ViT-B/16 on frames, and a transformer over the tokens of 8 frames.
    """
    changes = {
        "finetune.manifest": "out/narrate/manifest.parquet",
        "finetune.labels": "out/narrate",
        "finetune.task": "distant",
        "finetune.clips.frames": 8,
        "finetune.model.backbone.weights": "timm",
        "finetune.model.decoder.name": "lst",
        "finetune.model.decoder.width": 1024,
        "finetune.model.decoder.blocks": 1,
        "finetune.optim.lr": 1e-4,
        "finetune.loop.batch_size": 64,
        "finetune.loop.epochs": 15,
        "features.checkpoint": "out/distant",
        "features.segment_s": 9.0,
    }
    return override(base(), in_sweep(changes))


def distant_head() -> RunConfig:
    """A task head over the embeddings of 16 segments, evenly taken from a video: S5, or with its name a peer."""
    changes = {
        "finetune.features": "out/features",
        "finetune.protocol": "whole",
        "finetune.model.backbone.name": "segments",
        "finetune.model.backbone.frozen": True,
        "finetune.model.decoder.width": 512,
        "evaluate.features": "out/features",
    }
    return override(base(), in_sweep(changes))


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "base": base,
    "quickstart": quickstart,
    "videos": videos,
    "distant": distant,
    "distant-head": distant_head,
} | RECIPES


def preset(name: str) -> RunConfig:
    """Return the preset of that name.

    Raises:
        UserError: there is none; names the closest one.
    """
    if name not in PRESETS:
        raise UserError(unknown("preset", name, tuple(PRESETS)))
    return PRESETS[name]()
