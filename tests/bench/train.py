"""Benchmark of training: what masking saves, and what everything around the model's own arithmetic costs.

    make bench-train [ARGS="--rounds 5 --device cuda --only masking loop"]

Every comparison alternates its cases and takes medians over rounds of ratios. `loop` trains on batches that lie in
memory, under Ray Train and without Ray, through the same `TrainingLoop`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipelines.config import (
    IndexConfig,
    PretrainConfig,
    SampleConfig,
    ScaleConfig,
    TrackingConfig,
    override,
)
from pipelines.running.resources import ensure_ray
from pipelines.running.stage import stage_run
from pipelines.stages import index, pretrain, sample
from pipelines.training.launcher import launch
from s5.batch import ClipBatch
from s5.checkpoints.checkpoint import Meta
from s5.config import BackboneConfig, DecoderConfig, LoopConfig, LSMCLConfig, ModelConfig, OptimConfig
from s5.distributed import share_of
from s5.tasks.lsmcl import LSMCL
from s5.training.context import SoloContext, WorkerContext
from s5.training.loop import TrainingInputs, TrainingLoop
from s5.training.optim import build_optimizer
from s5.training.step import Stepper
from s5.training.throughput import ThroughputWindow
from tests.bench.record import Row, alternate, ratio, write

OFF = TrackingConfig(uri="off")
# For the parts that measure what lies around the model: a step of tenths of a second on one core.
SMALL = ModelConfig(
    backbone=BackboneConfig(name="vit_tiny_patch16_224", frame_size=64, depth=4),
    decoder=DecoderConfig(),
)
HEADS = LSMCLConfig(hidden=512, dim=64)


def batch_of(size: int, frames: int, pixels: int, device: torch.device, step: int = 0) -> ClipBatch:
    """Return random pairs."""
    generator = torch.Generator().manual_seed(step)
    shape = (size, frames, pixels, pixels, 3)
    long, short = (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device) for _ in range(2))
    rows = torch.arange(size, device=device)
    ids = [f"v{row}" for row in range(size)]
    return ClipBatch(step, 0, ids, long, short, rows + step * size, rows * 0, rows * 0.0, [])


# --- one step ---------------------------------------------------------------------------------------------------------


def stepper_of(model: ModelConfig, config: LSMCLConfig, options: argparse.Namespace) -> Stepper:
    """Return the steps of a task from a fixed seed."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    task = LSMCL(model, config).to(device).train()
    loop = LoopConfig(precision=options.precision)
    return Stepper(task, build_optimizer(task, OptimConfig()), 1.0, loop, device)


def stepping(model: ModelConfig, config: LSMCLConfig, options: argparse.Namespace) -> Callable[[], None]:
    """Return a function that takes a whole step on one batch: both branches, optimiser, moving averages."""
    stepper = stepper_of(model, config, options)
    pixels = model.backbone.frame_size
    batch = batch_of(options.batch, options.frames, pixels, torch.device(options.device))

    def step() -> None:
        stepper(batch)
        stepper.task.after_step(0.5)

    return step


def masking(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Compare steps at three masking ratios, and a plain MoCo v3 step: all tokens, averaged, with no pyramid."""
    model = ModelConfig(backbone=BackboneConfig(name=options.backbone))
    cases = {f"mask {share:g}": stepping(model, LSMCLConfig(mask_ratio=share), options) for share in (0.0, 0.5, 0.75)}
    plain = replace(model, decoder=DecoderConfig(name="tsn"))
    cases["moco v3"] = stepping(plain, LSMCLConfig(mask_ratio=0.0), options)
    seconds = alternate(cases, options.rounds, torch.device(options.device))
    whole = seconds["mask 0"]
    return seconds, [
        Row(f"LSMCL step, {options.backbone}, seconds at masking ratio 0", median(whole)),
        Row("LSMCL step at masking ratio 0.5 / 0", 1 / ratio(whole, seconds["mask 0.5"]), 0.6, "lower"),
        Row("LSMCL step at masking ratio 0.75 / 0", 1 / ratio(whole, seconds["mask 0.75"]), 0.4, "lower"),
        Row(
            "plain MoCo v3 step, all tokens / LSMCL step at 0.5",
            ratio(seconds["moco v3"], seconds["mask 0.5"]),
            1.6,
        ),
    ]


def upkeep(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Time the moving averages and the metrics of a step apart from the rest of it."""
    device = torch.device(options.device)
    model = ModelConfig(backbone=BackboneConfig(name=options.backbone))
    stepper = stepper_of(model, LSMCLConfig(), options)
    batch = batch_of(options.batch, options.frames, model.backbone.frame_size, device)
    window = ThroughputWindow(options.batch)
    scalars, _ = stepper(batch)

    def metrics() -> None:
        window.add(scalars, batch, 0.0, 1.0, True)
        window.row(2)

    cases = {
        "step": lambda: stepper(batch),
        "average": lambda: stepper.task.after_step(0.5),
        "metrics": metrics,
    }
    seconds = alternate(cases, options.rounds, device)
    share = median(
        (average + row) / (step + average + row)
        for step, average, row in zip(seconds["step"], seconds["average"], seconds["metrics"], strict=True)
    )
    return seconds, [Row("moving averages and a row of metrics / step", share, 0.03, "lower")]


# --- the loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InMemory:
    """What a worker trains on: batches that lie in its memory."""

    steps: int
    batch: int = 4
    frames: int = 4


def loop_of(job: InMemory, context: WorkerContext) -> TrainingLoop:
    """Return the loop of one worker, with a row of the log every ten steps."""
    torch.manual_seed(0)
    model, pixels = SMALL, SMALL.backbone.frame_size
    mine = share_of(job.batch, context.rank, context.world_size)
    batches = [
        replace(item, global_size=job.batch)
        for step in range(4)
        for item in batch_of(job.batch, job.frames, pixels, torch.device("cpu"), step).parts(len(mine))
    ][context.rank :: context.world_size]

    def source(start: int) -> Generator[ClipBatch]:
        for step in range(start, job.steps):
            yield replace(batches[step % len(batches)], step=step)

    inputs = TrainingInputs(
        batches=source,
        steps=job.steps,
        steps_per_epoch=job.steps,
        optim=OptimConfig(),
        loop=LoopConfig(batch_size=job.batch, log_every=10, checkpoint_every=job.steps),
        meta=lambda step, metrics: Meta(kind="lsmcl", step=step, model=asdict(model), metrics=metrics),
    )
    return TrainingLoop(LSMCL(model, HEADS), inputs, context)


def seconds_per_step(rows: list[tuple[int, dict[str, float]]]) -> float:
    """Return the median seconds of a step over the rows of a log but the first two, where all warms up."""
    return median([row["train/step_seconds"] for _, row in rows if "train/step_seconds" in row][2:])


class GroupContext(SoloContext):
    """One of several processes without Ray."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module under DDP."""
        return nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False)


def _group_worker(rank: int, world: int, folder: str, job: InMemory, found: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(  # type: ignore[attr-defined]
        f"{folder}/store", world
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=5))
    context = GroupContext(rank=rank, world_size=world)
    loop_of(job, context).run()
    if rank == 0:
        found.put(seconds_per_step(context.rows))
    dist.destroy_process_group()


def without_ray(job: InMemory, world: int) -> float:
    """Return the seconds of a step in as many fresh processes."""
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        if world == 1:
            processes = [spawn.Process(target=_solo_worker, args=(job, found))]
        else:
            arguments = [(rank, world, folder, job, found) for rank in range(world)]
            processes = [spawn.Process(target=_group_worker, args=item) for item in arguments]
        for process in processes:
            process.start()
        seconds = float(found.get(timeout=600))
        for process in processes:
            process.join()
    return seconds


def _solo_worker(job: InMemory, found: Any) -> None:
    torch.set_num_threads(1)
    context = SoloContext()
    loop_of(job, context).run()
    found.put(seconds_per_step(context.rows))


def with_ray(job: InMemory, world: int) -> float:
    """Return the seconds of a step under Ray Train: the same that `pretrain` and `finetune` run in."""
    rows: list[tuple[int, dict[str, float]]] = []
    # One CPU each less than the machine has, for what Ray itself asks for.
    scale = ScaleConfig(num_workers=world, cpus_per_worker=0.9)
    with tempfile.TemporaryDirectory() as folder:
        config = PretrainConfig(out=folder, tracking=OFF, scale=scale)
        with stage_run("pretrain", config) as stage:
            loop = LoopConfig(batch_size=job.batch)
            launch(stage, loop_of, job, scale=scale, data=None, loop=loop, report=[lambda *row: rows.append(row)])
    return seconds_per_step(rows)


def loop(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Compare the loop under Ray Train with the same loop without Ray."""
    ensure_ray()
    job = InMemory(options.steps)
    found: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for world in (1, 2):
            found.setdefault(f"ray {world}", []).append(with_ray(job, world))
            found.setdefault(f"alone {world}", []).append(without_ray(job, world))
    speeds = {world: ratio(found[f"alone {world}"], found[f"ray {world}"]) for world in (1, 2)}
    return found, [
        Row(f"speed under Ray Train / without Ray, workers: {world}", speed, 0.95) for world, speed in speeds.items()
    ]


def waiting(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Pretrain on rendered videos, on one core beside one that decodes, and take the share of time without data."""
    out = Path("out/bench/waiting")
    videos = str(out / "videos")
    sample.run(SampleConfig(out=videos, videos=64, seconds=32, size=64, val_share=0, test_share=0, tracking=OFF))
    index.run(IndexConfig(videos=videos, out=str(out / "index"), tracking=OFF))
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = override(
            PretrainConfig(tracking=OFF, lsmcl=HEADS, model=SMALL, probe_videos=0),
            {
                "manifest": str(out / "index"),
                "out": folder,
                "clips.frames": 8,
                "loop.batch_size": 8,
                "loop.steps": options.steps,
                "loop.log_every": 5,
                "data.cpus_per_decode": 0.9,
                "scale.cpus_per_worker": 1.0,
            },
        )
        pretrain.run(config, on_row=lambda _, row: shares.append(row.get("train/data_wait_share", 0.0)))
    return {"shares": shares}, [
        Row("share of the time waiting for data, decoding on one core of two", median(shares[2:]), 0.05, "lower")
    ]


PARTS = {"masking": masking, "upkeep": upkeep, "loop": loop, "waiting": waiting}


def main() -> None:
    """Read the options, run and write out/bench/train.json."""
    parser = argparse.ArgumentParser(description="Benchmark of training.")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of every comparison")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of a step's parts")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="of a step's parts")
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="of a step's parts")
    parser.add_argument("--batch", type=int, default=2, help="pairs of a step")
    parser.add_argument("--frames", type=int, default=4, help="frames of a clip")
    parser.add_argument("--steps", type=int, default=100, help="steps of a run of the loop")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to measure")
    options = parser.parse_args()
    raw: dict[str, Any] = {"options": vars(options)}
    figures: list[Row] = []
    for name in options.only:
        raw[name], found = PARTS[name](options)
        figures += found
    write("train", torch.device(options.device), figures, raw)


if __name__ == "__main__":
    main()
