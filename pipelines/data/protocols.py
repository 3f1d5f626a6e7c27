"""The evaluation protocol of a stage (from its settings or the manifest's benchmark), and what its figures cover."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from pipelines.config import ProtocolSetting
from pipelines.data.manifest import description, split_of
from s5.config import ClipConfig, EvaluationProtocol
from s5.video.clip_times import clips_per_video as clips_per_video

LVU_WINDOW_S = 60.0
"""Length of LVU's windows."""


def protocol_of(manifest: pa.Table, *choices: ProtocolSetting) -> EvaluationProtocol:
    """Return the first choice that is not `auto`, else that of the manifest's benchmark, `uniform` for own videos."""
    for choice in choices:
        if choice != "auto":
            return choice
    return description(manifest).protocol or "uniform"


def checked_clips(clips: ClipConfig, protocol: EvaluationProtocol) -> ClipConfig:
    """Return the clips that a manifest's videos are to be checked against.

    No video is too short for a window, which is padded, or for a clip as long as the video.
    """
    return replace(clips, too_short="shrink") if protocol in ("windows", "whole") else clips


def clips_in_words(protocol: EvaluationProtocol, clips: ClipConfig, per_video: int) -> str:
    """Return a description of the clips for the user, with a note where windows differ from LVU's."""
    if protocol == "whole":
        return f"clips of {clips.frames} frames over the whole video, {per_video} of each"
    if protocol != "windows":
        return f"long clips of {clips.frames} frames, {per_video} spread evenly over each video"
    length = clips.frames * clips.long_stride
    every = f"windows of {length:g} {clips.unit} at every second of each video, the end of short ones black"
    if clips.unit == "seconds" and abs(length - LVU_WINDOW_S) < 1e-6:
        return every
    return f"{every} (LVU's are {LVU_WINDOW_S:g} s: clips.frames 60 at clips.long_stride 1)"


def listed_count(videos: pa.Table, split: str) -> int:
    """Return how many videos of a split the annotations list; if the manifest does not say, how many it has."""
    return max(description(videos).listed.get(split, 0), len(split_of(videos, split)))


def coverage(split: str, used: int, unreadable: int, rows: int, listed: int) -> str:
    """Return a sentence that says how many of the listed videos a figure covers, and why others are missing.

    Args:
        split: their split.
        used: videos that the figure covers.
        unreadable: videos that could not be read in this run.
        rows: videos of the split in the manifest.
        listed: videos that the annotations list.
    """
    if used == listed:
        return f"on all {listed} listed videos of split {split}"
    missing = {
        "rejected by index": listed - rows,
        "too short": rows - used - unreadable,
        "unreadable now": unreadable,
    }
    where = ", ".join(f"{count} {what}" for what, count in missing.items() if count)
    return f"on {used} of {listed} listed videos of split {split}, so not comparable with figures on all: {where}"
