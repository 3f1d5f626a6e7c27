"""How much of the time of stage `features` passes outside the model: reading, copying and writing that do not overlap.

    make bench-encoding [ARGS="--backbone vit_large_patch16_224 --gpus 1 --precision bf16"]

One worker's actor makes shards of rendered H.264 videos, as Ray Data has it do, here without Ray. Time in the model is
that of its forward passes: on a GPU between events before and after each, on the CPU by the clock.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.config import FeaturesConfig, override
from pipelines.stages.features import COLUMNS, Encoder, meta_of
from s5.models.backbone import Backbone
from s5.video.reading import probe
from tests.bench.record import Row, write
from tests.s5.videos import write_video

FPS = 8


class Timed:
    """Adds up the time of a model's forward passes."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._cuda, self._marks = device.type == "cuda", []  # type: ignore[var-annotated]
        model.register_forward_pre_hook(lambda *_: self._mark())
        model.register_forward_hook(lambda *_: self._mark())

    def _mark(self) -> None:
        mark: Any = time.perf_counter()
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append(mark)

    def seconds(self) -> float:
        """Return the time since the last call of it."""
        if self._cuda:
            torch.cuda.synchronize()
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        self._marks.clear()
        return sum(begin.elapsed_time(end) / 1000 if self._cuda else end - begin for begin, end in pairs)


def rows_of(folder: Path, videos: int, seconds: int) -> pa.Table:
    """Write videos, and return the rows of the manifest that encoding needs."""
    rows = []
    for number in range(videos):
        path = folder / f"v{number}.mp4"
        write_video(path, seconds * FPS, fps=FPS)
        facts = probe(str(path))
        names = {"video_id": path.stem, "uri": str(path), "start_s": 0.0, "end_s": float(seconds)}
        rows.append(names | {"width": facts.width, "height": facts.height, "decoder": facts.decoder})
    return pa.Table.from_pylist(rows).select(COLUMNS)


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure, print and write out/bench/encoding.json."""
    changes = {"model.backbone.name": options.backbone, "scale.gpus_per_worker": options.gpus, "out": str(folder)}
    changes |= {"precision": options.precision, "frames_per_second": FPS, "chunk_frames": options.chunk}
    config = override(FeaturesConfig(), changes)
    backbone = Backbone(config.model.backbone)
    encoder = Encoder(config, str(folder), meta_of(config, backbone, ""), backbone, options.decoders)
    device = encoder.backbone.mean.device
    timed = Timed(encoder.backbone, device)
    rows = rows_of(folder, options.videos, options.seconds)
    outside, rates = [], []
    for shard in range(options.rounds + 1):
        began = time.perf_counter()
        index = encoder(rows.append_column("shard", pa.array(np.full(len(rows), shard))))
        taken, inside = time.perf_counter() - began, timed.seconds()
        # The first shard starts the decoding processes.
        if shard:
            outside.append(1 - inside / taken)
            rates.append(sum(index["frames"].to_pylist()) / taken)
    figures = [
        Row("share of time outside the model", float(np.median(outside)), 0.1, "lower"),
        Row("frames/s", float(np.median(rates))),
    ]
    write("encoding", device, figures, {"outside": outside, "frames_per_second": rates})


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="timm's name")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--gpus", type=float, default=0.0, help="1 for a GPU")
    parser.add_argument("--decoders", type=int, default=2, help="processes that read")
    parser.add_argument("--videos", type=int, default=8, help="videos of a shard")
    parser.add_argument("--seconds", type=int, default=4, help=f"length of a video of {FPS} frames a second")
    parser.add_argument("--chunk", type=int, default=16, help="frames encoded together")
    parser.add_argument("--rounds", type=int, default=3, help="shards that count")
    with tempfile.TemporaryDirectory(prefix="encoding-") as folder:
        run(parser.parse_args(), Path(folder))


if __name__ == "__main__":
    main()
