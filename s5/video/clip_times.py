"""When the frames of a clip are: pure functions of a seed.

Rules: a clip of T frames spans (T - 1) strides; it fits a video that is at least one frame longer than that, so that
its last frame exists. A video that is too short raises `ValueError`, unless `too_short` is `shrink`: there the stride
becomes the longest that fits. The starts of long and short clips are drawn independently, uniformly over all starts
that fit (LSTCL, arXiv 2106.09212). Times are seconds after the video's first frame.

A protocol says which clips of a video are trained on (`training_times`) and which are evaluated (`protocol_times`):
`uniform` and `multi-clip` use long clips, `windows` all windows (LVU), `whole` clips as long as the video. In the last
two, no video is too short.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from s5.config import ClipConfig, EvaluationProtocol

FloatArray = npt.NDArray[np.float64]

TOLERANCE_S = 1e-3
"""Lengths are computed from rounded frame counts and rates."""
CLIPS_PER_VIDEO = {"multi-clip": 10}
"""Default number of clips per video; 1 in the other protocols. Protocol `windows` reads all windows."""


def clips_per_video(protocol: EvaluationProtocol, given: int = 0) -> int:
    """Return how many clips of a video are evaluated: `given`, or for 0 the default of the protocol."""
    return given or CLIPS_PER_VIDEO.get(protocol, 1)


def clip_seed(seed: int, epoch: int, video_id: str) -> int:
    """Return the seed for a video in an epoch, 0 <= seed < 2**63, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{video_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stride_s(config: ClipConfig, stride: float, fps: float) -> float:
    """Return a stride in seconds; in the unit `frames` it counts frames of the video's own rate."""
    return stride / fps if config.unit == "frames" else stride


def longest_stride_s(config: ClipConfig, duration_s: float, fps: float) -> float:
    """Return the longest stride in seconds that fits a segment; infinite for clips of one frame."""
    return max(0.0, duration_s - 1 / fps) / (config.frames - 1) if config.frames > 1 else float("inf")


def fits(config: ClipConfig, duration_s: float, fps: float) -> bool:
    """Return whether a long clip fits into a segment of a video."""
    span = (config.frames - 1) * stride_s(config, config.long_stride, fps)
    return span <= duration_s - 1 / fps + TOLERANCE_S if config.frames > 1 else True


def long_short_times(
    config: ClipConfig, start_s: float, end_s: float, fps: float, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Return the times (T,) of a long and of a short clip between `start_s` and `end_s`, ascending.

    The long clip is drawn first, so it does not depend on whether the short one is used.

    Raises:
        ValueError: the segment is too short.
    """
    rng = np.random.default_rng(seed)
    long_T = _clip(config, config.long_stride, start_s, end_s, fps, rng.random())
    short_T = _clip(config, config.short_stride, start_s, end_s, fps, rng.random())
    return long_T, short_T


def evaluation_times(config: ClipConfig, start_s: float, end_s: float, fps: float, clips: int) -> FloatArray:
    """Return the times (clips, T) of long clips spread evenly from the first start that fits to the last.

    One clip is centred.

    Raises:
        ValueError: the segment is too short.
    """
    positions = np.linspace(0.0, 1.0, clips) if clips > 1 else np.array([0.5])
    return np.stack([_clip(config, config.long_stride, start_s, end_s, fps, position) for position in positions])


def lvu_windows(duration_s: float, window_s: float = 60.0, step_s: float = 1.0) -> FloatArray:
    """Return the starts (W,), in seconds, of the windows that LVU is evaluated on: one every `step_s` while it fits.

    A fraction of a second at the end is ignored. A video shorter than a window has one, from 0, which extends beyond
    its end: frames there are to be zero-padded.

    Raises:
        ValueError: a length is not positive.
    """
    if not all(length > 0 for length in (duration_s, window_s, step_s)):
        raise ValueError(f"duration_s {duration_s}, window_s {window_s} and step_s {step_s} must be more than 0")
    latest = math.floor(duration_s + TOLERANCE_S) - window_s
    return step_s * np.arange(max(0, math.floor(latest / step_s + TOLERANCE_S)) + 1, dtype=np.float64)


def windows(config: ClipConfig, start_s: float, end_s: float, fps: float) -> FloatArray:
    """Return the times (W, T) of all windows of a segment, one starting every second; a window is T long strides.

    LVU's windows, 60 s at 1 frame a second, are 60 frames at a stride of 1 s. In a segment that is shorter than a
    window, times at or after its end are to be padded (`beyond`).
    """
    stride = stride_s(config, config.long_stride, fps)
    starts_W = start_s + lvu_windows(end_s - start_s, config.frames * stride)
    return starts_W[:, None] + stride * np.arange(config.frames, dtype=np.float64)


def windows_over_time(config: ClipConfig, duration_s: float, fps: float, every_s: float = 0.0) -> FloatArray:
    """Return the times (W, T) of windows that cover a video, one every `every_s`, or for 0 one after the other.

    The last one ends with the video, and may overlap the one before. None (W = 0) of a video that is too short for two.
    """
    stride = stride_s(config, config.long_stride, fps)
    window_s = config.frames * stride
    step_s, latest_s = every_s or window_s, duration_s - window_s
    starts_W = step_s * np.arange(max(0, math.floor(latest_s / step_s + TOLERANCE_S)) + 1, dtype=np.float64)
    if latest_s > starts_W[-1] + TOLERANCE_S:
        starts_W = np.append(starts_W, latest_s)
    if len(starts_W) == 1:
        starts_W = starts_W[:0]
    return starts_W[:, None] + stride * np.arange(config.frames, dtype=np.float64)


def beyond(times_T: FloatArray, end_s: float) -> npt.NDArray[np.bool_]:
    """Return which times of a window lie beyond the end of its segment; their frames are black (zeros)."""
    return times_T > end_s - TOLERANCE_S


def whole(config: ClipConfig, start_s: float, end_s: float, position: float) -> FloatArray:
    """Return the times (T,) of a clip over a whole segment: one in each of T equal parts, at `position` in [0, 1).

    Parts as in TSN (arXiv 1608.00859), but with one position for all of them, so that the frames are equally spaced.
    """
    part_s = (end_s - start_s) / config.frames
    return start_s + part_s * (np.arange(config.frames, dtype=np.float64) + position)


def training_times(
    protocol: EvaluationProtocol, config: ClipConfig, start_s: float, end_s: float, fps: float, seed: int
) -> FloatArray:
    """Return the times (T,) of a random clip to train on: a window, a clip over the whole segment, or a long clip.

    Raises:
        ValueError: the segment is too short for a long clip.
    """
    if protocol not in ("windows", "whole"):
        return long_short_times(config, start_s, end_s, fps, seed)[0]
    position = np.random.default_rng(seed).random()
    if protocol == "whole":
        return whole(config, start_s, end_s, position)
    windows_WT = windows(config, start_s, end_s, fps)
    window_T: FloatArray = windows_WT[int(position * len(windows_WT))]
    return window_T


def protocol_times(
    protocol: EvaluationProtocol, config: ClipConfig, start_s: float, end_s: float, fps: float, clips: int
) -> FloatArray:
    """Return the times (W, T) of the clips whose predictions a protocol averages for a video.

    `windows` returns all windows and ignores `clips`. `whole` returns `clips` clips at positions spread evenly over the
    parts (the middle, for one); the other protocols those of `evaluation_times`.

    Raises:
        ValueError: the segment is too short for a long clip.
    """
    if protocol == "windows":
        return windows(config, start_s, end_s, fps)
    if protocol == "whole":
        return np.stack([whole(config, start_s, end_s, (clip + 0.5) / clips) for clip in range(clips)])
    return evaluation_times(config, start_s, end_s, fps, clips)


def _clip(config: ClipConfig, stride: float, start_s: float, end_s: float, fps: float, position: float) -> FloatArray:
    """Return the times of a clip; `position` from 0 (earliest start) to 1 (latest)."""
    duration_s = end_s - start_s
    stride = stride_s(config, stride, fps)
    if config.too_short == "shrink" or fits(config, duration_s, fps):
        stride = min(stride, longest_stride_s(config, duration_s, fps))
    else:
        raise ValueError(
            f"clips.long_stride is {config.long_stride:g} {config.unit}: {config.frames} frames do not fit a video of "
            f"{duration_s:.2f} s at {fps:g} fps; lower clips.long_stride or clips.frames, or set clips.too_short"
        )
    latest = max(0.0, duration_s - 1 / fps - (config.frames - 1) * stride)
    return start_s + position * latest + stride * np.arange(config.frames, dtype=np.float64)
