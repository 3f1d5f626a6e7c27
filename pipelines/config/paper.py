"""The recipes: settings with which the paper's tables are run again (S5 and LSMCL, arXiv 2303.14526).

Read in a later paper's tables: 60 frames and ViT-L/16 tokens of ImageNet-21k on LVU; 64 frames and 7 x 7 tokens of
Swin-B on Breakfast and COIN; width 1024 halved by each of three blocks. Of MoCo v3 (2104.02057), where the paper is
silent: rate x batch/256, weight decay, temperature, momentum and heads of the pretraining.

Recollected and not checked: that half of the tokens is kept and that the first block alone selects; S4 with the DPLR
state matrix of ViS4mer (2204.01692); long and short clips of as many frames at two strides.

Ours, since no source that was read states them: strides and masking ratio of the pretraining, its videos (the training
videos of the task), batch sizes, epochs, learning rate of the fine-tuning, number of seeds, frames a second of the
features. The paper's Swin-B is one of Kinetics-600, which timm has not: its own of ImageNet stands in for it, and
`--model.backbone.weights FILE` puts another in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pipelines.config.dotted import override
from pipelines.config.recipes import STAGE_ORDER
from pipelines.config.run import RunConfig

CLASS_TASKS = ("relationship", "way_speaking", "scene", "director", "genre", "writer", "year")
REGRESSION_TASKS = ("like_ratio", "view_count")
FROZEN: dict[str, Any] = {"model.backbone.weights": "timm", "model.backbone.frozen": True}
VIT: dict[str, Any] = FROZEN | {
    "model.backbone.name": "vit_large_patch16_224.augreg_in21k",
    # 60 frames x 197 tokens.
    "model.backbone.cls_token": True,
}
SWIN: dict[str, Any] = FROZEN | {"model.backbone.name": "swin_base_patch4_window7_224"}
DECODER: dict[str, Any] = {
    "model.decoder.name": "s5",
    "model.decoder.blocks": 3,
    "model.decoder.dropout": 0.2,
    "model.decoder.ssm.kind": "s4",
    "model.decoder.ssm.state": 64,
    "model.decoder.selection.keep_ratio": (0.5,),
    "model.decoder.selection.generator": "linear",
    "model.decoder.selection.features": "s4",
    "model.decoder.selection.noise": "training",
    "model.decoder.selection.estimator": "shared",
}
CONTRASTIVE: dict[str, Any] = {
    "lsmcl.mask_ratio": 0.5,
    "lsmcl.temperature": 0.2,
    "lsmcl.momentum": 0.99,
    "lsmcl.hidden": 4096,
    "lsmcl.dim": 256,
    "optim.lr": 1.5e-4,
    "optim.lr_batch": 256,
    "optim.weight_decay": 0.1,
    "clips.too_short": "shrink",
    "loop.evaluate_every": 10,
}
CACHED: dict[str, Any] = CONTRASTIVE | {
    "lsmcl.mask_on": "tokens",
    "views.jitter": 0.0,
    # Fits the smallest task: LVU's relationship has 149 training videos.
    "loop.batch_size": 64,
    "loop.epochs": 100,
    # Tasks of few videos have two steps an epoch.
    "loop.checkpoint_every": 100,
}
SUPERVISED: dict[str, Any] = {
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.05,
    "loop.batch_size": 16,
    "loop.epochs": 50,
    # On LVU an evaluation reads a window a second of each video.
    "loop.evaluate_every": 5,
}


def _recipe(name: str, stages: tuple[str, ...] = STAGE_ORDER, **groups: dict[str, Any]) -> RunConfig:
    """Return the preset of a recipe; its stages have the settings of their groups when they are run alone, too."""
    settings = {f"{group}.{key}": value for group, changes in groups.items() for key, value in changes.items()}
    alone = {key.replace("encode.", "features.", 1): value for key, value in settings.items()}
    named = {"name": name, "out": f"out/{name}", "stages": stages} | settings
    return override(RunConfig(), alone | {f"recipe.{key}": value for key, value in named.items()})


def lvu(task: str) -> RunConfig:
    """A task of LVU: 60 s windows at one frame a second, ViT-L/16 of ImageNet-21k, L = 11,820."""
    second = {"clips.frames": 60, "clips.long_stride": 1.0, "clips.short_stride": 1.0}
    return _recipe(
        f"paper-lvu-{task}",
        encode=VIT | {"frames_per_second": 1.0},
        pretrain=VIT | DECODER | CACHED | second | {"clips.long_stride": 2.0},
        finetune=VIT | DECODER | SUPERVISED | second | {"task": "class" if task in CLASS_TASKS else "regression"},
    )


def _whole(benchmark: str) -> RunConfig:
    # Videos of 32 s and more have a frame of their own for each of the 64.
    strides = {"clips.long_stride": 2.0, "clips.short_stride": 0.5}
    return _recipe(
        f"paper-{benchmark}",
        encode=SWIN | {"frames_per_second": 2.0},
        pretrain=SWIN | DECODER | CACHED | strides | {"clips.frames": 64},
        finetune=SWIN | DECODER | SUPERVISED | {"clips.frames": 64},
    )


def breakfast() -> RunConfig:
    """Breakfast: 64 frames over the whole video, Swin-B, L = 3,136."""
    return _whole("breakfast")


def coin() -> RunConfig:
    """COIN: 64 frames over the annotated part of the video, Swin-B, L = 3,136."""
    return _whole("coin")


def kinetics() -> RunConfig:
    """Pretraining on Kinetics, from its videos: LVU's encoder, patches masked; all sizes of clips and batch are ours.

    Cached features of its 10 s clips would take terabytes.
    """
    clips = {"clips.frames": 16, "clips.long_stride": 0.5, "clips.short_stride": 0.125}
    return _recipe(
        "paper-kinetics",
        stages=("index", "pretrain", "report"),
        pretrain=VIT | DECODER | CONTRASTIVE | clips | {"loop.batch_size": 256},
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    **{f"paper-lvu-{task}": partial(lvu, task) for task in (*CLASS_TASKS, *REGRESSION_TASKS)},
    "paper-breakfast": breakfast,
    "paper-coin": coin,
    "paper-kinetics": kinetics,
}
