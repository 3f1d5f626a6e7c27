"""Videos of the reading benchmarks, rendered or given, and how they are read: by this project, and by plain decord."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.config import SampleConfig, TrackingConfig
from pipelines.data.indexing.video_files import EXTENSIONS
from pipelines.stages import sample
from s5.config import ClipConfig
from s5.errors import VideoError
from s5.video.clip_times import long_short_times
from s5.video.crops import Box
from s5.video.reading import probe, read_clips, scaled
from tests.bench.record import alternate

SIZE = 224
"""Height and width of a frame in pixels."""
CLIPS = ClipConfig(too_short="shrink")
"""The clips of preset `base`: 16 frames, 2 s and 0.5 s apart."""
PAPER = ClipConfig(frames=60, long_stride=1.0, short_stride=0.25, too_short="shrink")
"""The paper's long clip of LVU: a frame a second for a minute."""
Video = dict[str, Any]
"""A row of a manifest."""


def rendered(options: argparse.Namespace) -> str:
    """Return a folder of rendered videos of a realistic size; they are rendered once."""
    out = f"out/bench/videos-{options.count}-{options.pixels}-{options.seconds:g}s"
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
    """Return manifest rows of the readable videos of a folder."""
    rows = []
    for path in sorted(Path(folder).rglob("*.*")):
        if path.suffix[1:].lower() not in EXTENSIONS:
            continue
        try:
            facts = probe(str(path))
        except VideoError as error:
            print(f"skipped: {path.name}: {error}")
            continue
        names = ("duration_s", "fps", "num_frames", "width", "height", "codec", "decoder")
        row = {"video_id": path.stem, "uri": str(path.resolve()), "split": "train"}
        rows.append(row | {"start_s": 0.0, "end_s": facts.duration_s} | {name: getattr(facts, name) for name in names})
    return rows


def times_of(row: Video, clips: ClipConfig, seed: int) -> list[np.ndarray]:
    """Return the times of a long and a short clip."""
    return list(long_short_times(clips, row["start_s"], row["end_s"], row["fps"], seed))


def read(row: Video, times: list[np.ndarray], size: int = SIZE, boxes: Sequence[Box] = ()) -> None:
    """Read clips of a video in this process, as a decode task's child does."""
    read_clips(row["uri"], times, size, (row["width"], row["height"]), row["decoder"], boxes)


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


def over_videos(
    rows: list[Video], rounds: int, cases: Callable[[Video, int], dict[str, Callable[[], object]]]
) -> dict[str, list[float]]:
    """Alternate the cases on each video and return the seconds of every round and video."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for number in range(rounds):
            seconds = alternate(cases(row, number), 1, torch.device("cpu"), warm=int(number == 0))
            for name, values in seconds.items():
                found.setdefault(name, []).extend(values)
    return found
