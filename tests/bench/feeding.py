"""How many decode cores feed one GPU at the paper's clip sizes: decoding is measured, the GPU assumed."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.config import DecodeConfig, TrackingConfig, TranscodeConfig
from pipelines.data.manifest import MANIFEST, SCHEMA, digest, read_manifest
from pipelines.stages import transcode
from tests.bench.record import Row, table
from tests.bench.videos import PAPER, SIZE, Video, over_videos, read, times_of

# ViT-L/16 at 224 pixels (timm: 61.6 billion multiplications a frame); bf16 without sparsity, of the maker's data sheet.
FRAME_FLOPS, H100_FLOPS, UTILISATION, MASK_RATIO = 2 * 61.6e9, 989e12, 0.4, 0.5


def feeding(rows: list[Video], options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Measure a pair of the paper's size from each video and its small copy, and print how many cores feed one H100."""
    seconds = {"original": pair_seconds(rows, options.rounds), "small": pair_seconds(small(rows), options.rounds)}
    # Two clips, each through the online encoder (forward 1, backward 2) and the momentum encoder (forward 1).
    flops = 2 * PAPER.frames * FRAME_FLOPS * 4 * (1 - MASK_RATIO)
    fed = UTILISATION * H100_FLOPS / flops
    print(
        f"\nOne H100, assumed: LSMCL on ViT-L/16 at {SIZE} pixels, a pair is 2 clips x {PAPER.frames} frames x "
        f"{FRAME_FLOPS / 1e9:.0f} GFLOP x (3 online + 1 momentum) x {1 - MASK_RATIO:g} unmasked = {flops / 1e12:.1f} "
        f"TFLOP; {UTILISATION:g} of {H100_FLOPS / 1e12:.0f} TFLOP/s make {fed:.1f} pairs/s.\n"
        f"Seconds of a pair of {PAPER.frames} frames on one core, measured: medians of {options.rounds}. The long clip "
        f"of a video below {PAPER.frames} s shrinks to fit.\n"
    )
    lines = []
    for number, row in enumerate(rows):
        found = [seconds[name][number] for name in ("original", "small")]
        about = [Path(row["uri"]).name, f"{row['width']}x{row['height']}", row["codec"], f"{row['duration_s']:.0f} s"]
        lines.append(about + [f"{one:.3f}" for one in found] + [f"{fed * one:.1f}" for one in found])
    header = ["video", "size", "codec", "length", "s a pair", "transcoded", "cores for one H100", "transcoded"]
    table(header, lines)
    return {"pair_seconds": seconds, "pair_flops": flops, "pairs_per_second": fed}, [
        Row("pairs a second of one H100, ViT-L/16 (assumed)", fed),
        *(
            Row(f"{what}, {name} videos: {which}", scale * pick(seconds[name]))
            for name in ("original", "small")
            for which, pick in (("median", median), ("slowest", max))
            for what, scale in (("seconds of a pair of 60 frames, one core", 1.0), ("decode cores for one H100", fed))
        ),
    ]


def pair_seconds(rows: list[Video], rounds: int) -> list[float]:
    """Return the median seconds of a pair of each video."""

    def cases(row: Video, number: int) -> dict[str, Any]:
        return {"pair": partial(read, row, times_of(row, PAPER, number))}

    return [median(over_videos([row], rounds, cases)["pair"]) for row in rows]


def small(rows: list[Video]) -> list[Video]:
    """Return the rows of the videos as stage `transcode` encodes them for these clips; they are encoded once."""
    manifest = pa.Table.from_pylist(rows, SCHEMA)
    out = f"out/bench/small-{digest(manifest)[:12]}"
    storage.write_table(f"{out}.parquet", manifest)
    config = TranscodeConfig(
        out=out,
        manifest=f"{out}.parquet",
        short_side=SIZE,
        clips=PAPER,
        measured_videos=0,
        data=DecodeConfig(clips_per_task=1, decode_timeout_s=600.0),
        tracking=TrackingConfig(uri="off"),
    )
    transcode.run(config)
    return [dict(row) for row in read_manifest(f"{out}/{MANIFEST}").to_pylist()]
