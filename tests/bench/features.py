"""Reading of cached features at the size of LVU's windows (60 x 197 x 1024), against plain reads of the same files.

A round trains one epoch of windows from every video, as many bytes as the files have: `train_batches` into batches that
a training step would take, against sequential reads of all files into one buffer. Warm rounds find the files in the
system's page cache; before cold ones they are dropped from it. The target is that of cold reads, of the disk: warm, a
plain read into one small buffer writes to no memory at all, while a batch is memory that was not there before.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import torch

from pipelines import storage
from pipelines.decode import Reading
from pipelines.feature_batches import train_batches
from pipelines.feature_store import INDEX, FeatureMeta, FeatureReader, finish, frame_times, shard_path, shard_writer
from pipelines.manifest import SCHEMA
from pipelines.plan import ClipPlan
from s5.config import ClipConfig
from tests.bench.record import Row, alternate, ratio, write

WINDOW, TOKENS, WIDTH, CHUNK = 60, 197, 1024, 64
BLOCK = 8 << 20
"""Bytes of a plain read."""


def make(folder: str, videos: int, minutes: float) -> tuple[pa.Table, int]:
    """Write features of random tokens, a video a shard, and return the manifest and the number of frames."""
    meta = FeatureMeta(
        backbone={},
        weights="",
        mean=[],
        std=[],
        precision="fp32",
        frames_per_second=1.0,
        manifest="",
        tokens=TOKENS,
        width=WIDTH,
        chunk_frames=CHUNK,
    )
    noise = np.random.default_rng(0).standard_normal((CHUNK, TOKENS, WIDTH), np.float32).astype(np.float16)
    times = frame_times(0, 60 * minutes, 1.0)
    rows = []
    for shard in range(videos):
        with shard_writer(folder, shard, meta) as writer:
            for first in range(0, len(times), CHUNK):
                chunk = times[first : first + CHUNK]
                writer.add(chunk, noise[: len(chunk)])
        place = {"video_id": f"v{shard}", "uri": "", "shard": shard, "batch": 0, "frames": len(times), "start_s": 0.0}
        storage.write_table(shard_path(folder, shard, "parquet"), pa.Table.from_pylist([place | {"reason": ""}], INDEX))
        facts = {"start_s": 0.0, "end_s": 60 * minutes, "duration_s": 60 * minutes, "fps": 25.0, "num_frames": 1}
        rows.append({"video_id": f"v{shard}", "uri": "", "split": "train", "width": 1, "height": 1} | facts)
    finish(folder, meta, videos, noise[0])
    return pa.Table.from_pylist(rows, SCHEMA), videos * len(times)


def read_plainly(paths: list[Path], cold: bool) -> None:
    """Read whole files, one after the other, into one buffer."""
    buffer = bytearray(BLOCK)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.readinto(buffer):
                pass


def read_windows(folder: str, paths: list[Path], manifest: pa.Table, batch: int, windows: int, cold: bool) -> None:
    """Read windows as fine-tuning does."""
    if cold:
        for path in paths:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    plan = ClipPlan(len(manifest), batch, epochs=1, seed=0, steps=windows // batch)
    reading = Reading(ClipConfig(frames=WINDOW, long_stride=1.0), 224, protocol="windows")
    reader = FeatureReader(folder)
    for _ in train_batches(reader=reader, manifest=manifest, plan=plan, reading=reading, seed=0, prefetch=2):
        pass


def run(folder: str, videos: int, minutes: float, batch: int, rounds: int) -> None:
    """Measure, print and write out/bench/features.json."""
    manifest, frames = make(folder, videos, minutes)
    paths = sorted(Path(folder).glob("shards/*.arrow"))
    size = sum(path.stat().st_size for path in paths)
    windows = frames // WINDOW // batch * batch
    read = windows * WINDOW * TOKENS * WIDTH * 2
    # What has just been written must be on the disk for its pages to be dropped.
    os.sync()
    rows: list[Row] = []
    raw: dict[str, object] = {"bytes": size, "bytes_of_windows": read, "windows": windows}
    for state in ("warm", "cold"):
        cold = state == "cold"
        seconds = alternate(
            {
                "plain": lambda cold=cold: read_plainly(paths, cold),  # type: ignore[misc]
                "features": lambda cold=cold: read_windows(folder, paths, manifest, batch, windows, cold),  # type: ignore[misc]
            },
            rounds,
            torch.device("cpu"),
        )
        raw[state] = seconds
        rates = {"plain": size / median(seconds["plain"]) / 1e9, "features": read / median(seconds["features"]) / 1e9}
        rows += [Row(f"{state}: {name} reads, GB/s", rate) for name, rate in rates.items()]
        share = ratio(seconds["plain"], seconds["features"]) * read / size
        rows.append(Row(f"{state}: features against plain reads", share, 0.8 if cold else None))
        rows.append(Row(f"{state}: windows/s", windows / median(seconds["features"])))
        rows.append(Row(f"{state}: tokens/s", windows * WINDOW * TOKENS / median(seconds["features"])))
    write("features", torch.device("cpu"), rows, raw)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description="Benchmark of reading cached features.")
    parser.add_argument("--videos", type=int, default=12, help="videos, each a shard")
    parser.add_argument("--minutes", type=float, default=4.0, help="length of a video, 24 MB a minute")
    parser.add_argument("--batch", type=int, default=4, help="windows of a batch")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of every comparison")
    parser.add_argument("--folder", help="where the features are written for a while; default: the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(folder, options.videos, options.minutes, options.batch, options.rounds)


if __name__ == "__main__":
    main()
