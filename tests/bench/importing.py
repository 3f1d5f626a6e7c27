"""What a long list costs `features --import` and those that read its features: CPU time a video.

    make bench-importing ARGS="--videos 1000000 --files 100000"

`list` walks a folder of (empty) files; `plan` finds each video's file and cuts shards; `open` is what a reader does
before its first clip, from an index in the page cache. None of them opens a file of features.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipelines import storage
from pipelines.data.features.cache import IMPORTED, INDEX, FeatureMeta, finish, shard_path
from pipelines.data.features.importing import FeatureFile, list_files, plan
from pipelines.data.features.reader import FeatureReader
from pipelines.data.manifest import SCHEMA
from tests.bench.record import Row, write


def manifest_of(videos: int) -> pa.Table:
    """Return a manifest of videos of a minute."""
    names = [f"video{number:07d}" for number in range(videos)]
    columns = {"video_id": names, "uri": [f"/videos/{name}.mp4" for name in names], "split": ["train"] * videos}
    numbers = {"start_s": 0, "end_s": 60, "duration_s": 60, "fps": 25, "num_frames": 1500, "width": 1, "height": 1}
    columns |= {name: [value] * videos for name, value in numbers.items()}  # type: ignore[dict-item]
    empty = {field.name: [None] * videos for field in SCHEMA if field.name not in columns}
    return pa.table(columns | empty, SCHEMA)


def write_index(folder: str, manifest: pa.Table) -> None:
    """Write features without frames: the files that a reader opens first."""
    meta = FeatureMeta(
        backbone={"name": "bench"},
        weights=IMPORTED,
        mean=[],
        std=[],
        precision="",
        frames_per_second=1.0,
        manifest="",
        tokens=1,
        width=1,
        chunk_frames=64,
    )
    count = len(manifest)
    columns = {"video_id": manifest["video_id"], "uri": manifest["uri"], "reason": pa.array([""] * count)}
    columns |= {name: pa.array(np.zeros(count, np.int64)) for name in ("shard", "batch", "frames")}
    columns["start_s"] = pa.array(np.zeros(count))
    storage.write_table(shard_path(folder, 0, "parquet"), pa.table(columns).select(INDEX.names).cast(INDEX))
    finish(folder, meta, manifest, 1, np.zeros((1, 1), np.float16))


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time that work takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=1_000_000, help="videos that are planned and opened")
    parser.add_argument("--files", type=int, default=100_000, help="files that are listed")
    options = parser.parse_args()
    manifest = manifest_of(options.videos)
    named = [FeatureFile(f"/f/{name}.npy", name, "npy", 1 << 20, 0) for name in manifest["video_id"].to_pylist()]
    with tempfile.TemporaryDirectory(prefix="importing-") as folder:
        files = Path(folder) / "files"
        files.mkdir()
        for number in range(options.files):
            (files / f"video{number:07d}.npy").touch()
        write_index(f"{folder}/features", manifest)
        seconds = {
            "list": cpu_seconds(lambda: list_files(str(files), "auto")),
            "plan": cpu_seconds(lambda: plan(manifest, named, "/f", 1e9)),
            "open": cpu_seconds(lambda: FeatureReader(f"{folder}/features")),
        }
    counts = {"list": options.files, "plan": options.videos, "open": options.videos}
    rows = [Row(f"{name}: videos a CPU second", counts[name] / taken) for name, taken in seconds.items()]
    write("importing", torch.device("cpu"), rows, {"seconds": seconds})


if __name__ == "__main__":
    main()
