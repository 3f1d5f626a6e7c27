"""Reading of cached features at the size of LVU's windows (60 x 197 x 1024), against plain reads of the same files.

A round reads as many windows as the files have bytes for (a warm round PASSES times), with `CachedClips` into batches
as a training step takes them. Plain reads are sequential, of whole files into reused buffers: by one thread into a
small buffer, which stays in the processor's cache; and by as many threads as read features, each into one of a batch.
In warm rounds the files are in the page cache; in cold rounds they are not, and no process has them mapped.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.data.clip_order import ClipOrder
from pipelines.data.features.batches import CachedClips
from pipelines.data.features.cache import INDEX, FeatureMeta, finish, frame_times, shard_path, shard_writer
from pipelines.data.manifest import SCHEMA
from s5.config import ClipConfig
from tests.bench.record import Row, alternate, ratio, write

WINDOW, TOKENS, WIDTH, CHUNK = 60, 197, 1024, 64
BLOCK = 8 << 20
"""Bytes of a plain read."""
PASSES = 16
"""Times that a warm round reads everything: 192 batches, of which the first few allocate memory."""
DROPS = 20
"""Attempts to drop a file from the page cache."""
PREFETCH = 2
"""Prefetched batches, the default of `data.prefetch_batches`."""


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
    manifest = pa.Table.from_pylist(rows, SCHEMA)
    finish(folder, meta, manifest, videos, noise[0])
    return manifest, videos * len(times)


class Plain:
    """Sequential reads of whole files into buffers that are allocated once."""

    def __init__(self, paths: list[Path], threads: int, size: int) -> None:
        self._shares = [paths[thread::threads] for thread in range(threads)]
        # Written once, so that the system has given the memory by the time it is timed.
        self._buffers = [np.ones(size, np.uint8) for _ in range(threads)]

    def read(self, passes: int) -> None:
        """Read all files so many times, each thread its share into its one buffer."""
        with ThreadPoolExecutor(len(self._shares)) as pool:
            list(pool.map(self._read, [share * passes for share in self._shares], self._buffers))

    def _read(self, paths: list[Path], buffer: npt.NDArray[np.uint8]) -> None:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer.data):
                    pass


def drop(paths: list[Path]) -> None:
    """Drop files from the page cache.

    Raises:
        RuntimeError: their pages are still there, as those of a file that is mapped.
    """
    for path in paths:
        with path.open("rb", buffering=0) as file:
            # Pages that the system is still putting into its lists stay at first.
            for _ in range(DROPS):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                try:
                    os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT)
                except BlockingIOError:
                    break
                time.sleep(0.01)
            else:
                raise RuntimeError(f"{path} is still in the page cache")


def read_windows(folder: str, manifest: pa.Table, batch: int, windows: int, passes: int) -> None:
    """Read windows as fine-tuning does, `passes` times."""
    order = ClipOrder(len(manifest), batch, epochs=1, seed=0, steps=windows // batch * passes)
    source = CachedClips(
        features=folder,
        clips=ClipConfig(frames=WINDOW, long_stride=1.0),
        frame_size=224,
        data=DataConfig(prefetch_batches=PREFETCH),
        protocol="windows",
    )
    for _ in source.training(manifest, order, 0):
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
    small = f"1 thread, one buffer of {BLOCK >> 20} MiB"
    large = f"{PREFETCH + 1} threads, each a buffer of a batch"
    cases: dict[str, Callable[[int], None]] = {
        small: Plain(paths, 1, BLOCK).read,
        large: Plain(paths, PREFETCH + 1, read // windows * batch).read,
        "features": partial(read_windows, folder, manifest, batch, windows),
    }
    rows: list[Row] = []
    raw: dict[str, object] = {"bytes": size, "bytes_of_windows": read, "windows": windows}
    for state, passes, before in (("warm", PASSES, None), ("cold", 1, partial(drop, paths))):
        runs = {name: partial(case, passes) for name, case in cases.items()}
        found = alternate(runs, rounds, torch.device("cpu"), before=before)
        seconds = {name: [second / passes for second in of_case] for name, of_case in found.items()}
        raw[state] = seconds
        rates = {name: (read if name == "features" else size) / median(seconds[name]) / 1e9 for name in cases}
        rows += [Row(f"{state}: {name}, GB/s", rate) for name, rate in rates.items()]
        for name in (small, large):
            share = ratio(seconds[name], seconds["features"]) * read / size
            rows.append(Row(f"{state}: features against {name}", share, 0.8))
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
    parser.add_argument("--folder", help="where the features are written temporarily; default: the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(folder, options.videos, options.minutes, options.batch, options.rounds)


if __name__ == "__main__":
    main()
