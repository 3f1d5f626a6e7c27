"""Benchmark of reading: clip pairs through Ray Data, of decord alone, of the child process, and memory over many pairs.

    make bench-data [ARGS="--videos FOLDER --soak 5000 --only throughput pairs"]

Without `--videos`, stage `sample` renders some (H.264, key frames 8 s apart) into out/bench/videos. Every comparison
alternates its cases and takes medians over rounds of ratios: other work on the machine moves both sides.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines import sample
from pipelines.clips import train_batches
from pipelines.cluster import ensure_ray
from pipelines.config import DataConfig, SampleConfig, TrackingConfig
from pipelines.index import EXTENSIONS
from pipelines.manifest import SCHEMA
from pipelines.plan import ClipPlan
from pipelines.video_process import Clips, VideoProcess
from s5.clips import clip_seed, long_short_times
from s5.config import ClipConfig
from s5.video import VideoError, probe, read_clips, scaled
from tests.bench.processes import cpu_seconds, cpu_seconds_since, resident_bytes
from tests.bench.record import Row, alternate, ratio, write

CPU = torch.device("cpu")
SIZE = 224
CLIPS = ClipConfig(too_short="shrink")
"""The clips of preset `base`: 16 frames, 2 s and 0.5 s apart."""
PAPER = ClipConfig(frames=60, long_stride=1.0, short_stride=0.25, too_short="shrink")
"""The paper's long clip of LVU: a frame a second for a minute."""
BATCH, WARM_STEPS, STEPS = 4, 8, 24
TIMEOUT_S = 120.0
# For the plan on paper: ViT-L/16 at 224 pixels (timm: 61.6 billion multiplications a frame), bf16.
FRAME_FLOPS, H100_FLOPS, UTILISATION, MASK_RATIO = 2 * 61.6e9, 989e12, 0.4, 0.5
Video = dict[str, Any]
"""A row of a manifest."""


# --- videos ---------------------------------------------------------------------------------------------------------


def rendered(options: argparse.Namespace) -> str:
    """Return a folder of rendered videos of a realistic size; they are made once."""
    out = f"out/bench/videos-{options.pixels}-{options.seconds:g}s"
    config = SampleConfig(
        out=out,
        videos=options.count,
        fps=25,
        size=options.pixels,
        seconds=options.seconds,
        tracking=TrackingConfig(uri="off"),
    )
    sample.run(config)
    return out


def manifest_of(folder: str) -> list[Video]:
    """Return the rows of the videos of a folder that can be read."""
    rows = []
    for path in sorted(Path(folder).rglob("*.*")):
        if path.suffix[1:].lower() not in EXTENSIONS:
            continue
        try:
            facts = probe(str(path))
        except VideoError as error:
            print(f"left out: {path.name}: {error}")
            continue
        names = ("duration_s", "fps", "num_frames", "width", "height", "codec", "decoder")
        row = {"video_id": path.stem, "uri": str(path.resolve()), "split": "train"}
        rows.append(row | {"start_s": 0.0, "end_s": facts.duration_s} | {name: getattr(facts, name) for name in names})
    return rows


def times_of(row: Video, clips: ClipConfig, seed: int) -> list[np.ndarray]:
    """Return the times of a long and a short clip."""
    return list(long_short_times(clips, row["start_s"], row["end_s"], row["fps"], seed))


def read(row: Video, times: list[np.ndarray], size: int = SIZE) -> None:
    """Read clips of a video in this process, as a decode task's child does."""
    read_clips(row["uri"], times, size, (row["width"], row["height"]), row["decoder"])


def plain(row: Video, times: list[np.ndarray], size: int | None = SIZE) -> np.ndarray:
    """Read clips by decord alone: frame numbers by the mean rate, one open; without a size, as large as stored."""
    import decord

    where = dict(zip(("width", "height"), scaled((row["width"], row["height"]), size), strict=True)) if size else {}
    reader = decord.VideoReader(row["uri"], num_threads=1, **where)
    indices = [np.clip((clip * row["fps"]).astype(int), 0, len(reader) - 1) for clip in times]
    union = np.unique(np.concatenate(indices))
    frames = reader.get_batch(union).asnumpy()
    if size:
        top, left = (frames.shape[1] - size) // 2, (frames.shape[2] - size) // 2
        frames = frames[:, top : top + size, left : left + size]
    return np.concatenate([frames[np.searchsorted(union, clip)] for clip in indices])


def _plain_task(task: tuple[Video, list[np.ndarray]]) -> int:
    return len(plain(*task))


# --- what is measured -----------------------------------------------------------------------------------------------


class Delivery:
    """Pairs of a plan, once through Ray Data and once by decord in as many processes."""

    def __init__(self, rows: list[Video], processes: int, rounds: int) -> None:
        ensure_ray()
        self.rows, self.processes = rows, processes
        copies = -(-2 * BATCH // len(rows))
        # A plan takes no video twice in a batch: few files count several times, under other names.
        self.table = pa.Table.from_pylist(
            [row | {"video_id": f"{row['video_id']}-{copy}"} for copy in range(copies) for row in rows], SCHEMA
        )
        self.plan = ClipPlan(len(self.table), BATCH, 0, seed=0, steps=rounds * (WARM_STEPS + STEPS))

    def batches(self, start: int, plan: ClipPlan | None = None) -> Any:
        """Yield batches from a step on, as a training worker gets them."""
        return train_batches(
            manifest=self.table,
            plan=plan or self.plan,
            clips=CLIPS,
            frame_size=SIZE,
            seed=0,
            pairs=True,
            data=DataConfig(),
            decode_tasks=self.processes,
            start_step=start,
        )

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
        planned = self.plan.rows(start + WARM_STEPS, start + WARM_STEPS + STEPS)
        rows = self.table.to_pylist()
        tasks = []
        for video, epoch in zip(planned.video, planned.epoch, strict=True):
            row = rows[int(video)]
            tasks.append((row, times_of(row, CLIPS, clip_seed(0, int(epoch), row["video_id"]))))
        begin, used = time.perf_counter(), cpu_seconds()
        for _ in pool.imap_unordered(_plain_task, tasks):
            pass
        return len(tasks) / (time.perf_counter() - begin), len(tasks) / cpu_seconds_since(used)


def throughput(rows: list[Video], options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Compare the pairs that Ray Data delivers with those that decord alone reads."""
    delivery = Delivery(_by_decord(rows), options.processes, options.rounds)
    found: dict[str, list[tuple[float, float]]] = {"ray": [], "decord": []}
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
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


def over_videos(
    rows: list[Video], rounds: int, cases: Callable[[Video, int], dict[str, Callable[[], object]]]
) -> dict[str, list[float]]:
    """Alternate the cases on each video and return the seconds of every round and video."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for number in range(rounds):
            seconds = alternate(cases(row, number), 1, CPU, warm=int(number == 0))
            for name, values in seconds.items():
                found.setdefault(name, []).extend(values)
    return found


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


def child(rows: list[Video], options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Compare reading in a child process with reading in this one."""
    process = VideoProcess()

    def cases(row: Video, number: int) -> dict[str, Callable[[], object]]:
        times = times_of(row, CLIPS, number)
        asked = Clips(times, SIZE, (row["width"], row["height"]), row["decoder"])
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


def plan(rows: list[Video], options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Measure a pair of the paper's size and print how many cores feed one H100."""

    def cases(row: Video, number: int) -> dict[str, Callable[[], object]]:
        return {"pair": partial(read, row, times_of(row, PAPER, number))}

    seconds = median(over_videos(rows, options.rounds, cases)["pair"])
    # Two clips, each through the online encoder (forward 1, backward 2) and the momentum encoder (forward 1).
    flops = 2 * PAPER.frames * FRAME_FLOPS * 4 * (1 - MASK_RATIO)
    fed = UTILISATION * H100_FLOPS / flops
    print(
        f"\nplan on paper: LSMCL on one H100, ViT-L/16 at {SIZE} pixels, pairs of {PAPER.frames} frames\n"
        f"  a pair      2 clips x {PAPER.frames} frames x {FRAME_FLOPS / 1e9:.0f} GFLOP x (3 online + 1 momentum) "
        f"x {1 - MASK_RATIO:g} unmasked = {flops / 1e12:.1f} TFLOP\n"
        f"  one H100    {UTILISATION:g} x {H100_FLOPS / 1e12:.0f} TFLOP/s / {flops / 1e12:.1f} TFLOP "
        f"= {fed:.1f} pairs/s (assumed, not measured)\n"
        f"  one core    {seconds:.3f} s a pair, measured = {1 / seconds:.1f} pairs/s\n"
        f"  cores       {fed:.1f} x {seconds:.3f} = {fed * seconds:.1f}"
    )
    return {"pair_seconds": seconds, "pair_flops": flops, "pairs_per_second": fed}, [
        Row("seconds of a pair of 60 frames, one core", seconds),
        Row("decode cores for one H100, ViT-L/16 (on paper)", fed * seconds),
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
        with closing(delivery.batches(0, replace(delivery.plan, steps=steps))) as batches:
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


PARTS = {"pairs": pairs, "resize": resize, "child": child, "plan": plan, "throughput": throughput, "soak": soak}


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
