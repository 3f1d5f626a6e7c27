"""What the tasks of stage `transcode` run: re-encode the videos of a chunk, and measure the speed-up of reading.

As in `decode_tasks`, a video that fails becomes a row with its reason, and neither torch nor mlflow is imported.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from statistics import median
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.data.decoding.video_process import VideoProcess
from pipelines.data.decoding.video_requests import ClipRequest, EncodeRequest
from s5.config import ClipConfig
from s5.errors import VideoError
from s5.video.clip_times import long_short_times
from s5.video.reading import VideoFacts

ENCODED = pa.schema(
    [
        ("reason", pa.string()),
        ("unwritable", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("codec", pa.string()),
        ("decoder", pa.string()),
        ("bytes_before", pa.int64()),
        ("bytes_after", pa.int64()),
        ("kept", pa.bool_()),
    ]
)
"""What `encode_chunk` returns: facts of the new video, or why the old one cannot be read (`reason`) or the new one
cannot be written (`unwritable`); `kept` where an earlier run had finished it."""
# Started by the first video that a worker process encodes, and reused by its later tasks.
_process = VideoProcess()


def encode_chunk(videos: pa.Table, short_side: int, quality: int, speed: str, timeout_s: float) -> pa.Table:
    """Re-encode a chunk of videos (columns `uri`, `path`, `gop_s`, `fps`, `num_frames`) unless `path` exists.

    Returns:
        A row of ENCODED per video.
    """

    def encoded(video: dict[str, Any]) -> dict[str, Any]:
        try:
            facts = _earlier(video["path"], timeout_s)
            kept = facts is not None
            if facts is None:
                with storage.atomic_write(video["path"]) as part:
                    numbers = video["gop_s"], quality, speed, video["fps"], video["num_frames"]
                    encoding = EncodeRequest(part, short_side, *numbers)
                    facts = _process.encode(storage.absolute(video["uri"]), encoding, timeout_s)
            sizes = {"bytes_before": storage.size(video["uri"]), "bytes_after": storage.size(video["path"])}
            return asdict(facts) | sizes | {"kept": kept}
        except VideoError as error:
            return {"reason": storage.redacted(str(error))}
        except OSError as error:
            return {"unwritable": storage.redacted(str(error))}

    rows = [encoded(video) for video in videos.to_pylist()]
    return pa.Table.from_pylist([{name: row.get(name) for name in ENCODED.names} for row in rows], ENCODED)


def _earlier(path: str, timeout_s: float) -> VideoFacts | None:
    """Return the facts of the file if an earlier run has finished it."""
    if not storage.exists(path):
        return None
    try:
        return _process.probe(storage.absolute(path), timeout_s)
    except VideoError:
        return None


def pair_seconds(
    videos: list[tuple[dict[str, Any], dict[str, Any]]],
    clips: ClipConfig,
    frame_size: int,
    timeout_s: float,
    pairs: int,
) -> list[tuple[float, float]]:
    """Time the reading of clip pairs of the same videos from two files each, alternating.

    Args:
        videos: rows of two manifests that differ in the file.
        clips: frames and strides.
        frame_size: height and width of a frame in pixels.
        timeout_s: time limit for one pair, in seconds.
        pairs: clip pairs of each video, after one for warm-up.

    Returns:
        The median seconds of a pair of each video that can be read, from either file.
    """

    def seconds(row: dict[str, Any], seed: int) -> float:
        times = list(long_short_times(clips, row["start_s"], row["end_s"], row["fps"], seed))
        start = time.perf_counter()
        asked = ClipRequest(times, frame_size, (row["width"], row["height"]), row["decoder"])
        _process.read(storage.absolute(row["uri"]), asked, timeout_s)
        return time.perf_counter() - start

    found = []
    for before, after in videos:
        try:
            times = [(seconds(before, seed), seconds(after, seed)) for seed in range(pairs + 1)][1:]
        except VideoError:
            continue
        found.append((median(first for first, _ in times), median(second for _, second in times)))
    return found
