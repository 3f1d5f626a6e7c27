"""Benchmark of pretraining on cached features at LVU's shape: clips of 60 frames of 197 tokens of width 1,024.

    make bench-pretraining [ARGS="--rounds 5 --device cuda"]

Both cases take the same LSMCL steps, optimiser included: `bare` on a batch that lies in memory, `read` on batches that
`CachedClips` reads meanwhile, as `pretrain --features` does. The features are in the page cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import repeat
from statistics import median

import torch

from pipelines.config import DataConfig
from pipelines.data.clip_order import ClipOrder
from pipelines.data.features.batches import CachedClips
from s5.batch import ClipBatch
from s5.config import BackboneConfig, ClipConfig, LSMCLConfig, ModelConfig
from tests.bench.features import TOKENS, WIDTH, WINDOW, make
from tests.bench.record import Row, ratio, write
from tests.bench.train import stepper_of

AHEAD = 2
"""Batches that are read ahead, the default."""
TARGET = 0.9
"""Least speed against the bare step."""


def main() -> None:
    """Measure, print, and write out/bench/pretraining.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of a round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=2, help="pairs")
    parser.add_argument("--videos", type=int, default=8, help="videos, 96 MB each")
    options = parser.parse_args()
    device = torch.device(options.device)
    stepper = stepper_of(
        ModelConfig(backbone=BackboneConfig(name="made", frozen=True, tokens=TOKENS, width=WIDTH)),
        LSMCLConfig(mask_on="tokens"),
        options,
    )
    with tempfile.TemporaryDirectory() as folder:
        manifest, _ = make(folder, options.videos, minutes=4.0)
        source = CachedClips(
            features=folder,
            clips=ClipConfig(frames=WINDOW, long_stride=2.0, short_stride=1.0),
            frame_size=224,
            data=DataConfig(prefetch_batches=AHEAD),
            pairs=True,
        )
        order = ClipOrder(len(manifest), options.batch, epochs=1, seed=0, steps=1 << 20)
        with closing(source.training(manifest, order, 0)) as batches:
            held = next(batches).to(device)

            def steps(source: Iterator[ClipBatch], count: int) -> float:
                began = time.perf_counter()
                for _ in range(count):
                    stepper(next(source).to(device))
                    stepper.task.after_step(0.5)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                return time.perf_counter() - began

            seconds: dict[str, list[float]] = {"bare": [], "read": []}
            for _ in range(options.rounds):
                # Time for what is read ahead; then those batches, untimed.
                steps(repeat(held), AHEAD)
                seconds["bare"].append(steps(repeat(held), options.steps))
                steps(batches, AHEAD)
                seconds["read"].append(steps(batches, options.steps))
    rows = [
        Row("a bare step, s", median(seconds["bare"]) / options.steps),
        Row("tokens of a step, MB", 2 * options.batch * WINDOW * TOKENS * WIDTH * 2 / 1e6),
        Row("speed on features that are read, against the bare step", ratio(seconds["bare"], seconds["read"]), TARGET),
    ]
    write("pretraining", device, rows, dict(seconds))


if __name__ == "__main__":
    main()
