"""What the decode tasks of Ray Data run: probe or read the videos of a chunk.

A video that fails becomes a row with its reason, never an exception, even if its decoder hangs or crashes: a child
process reads it (`video_process`). This module imports neither torch nor mlflow, so that a task's process starts 2 s
earlier and needs half a GB less.

Shapes: R rows of the output, T frames of a clip, S height and width of a frame in pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines import storage
from pipelines.data.decoding import known_timeouts
from pipelines.data.decoding.video_process import STALLED_S, VideoProcess, VideoTimeoutError
from pipelines.data.decoding.video_requests import ClipRequest
from s5.config import ClipConfig, EvaluationProtocol, ViewsConfig
from s5.errors import VideoError
from s5.video.clip_times import beyond, long_short_times, protocol_times, training_times
from s5.video.crops import Box, random_box
from s5.video.reading import FrameArray

Frames = TypeVar("Frames")
Reading = tuple[dict[str, Any] | None, list[FrameArray], list[dict[str, str]]]
"""A candidate that can be read, its clips, and the failures before it; None where there is no such candidate."""

RETRY_TIMEOUT_SHARE = 0.1
"""Share of its time limits that a video gets after it timed out once, in whichever process of the job."""
NO_LABEL = -1
"""Label of a clip whose video has none."""
CANDIDATE = pa.struct(
    [
        ("video_id", pa.string()),
        ("uri", pa.string()),
        ("label", pa.int64()),
        ("target", pa.float64()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("fps", pa.float64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("decoder", pa.string()),
        ("seed", pa.int64()),
        ("first_clip", pa.int64()),
        ("end_clip", pa.int64()),
    ]
)
"""A video that a clip can be read from: its manifest columns, the seed of its clip, and in evaluation the range of
clips to read (null for all)."""
PROBED = pa.schema(
    [
        ("reason", pa.string()),
        ("duration_s", pa.float64()),
        ("fps", pa.float64()),
        ("num_frames", pa.int64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("codec", pa.string()),
        ("decoder", pa.string()),
    ]
)
"""What `probe_chunk` returns: the facts of a video, or the reason why there are none."""
# Started by the first video that a worker process reads, and reused by its later tasks.
_process = VideoProcess()
# Reads a spare beside a video on which the first one seems to hang.
_spare_process = VideoProcess()
# Why videos, by URI, timed out, as far as this process knows. Later epochs retry them: the storage may have been slow.
_timed_out: dict[str, str] = {}
# Columns of `decode_chunk` beside the frames.
LINE_TYPES: dict[str, Any] = {
    "video_id": np.str_,
    "seed": np.int64,
    "label": np.int64,
    "target": np.float32,
    "failures": np.str_,
}


@dataclass(frozen=True)
class ClipSpec:
    """Which clips are read of each video, and at what size."""

    clips: ClipConfig
    """Frames and strides."""
    frame_size: int
    """S in pixels."""
    pairs: bool = False
    """Read a short clip beside each long one."""
    timeout_s: float = 120.0
    """Time limit for one video, in seconds."""
    protocol: EvaluationProtocol = "uniform"
    """Which clips are read; pairs ignore it."""
    evaluated: int = 0
    """Number of clips of a video to evaluate (`protocol_times`); 0 for one random clip or pair, as in training."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Crops of clips in training."""

    @property
    def bytes_per_clip(self) -> int:
        """Bytes of the frames of one clip, or of a pair."""
        return 3 * self.frame_size**2 * self.clips.frames * (1 + self.pairs)

    def times(self, video: dict[str, Any]) -> list[npt.NDArray[np.float64]]:
        """Return the times (T,) of each clip of a candidate; raise `VideoError` where it is too short."""
        segment = video["start_s"], video["end_s"], video["fps"]
        try:
            if self.evaluated:
                times_WT = protocol_times(self.protocol, self.clips, *segment, self.evaluated)
                return list(times_WT[video["first_clip"] : video["end_clip"]])
            if self.pairs:
                return list(long_short_times(self.clips, *segment, video["seed"]))
            return [training_times(self.protocol, self.clips, *segment, video["seed"])]
        except ValueError as error:
            raise VideoError(str(error)) from None

    def boxes(self, video: dict[str, Any]) -> list[Box]:
        """Return the random crop of each clip of a candidate; none for the centre, as in evaluation."""
        scale, ratio, size = self.views.crop_scale, self.views.crop_ratio, (video["width"], video["height"])
        if self.evaluated or not scale:
            return []
        # Numbers of their own beside those that the times of the clips are drawn from.
        draws = [np.random.default_rng([clip, video["seed"]]) for clip in range(1, 2 + self.pairs)]
        return [random_box(size, scale, ratio, draw) for draw in draws]


def decode_chunk(rows: pa.Table, spec: ClipSpec) -> dict[str, npt.NDArray[Any]]:
    """Read the clips of a chunk of rows, each with a column `candidates`: a list of CANDIDATE in order of preference.

    Frames of a window beyond the end of its video are black: zeros, before the model normalises colours.

    Returns:
        Columns `video_id` (empty where no candidate can be read; its frames are black), `seed`, `label`, `target`,
        `failures` (JSON list of video_id, uri, reason) and uint8 `long` and, in pairs, `short`, (R, T, S, S, 3).
    """
    for uri, reason in known_timeouts.known().items():
        _timed_out.setdefault(uri, reason)
    lines: list[dict[str, Any]] = []
    frames: list[FrameArray] = []
    views = 1 + spec.pairs
    blank = np.zeros((spec.clips.frames, spec.frame_size, spec.frame_size, 3), dtype=np.uint8)
    for candidates in rows["candidates"].to_pylist():
        video, clips, failures = _first_readable(candidates, spec)
        clips = clips or [blank] * views
        frames += clips
        for first in range(0, len(clips), views):
            lines.append(_line(video, failures if first == 0 else []))
    columns = {name: np.array([line[name] for line in lines], dtype) for name, dtype in LINE_TYPES.items()}
    columns["long"] = np.stack(frames[::views])
    if spec.pairs:
        columns["short"] = np.stack(frames[1::views])
    return columns


def probe_chunk(videos: pa.Table, timeout_s: float) -> pa.Table:
    """Return the facts (PROBED) of a chunk of videos with the column `uri`."""
    return pa.Table.from_pylist([_probe(uri, timeout_s) for uri in videos["uri"].to_pylist()], PROBED)


def _probe(uri: str, timeout_s: float) -> dict[str, Any]:
    try:
        return asdict(_process.probe(storage.absolute(uri), timeout_s))
    except VideoError as error:
        return {"reason": storage.redacted(str(error))}


def _line(video: dict[str, Any] | None, failures: list[dict[str, str]]) -> dict[str, Any]:
    line = {"video_id": "", "seed": 0, "label": NO_LABEL, "target": math.nan, "failures": json.dumps(failures)}
    known = {} if video is None else {name: video[name] for name in line if video.get(name) is not None}
    return line | known


def _first_readable(candidates: list[dict[str, Any]], spec: ClipSpec, beside: bool = False) -> Reading:
    """Return the first candidate that can be read, its clips, and the failures before it.

    While one makes no progress, those after it are read in another process, `beside` it.
    """
    if not candidates:
        return None, [], []
    video, *spares = candidates
    found: list[Reading] = []

    def spare_is_read() -> bool:
        if not found:
            found.append(_first_readable(spares, spec, beside=True))
            _spare_process.close()
        return found[0][0] is not None

    process, instead = (_spare_process, None) if beside else (_process, spare_is_read if spares else None)
    try:
        return video, retried_once(partial(_read, video, spec, process, instead)), []
    except VideoTimeoutError as error:
        reason = _timed_out.setdefault(video["uri"], str(error))
    except VideoError as error:
        reason = str(error)
    failure = {"video_id": video["video_id"], "uri": video["uri"], "reason": reason}
    spare, clips, failures = found[0] if found else _first_readable(spares, spec, beside)
    return spare, clips, [{name: storage.redacted(text) for name, text in failure.items()}, *failures]


def retried_once(read: Callable[[], Frames]) -> Frames:
    """Return what `read` returns, retrying once if the video fails, but not if it times out."""
    try:
        return read()
    except VideoTimeoutError:
        raise
    except VideoError:
        return read()


def _read(
    video: dict[str, Any], spec: ClipSpec, process: VideoProcess, instead: Callable[[], bool] | None
) -> list[FrameArray]:
    times = spec.times(video)
    size = video["width"], video["height"]
    clips = ClipRequest(times, spec.frame_size, size, video["decoder"], spec.boxes(video))
    share = RETRY_TIMEOUT_SHARE if video["uri"] in _timed_out else 1.0
    uri = storage.absolute(video["uri"])
    frames = process.read(uri, clips, spec.timeout_s * share, instead, STALLED_S * share)
    if _timed_out.pop(video["uri"], None):
        known_timeouts.forget(video["uri"])
    if spec.protocol == "windows":
        for clip, times_T in zip(frames, times, strict=True):
            clip[beyond(times_T, video["end_s"])] = 0
    return frames
