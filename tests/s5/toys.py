"""Small models, batches and runs that the tests of s5 share."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from s5.batch import ClipBatch
from s5.checkpoints.checkpoint import Meta
from s5.config import (
    BackboneConfig,
    DecoderConfig,
    LoopConfig,
    LSMCLConfig,
    ModelConfig,
    OptimConfig,
    SelectionConfig,
    SSMConfig,
)
from s5.models.merging import Merging
from s5.models.selection import Selection, TransformerGenerator
from s5.models.video_model import VideoModel
from s5.tasks.lsmcl import LSMCL
from s5.tasks.supervised import Supervised
from s5.training.context import SoloContext
from s5.training.loop import TrainingInputs, TrainingLoop

Module = TypeVar("Module", bound=nn.Module)
MODEL = ModelConfig(
    backbone=BackboneConfig(
        name="vit_tiny_patch16_224", frame_size=32, depth=1, embed_dim=16, num_heads=2, patch_size=8
    ),
    decoder=DecoderConfig(blocks=2, ssm=SSMConfig(state=8), selection=SelectionConfig(features="s4")),
)
TASK = LSMCLConfig(hidden=32, dim=16, mask_ratio=0.5, freeze_patches=False)
STEPS, STEPS_PER_EPOCH, BATCH = 8, 4, 4


def decided(module: Module) -> Module:
    """Return a module whose tokens differ in their scores, as after some training."""
    for part in module.modules():
        score: nn.Module | None = None
        if isinstance(part, Selection):
            score = part.generator.score if isinstance(part.generator, TransformerGenerator) else part.generator
        elif isinstance(part, Merging):
            score = part.saliency
        if isinstance(score, nn.Linear):
            score.reset_parameters()
    return module


def batch(step: int, size: int = BATCH, frames: int = 3, first: int = 0, stop: int | None = None) -> ClipBatch:
    """Return rows `first` to `stop` of a global batch of random clips that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    shape = (size, frames, 32, 32, 3)
    long = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)[first:stop]
    short = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)[first:stop]
    rows = torch.arange(size)[first:stop]
    seeds, labels = step * size + rows, rows % 2
    ids = [f"video{row}" for row in rows.tolist()]
    return ClipBatch(step, step // STEPS_PER_EPOCH, ids, long, short, seeds, labels, labels.float(), [])


def batches(start: int) -> Generator[ClipBatch]:
    for step in range(start, STEPS):
        yield batch(step)


def stopping(context: SoloContext, at: int) -> Callable[[int], Generator[ClipBatch]]:
    """Return the source of batches whose step number `at`, from 1, is the last before a stop."""

    def source(start: int) -> Generator[ClipBatch]:
        for item in batches(start):
            context.stop = item.step + 1 == at
            yield item

    return source


def lsmcl_loop(
    context: SoloContext,
    source: Callable[[int], Generator[ClipBatch]] = batches,
    evaluate: Callable[[], dict[str, float]] | None = None,
    max_failure_share: float = 1.0,
    **loop: Any,
) -> TrainingLoop:
    """Return a short LSMCL run from a fixed seed."""
    config = replace(LoopConfig(log_every=1, batch_size=BATCH), **loop)
    torch.manual_seed(config.seed)
    inputs = TrainingInputs(
        batches=source,
        steps=STEPS,
        steps_per_epoch=STEPS_PER_EPOCH,
        optim=OptimConfig(lr=1e-3),
        loop=config,
        meta=lambda step, metrics: Meta(kind="lsmcl", step=step, model=asdict(MODEL), metrics=metrics),
        evaluate=evaluate,
        max_failure_share=max_failure_share,
    )
    return TrainingLoop(LSMCL(MODEL, TASK), inputs, context)


def losses(context: SoloContext) -> list[float]:
    return [row["train/loss"] for _, row in context.rows]


def saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"))


def finetune_loop(
    context: SoloContext,
    source: Callable[[int], Generator[ClipBatch]] = batches,
    model: ModelConfig = MODEL,
    **loop: Any,
) -> TrainingLoop:
    """Return a short fine-tuning from a fixed seed, with a temperature that changes."""
    decoder = replace(model.decoder, selection=replace(model.decoder.selection, temperature_end=0.1))
    model = replace(model, decoder=decoder)
    torch.manual_seed(0)
    task = Supervised(VideoModel(model, 2), "class")
    inputs = TrainingInputs(
        batches=source,
        steps=STEPS,
        steps_per_epoch=STEPS_PER_EPOCH,
        optim=OptimConfig(lr=1e-3),
        loop=replace(LoopConfig(log_every=1, batch_size=BATCH), **loop),
        meta=lambda step, metrics: Meta(
            kind="class", step=step, model=asdict(model), classes=["a", "b"], metrics=metrics
        ),
    )
    return TrainingLoop(task, inputs, context)
