"""Benchmark of saving: what a checkpoint costs the step loop, and how fast it is written and verified.

    make bench-saving [ARGS="--depth 12 --steps 6 --folder FOLDER --device cuda"]

Steps are taken on one batch, turn about without a save and while one is being written.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from s5.batch import ClipBatch
from s5.checkpoints.checkpoint import Meta, verify
from s5.checkpoints.history import checkpoint_name
from s5.checkpoints.writer import CheckpointWriter
from s5.config import BackboneConfig, LoopConfig, LSMCLConfig, ModelConfig, OptimConfig
from s5.tasks.lsmcl import LSMCL
from s5.training.context import SoloContext
from s5.training.optim import build_optimizer
from s5.training.step import Stepper
from tests.bench.record import Row, write


def batch_of(options: argparse.Namespace, device: torch.device) -> ClipBatch:
    """Return random pairs."""
    shape = (options.batch, options.frames, 224, 224, 3)
    long, short = (torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(2))
    rows = torch.arange(options.batch, device=device)
    return ClipBatch(0, 0, [f"v{row}" for row in range(options.batch)], long, short, rows, rows * 0, rows * 0.0, [])


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="vit_base_patch16_224", help="frame encoder")
    parser.add_argument("--depth", type=int, default=12, help="its blocks")
    parser.add_argument("--batch", type=int, default=2, help="videos of a step")
    parser.add_argument("--frames", type=int, default=4, help="frames of a clip")
    parser.add_argument("--steps", type=int, default=2, help="steps of a measurement without a save")
    parser.add_argument("--rounds", type=int, default=3, help="saves")
    parser.add_argument("--every", type=float, default=600.0, help="seconds between saves that the share is given for")
    parser.add_argument("--folder", default="", help="where to write, default a temporary folder")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    config = ModelConfig(backbone=BackboneConfig(name=options.name, depth=options.depth))
    task = LSMCL(config, LSMCLConfig()).to(device).train()
    optimizer = build_optimizer(task, OptimConfig())
    stepper = Stepper(task, optimizer, 1.0, LoopConfig(), device)
    batch = batch_of(options, device)

    def step() -> float:
        began = time.perf_counter()
        stepper(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    step()
    quiet: list[float] = []
    blocked: list[float] = []
    spent: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
        context = SoloContext(Path(folder))
        assert context.checkpoints is not None
        with CheckpointWriter(context.checkpoints, context) as writer:
            for number in range(1, options.rounds + 1):
                quiet += [step() for _ in range(options.steps)]
                began = time.perf_counter()
                writer.save(task, optimizer, Meta(kind="lsmcl", step=number, model=asdict(config)))
                blocked.append(time.perf_counter() - began)
                steps = 0
                while len(context.rows) < number:
                    step()
                    steps += 1
                spent.append((time.perf_counter() - began, steps))
        began = time.perf_counter()
        verify(Path(folder, checkpoint_name(options.rounds)))
        verified = time.perf_counter() - began
        size = sum(path.stat().st_size for path in Path(folder, checkpoint_name(options.rounds)).iterdir())
    written = median(row["train/save_write_seconds"] for _, row in context.rows)
    later = blocked[1:] or blocked
    # All that a save costs: what the steps took until it was written, less what they take without one.
    lost = median(seconds - steps * median(quiet) for seconds, steps in spent[1:] or spent)
    parameters = sum(p.numel() for p in task.parameters() if p.requires_grad)
    rows = [
        Row("trained parameters, millions", parameters / 1e6),
        Row("checkpoint, MB", size / 1e6),
        Row("step, seconds", median(quiet)),
        Row("loop blocked by the first save, seconds", blocked[0]),
        Row("loop blocked by a later save, seconds", median(later)),
        Row("writing and hashing in the thread, seconds", written),
        Row("writing and hashing, MB/s", size / 1e6 / written),
        Row("verifying, MB/s", size / 1e6 / verified),
        Row("loop slower in all by a later save, seconds", lost),
        Row(
            f"share of the loop, blocked, a save every {options.every:g} s",
            median(later) / options.every,
            0.02,
            "lower",
        ),
        Row(f"share of the loop, all, a save every {options.every:g} s", lost / options.every, 0.02, "lower"),
    ]
    write("saving", device, rows, {"quiet": quiet, "blocked": blocked, "spent": [list(each) for each in spent]})


if __name__ == "__main__":
    main()
