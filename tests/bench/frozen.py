"""Benchmark of pretraining with a frozen backbone: what encoding each frame once, or never again, saves of a step.

    make bench-frozen [ARGS="--rounds 5 --device cuda"]

All cases train on the same clips; `encoded twice` is a step whose branches both encode every clip.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from s5.config import BackboneConfig, LSMCLConfig, ModelConfig
from s5.tasks.lsmcl import LSMCL
from tests.bench.record import Row, alternate, ratio, write
from tests.bench.train import batch_of, stepper_of


def stepping(config: LSMCLConfig, options: argparse.Namespace, twice: bool, cached: bool) -> Callable[[], None]:
    """Return a function that takes a whole step: both branches, optimiser, moving averages."""
    backbone = BackboneConfig(name=options.backbone, frozen=True)
    stepper = stepper_of(ModelConfig(backbone=backbone), config, options)
    task = stepper.task
    assert isinstance(task, LSMCL)
    batch = batch_of(options.batch, options.frames, backbone.frame_size, torch.device(options.device))
    if twice:
        # Read by the task alone: the backbones keep their frozen weights.
        task.encoder.config = ModelConfig(backbone=replace(backbone, frozen=False))
    if cached:
        assert batch.short is not None
        with torch.no_grad():
            shape = (options.frames, task.encoder.backbone.tokens)
            long, short = (task.encoder.backbone(x).unflatten(1, shape).half() for x in (batch.long, batch.short))
        batch = replace(batch, long=long, short=short)

    def step() -> None:
        stepper(batch)
        stepper.task.after_step(0.5)

    return step


def main() -> None:
    """Measure, print, and write out/bench/frozen.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="timm's name")
    parser.add_argument("--batch", type=int, default=2, help="pairs")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--mask-ratio", type=float, default=0.5)
    options = parser.parse_args()
    patches = LSMCLConfig(mask_ratio=options.mask_ratio)
    tokens = replace(patches, mask_on="tokens")
    cases = {
        "patches, encoded twice": stepping(patches, options, True, False),
        "patches": stepping(patches, options, False, False),
        "tokens, encoded twice": stepping(tokens, options, True, False),
        "tokens": stepping(tokens, options, False, False),
        "tokens, cached": stepping(tokens, options, False, True),
    }
    device = torch.device(options.device)
    seconds = alternate(cases, options.rounds, device)
    before = seconds["patches, encoded twice"]
    rows = [Row("patches, encoded twice: seconds a step", median(before))]
    for name in list(cases)[1:]:
        target = None if name == "tokens, encoded twice" else 0.55
        rows.append(Row(f"{name} / patches, encoded twice", 1 / ratio(before, seconds[name]), target, "lower"))
    rows.append(Row("tokens / tokens, encoded twice", 1 / ratio(seconds["tokens, encoded twice"], seconds["tokens"])))
    write("frozen", device, rows, dict(seconds))


if __name__ == "__main__":
    main()
