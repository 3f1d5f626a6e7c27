"""Benchmark of reading: clip pairs through Ray Data, of decord alone, of the child process, and memory over many pairs.

    make bench-data [ARGS="--videos FOLDER --soak 5000 --only throughput pairs"]

Without `--videos`, stage `sample` renders some (H.264, key frames 8 s apart) into out/bench/videos. Every comparison
alternates its cases and takes medians over rounds of ratios: other work on the machine moves both sides.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from pipelines.config import DataConfig
from pipelines.data.clip_batches import DecodedClips
from pipelines.data.clip_order import ClipOrder
from pipelines.data.decoding.video_process import VideoProcess
from pipelines.data.decoding.video_requests import ClipRequest
from pipelines.data.manifest import SCHEMA
from pipelines.running.resources import ENVIRONMENT
from s5.config import ViewsConfig
from s5.video.clip_times import clip_seed
from s5.video.crops import random_box
from s5.video.reading import scaled
from tests.bench.feeding import feeding
from tests.bench.processes import cpu_seconds, cpu_seconds_since, resident_bytes
from tests.bench.record import Row, ratio, write
from tests.bench.videos import CLIPS, SIZE, Video, manifest_of, over_videos, plain, read, rendered, times_of

CPU = torch.device("cpu")
BATCH, WARM_STEPS, STEPS = 4, 8, 48
TIMEOUT_S = 120.0
MOCO_SCALE = (0.08, 1.0)
# Ray's default for its workers.
NICENESS = 15


def start_ray(processes: int) -> None:
    """Start Ray with a CPU for each decode task and one for this process, which stands for a training worker."""
    if not ray.is_initialized():
        os.environ.update(ENVIRONMENT)
        ray.init("local", num_cpus=processes + 1, log_to_driver=False, logging_level=logging.ERROR)
        ray.get(ray.util.placement_group([{"CPU": 1}]).ready())


class Delivery:
    """Pairs in a clip order, once through Ray Data and once by decord in as many processes."""

    def __init__(self, rows: list[Video], processes: int, rounds: int) -> None:
        self.rows, self.processes = rows, processes
        copies = -(-2 * BATCH // len(rows))
        # A batch takes no video twice: few files count several times, under other names.
        self.table = pa.Table.from_pylist(
            [row | {"video_id": f"{row['video_id']}-{copy}"} for copy in range(copies) for row in rows], SCHEMA
        )
        self.order = ClipOrder(len(self.table), BATCH, 0, seed=0, steps=rounds * (WARM_STEPS + STEPS))

    def batches(self, start: int, order: ClipOrder | None = None) -> Any:
        """Yield batches from a step on, as a training worker gets them."""
        source = DecodedClips(clips=CLIPS, frame_size=SIZE, data=DataConfig(), decode_tasks=self.processes, pairs=True)
        return source.training(self.table, order or self.order, 0, start)

    def by_ray(self, start: int) -> tuple[float, float]:
        """Return the pairs of STEPS batches, after those that fill the pipeline, a second and a CPU second."""
        with closing(self.batches(start)) as batches:
            for _ in islice(batches, WARM_STEPS):
                pass
            begin, used = time.perf_counter(), cpu_seconds()
            for _ in islice(batches, STEPS):
                pass
            return BATCH * STEPS / (time.perf_counter() - begin), BATCH * STEPS / cpu_seconds_since(used)

    def by_decord(self, pool: Any, start: int) -> tuple[float, float]:
        """Return the same for the same clips."""
        planned = self.order.rows(start + WARM_STEPS, start + WARM_STEPS + STEPS)
        rows = self.table.to_pylist()
        tasks = []
        for video, epoch in zip(planned.video, planned.epoch, strict=True):
            row = rows[int(video)]
            tasks.append((row, times_of(row, CLIPS, clip_seed(0, int(epoch), row["video_id"]))))
        begin, used = time.perf_counter(), cpu_seconds()
        for _ in pool.imap_unordered(_plain_task, tasks):
            pass
        return len(tasks) / (time.perf_counter() - begin), len(tasks) / cpu_seconds_since(used)


def _plain_task(task: tuple[Video, list[np.ndarray]]) -> int:
    return len(plain(*task))


def throughput(rows: list[Video], options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Compare the pairs that Ray Data delivers with those that decord alone reads."""
    delivery = Delivery(_by_decord(rows), options.processes, options.rounds)
    found: dict[str, list[tuple[float, float]]] = {"ray": [], "decord": []}
    # Ray's workers run at a lower priority; on a busy machine decord's must, too.
    with multiprocessing.get_context("spawn").Pool(options.processes, os.nice, (NICENESS,)) as pool:
        pool.map(_plain_task, [(row, times_of(row, CLIPS, 0)) for row in delivery.rows])
        for number in range(options.rounds):
            start = number * (WARM_STEPS + STEPS)
            found["ray"].append(delivery.by_ray(start))
            found["decord"].append(delivery.by_decord(pool, start))
    both = list(zip(found["ray"], found["decord"], strict=True))
    # A busy machine delays Ray's many processes more than a pool; what they compute is the same.
    return found | {"processes": options.processes}, [
        Row("pairs a second through Ray Data", median(ray for (ray, _), _ in both)),
        Row("pairs a second by decord alone, as many processes", median(alone for _, (alone, _) in both)),
        Row("delivered / decord alone", median(ray / alone for (ray, _), (alone, _) in both), 0.9),
        Row("delivered / decord alone, by CPU time", median(ray / alone for (_, ray), (_, alone) in both)),
    ]


def _by_decord(rows: list[Video]) -> list[Video]:
    kept = [row for row in rows if row["decoder"] == "decord"]
    if len(kept) < len(rows):
        print(f"beside decord alone, {len(rows) - len(kept)} of {len(rows)} videos are left out: it reads them wrongly")
    return kept


def pairs(rows: list[Video], options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Compare a pair read in one open with two readings of the file."""

    def cases(row: Video, number: int, overlap: bool) -> dict[str, Callable[[], object]]:
        long, short = times_of(row, CLIPS, number)
        rng = np.random.default_rng(number)
        span = short[-1] - short[0]
        if overlap:
            short = short - short[0] + long[0] + rng.random() * max(0.0, long[-1] - long[0] - span)
        else:
            # The long clip in one half of the video, the short one in the other.
            half = row["end_s"] / 2 - 2 / row["fps"]
            long = (long - long[0]) * min(1.0, half / max(half, long[-1] - long[0]))
            short = (short - short[0]) * min(1.0, half / max(half, span)) + row["end_s"] / 2
        return {
            "one": partial(read, row, [long, short]),
            "two": lambda: (read(row, [long]), read(row, [short])),
        }

    found = {
        name: over_videos(rows, options.rounds, partial(cases, overlap=name == "overlap"))
        for name in ("overlap", "apart")
    }
    shares = {name: [a / b for a, b in zip(s["one"], s["two"], strict=True)] for name, s in found.items()}
    return found, [
        Row("pair in one open / two readings, clips overlap", median(shares["overlap"]), 0.75, "lower"),
        Row("pair in one open / two readings, clips apart", median(shares["apart"]), 1.0, "lower"),
        Row("pair in one open / two readings, worst video", _worst(shares, len(rows)), 1.0, "lower"),
    ]


def _worst(shares: dict[str, list[float]], videos: int) -> float:
    """Return the largest of the videos' medians."""
    return float(max(median(part) for values in shares.values() for part in np.array_split(values, videos)))


def resize(rows: list[Video], options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Compare pictures that are made small while they are decoded with those that are resized afterwards."""

    def after(row: Video, times: list[np.ndarray]) -> None:
        large = torch.from_numpy(plain(row, times, None)).permute(0, 3, 1, 2)
        width, height = scaled((row["width"], row["height"]), SIZE)
        torch.nn.functional.interpolate(large, (height, width), mode="bilinear", antialias=True)

    def cases(row: Video, number: int) -> dict[str, Callable[[], object]]:
        times = times_of(row, CLIPS, number)
        return {"small": partial(plain, row, times), "large": partial(after, row, times)}

    larger = [row for row in _by_decord(rows) if min(row["width"], row["height"]) > SIZE]
    if not larger:
        return {}, [Row("decoded small (what the code does) / resized afterwards", None, 1.0, "lower")]
    seconds = over_videos(larger, options.rounds, cases)
    value = ratio(seconds["small"], seconds["large"])
    return seconds, [Row("decoded small (what the code does) / resized afterwards", value, 1.0, "lower")]


def crops(rows: list[Video], options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Compare pairs of random resized crops with pairs of centre crops, by time and by CPU time."""
    used: dict[str, list[float]] = {"crops": [], "centre": []}

    def counted(name: str, reading: Callable[[], None]) -> None:
        begin = time.process_time()
        reading()
        used[name].append(time.process_time() - begin)

    def cases(row: Video, number: int) -> dict[str, Callable[[], object]]:
        times, size, views = times_of(row, CLIPS, number), (row["width"], row["height"]), ViewsConfig()
        draws = [np.random.default_rng([clip, number]) for clip in (1, 2)]
        boxes = [random_box(size, MOCO_SCALE, views.crop_ratio, draw) for draw in draws]
        return {
            "crops": partial(counted, "crops", partial(read, row, times, boxes=boxes)),
            "centre": partial(counted, "centre", partial(read, row, times)),
        }

    seconds = over_videos(rows, options.rounds, cases)
    shares = [a / b for a, b in zip(seconds["crops"], seconds["centre"], strict=True)]
    worst = max(median(part) for part in np.array_split(shares, len(rows)))
    return seconds | {"cpu": used}, [
        Row("pair of random crops / of centre crops", median(shares), 1.0, "lower"),
        Row("pair of random crops / of centre crops, worst video", float(worst)),
        Row("pair of random crops / of centre crops, by CPU time", ratio(used["crops"], used["centre"]), 1.0, "lower"),
    ]


def child(rows: list[Video], options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Compare reading in a child process with reading in this one."""
    process = VideoProcess()

    def cases(row: Video, number: int) -> dict[str, Callable[[], object]]:
        times = times_of(row, CLIPS, number)
        asked = ClipRequest(times, SIZE, (row["width"], row["height"]), row["decoder"])
        return {"child": lambda: process.read(row["uri"], asked, TIMEOUT_S), "here": partial(read, row, times)}

    try:
        seconds = over_videos(rows, options.rounds, cases)
    finally:
        process.close()
    extra = median(a - b for a, b in zip(seconds["child"], seconds["here"], strict=True))
    return seconds, [
        Row("pair read in the child / in this process", ratio(seconds["child"], seconds["here"])),
        Row("milliseconds that the child adds to a pair", 1000 * extra),
    ]


def soak(rows: list[Video], options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Deliver many pairs and compare the peak memory of the last quarter with that of the second."""
    delivery = Delivery(rows, options.processes, 1)
    steps = -(-options.soak // BATCH)
    delivered, samples, stop = [0], [], threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            samples.append((delivered[0], resident_bytes()))

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.perf_counter()
    try:
        with closing(delivery.batches(0, replace(delivery.order, steps=steps))) as batches:
            for batch in batches:
                delivered[0] += len(batch.video_ids)
    finally:
        stop.set()
        thread.join()
    quarters = [
        [size for count, size in samples if min(3, count // (steps * BATCH / 4)) == number] for number in range(4)
    ]
    found = {"pairs": delivered[0], "seconds": time.perf_counter() - begin, "samples": samples}
    if not (quarters[1] and quarters[3]):
        return found, [Row("peak memory, last quarter / second", None, 1.05, "lower")]
    return found, [
        Row("pairs of the soak", float(delivered[0])),
        Row("peak memory, GiB", max(max(quarter) for quarter in quarters if quarter) / 2**30),
        Row("peak memory, last quarter / second", max(quarters[3]) / max(quarters[1]), 1.05, "lower"),
    ]


PARTS = {
    "pairs": pairs,
    "resize": resize,
    "crops": crops,
    "child": child,
    "feeding": feeding,
    "throughput": throughput,
    "soak": soak,
}


def main() -> None:
    """Read the options, run and write out/bench/data.json."""
    parser = argparse.ArgumentParser(description="Benchmark of reading clip pairs.")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of every comparison")
    parser.add_argument("--videos", help="a folder of videos; default: rendered ones")
    parser.add_argument("--count", type=int, default=8, help="rendered videos")
    parser.add_argument("--pixels", type=int, default=512, help="height and width of rendered videos")
    parser.add_argument("--seconds", type=float, default=64.0, help="mean length of rendered videos")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="decode tasks, processes")
    parser.add_argument("--soak", type=int, default=1000, help="pairs of the soak; a full one takes 5000")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_ray(options.processes)
    rows = manifest_of(options.videos or rendered(options))
    raw: dict[str, Any] = {"options": vars(options), "videos": rows, "load": [os.getloadavg()[0]]}
    figures: list[Row] = []
    for name in options.only:
        raw[name], found = PARTS[name](rows, options)
        figures += found
        raw["load"].append(os.getloadavg()[0])
    print(f"\n{len(rows)} videos; load of the machine before and after each part: {raw['load']}")
    write("data", CPU, figures, raw)


if __name__ == "__main__":
    main()
