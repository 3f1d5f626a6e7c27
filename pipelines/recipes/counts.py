"""What stages would read, counted from annotations or a manifest alone: videos, clips, steps and tokens.

A listed video counts whether or not it is still to be had, with the length that the annotations state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import FinetuneConfig, PretrainConfig, RecipeConfig
from pipelines.data.annotations.benchmarks import READERS, annotations_of, lengths_s
from pipelines.data.clip_order import ClipOrder, order_of, with_batch_size
from pipelines.data.features.cache import frame_times
from pipelines.data.indexing.holding_out import hold_out, shares
from pipelines.data.manifest import SPLITS, split_of
from pipelines.data.protocols import clips_per_video, protocol_of
from pipelines.errors import UserError
from s5.config import ClipConfig, EvaluationProtocol
from s5.video.clip_times import fits, lvu_windows, stride_s

ASSUMED_FPS = 25.0
"""Frames a second of a video, which annotations do not state; it matters where strides count frames."""


@dataclass(frozen=True)
class Listing:
    """What annotations or a manifest list."""

    seconds: dict[str, list[float]]
    """Lengths of the videos of each split, those that are held out in theirs."""
    labelled: bool
    """Whether the videos have labels, which a pretraining is probed with."""
    protocol: EvaluationProtocol
    """The benchmark's, which says what clips are evaluated."""
    assumed: int
    """Videos whose length the annotations do not state: the mean stands in for it."""

    @property
    def all_seconds(self) -> list[float]:
        """Lengths of all videos."""
        return [seconds for split in self.seconds.values() for seconds in split]


def listing_of(config: RecipeConfig) -> Listing:
    """Return what the annotations of a recipe list.

    Raises:
        UserError: they are wrong, or state no lengths.
    """
    path = annotations_of(config.benchmark, config.task, config.annotations)
    annotations = READERS[config.benchmark](path)
    stated = lengths_s(config.benchmark, annotations, path)
    videos = [video for video in annotations.videos if not video.reason]
    lengths = [stated.get(video.video_id) for video in videos]
    known = [seconds for seconds in lengths if seconds is not None]
    if not known:
        raise UserError(f"annotations is {path!r}: it states the length of no video, which a dry run counts with")
    held = hold_out(annotations.videos, shares(annotations, config.index), config.index.seed)
    seconds: dict[str, list[float]] = {}
    for video, length in zip(videos, lengths, strict=True):
        split = held.get(video.video_id) or video.split or "train"
        seconds.setdefault(split, []).append(fmean(known) if length is None else length)
    seconds = {split: seconds[split] for split in SPLITS if split in seconds}
    labelled = any(video.label is not None for video in videos)
    return Listing(seconds, labelled, annotations.protocol or "uniform", len(lengths) - len(known))


def listing_of_manifest(manifest: pa.Table) -> Listing:
    """Return what a manifest lists."""
    seconds = {
        split: pc.subtract(rows["end_s"], rows["start_s"]).to_pylist()
        for split in SPLITS
        if len(rows := split_of(manifest, split))
    }
    labelled = manifest["label"].null_count < len(manifest)
    return Listing(seconds, labelled, protocol_of(manifest), assumed=0)


def training_order(stage: str, config: PretrainConfig | FinetuneConfig, seconds: Sequence[float]) -> ClipOrder:
    """Return the order of a training run on videos of these lengths.

    Raises:
        UserError: they are fewer than a batch.
    """
    clips = config.clips
    dropped = clips.too_short == "drop"
    usable = sum(not dropped or fits(clips, each, ASSUMED_FPS) for each in seconds)
    loop = with_batch_size(config.loop, usable, config.scale.world_size)
    if usable < loop.batch_size:
        raise UserError(f"{stage}.loop.batch_size is {loop.batch_size}: split train lists {usable} videos; give fewer")
    return order_of(loop, usable)


def evaluations(order: ClipOrder, evaluate_every: int) -> int:
    """Return how often a run evaluates: every so many epochs, and at its end."""
    every = evaluate_every * order.steps_per_epoch
    return -(-order.total_steps // every) if every else 1


def evaluated_clips(
    protocol: EvaluationProtocol, clips: ClipConfig, seconds: Sequence[float], given: int = 0
) -> tuple[int, float]:
    """Return the clips that an evaluation reads of videos of these lengths, and the seconds of video in them."""
    count, whole_s = 0, 0.0
    for each in seconds:
        of_video = clips_per_video(protocol, given)
        if protocol == "windows":
            of_video = len(lvu_windows(each, clips.frames * stride_s(clips, clips.long_stride, ASSUMED_FPS)))
        count += of_video
        whole_s += of_video * span_s(protocol, clips, clips.long_stride, each)
    return count, whole_s


def span_s(protocol: EvaluationProtocol, clips: ClipConfig, stride: float, seconds: float) -> float:
    """Return the seconds between the ends of a clip of a video of that length, at most all of it."""
    return seconds if protocol == "whole" else min(seconds, clips.frames * stride_s(clips, stride, ASSUMED_FPS))


def mean_span_s(protocol: EvaluationProtocol, clips: ClipConfig, seconds: Sequence[float], *strides: float) -> float:
    """Return the seconds that clips at these strides, one each, take of a video in the mean; 0 without videos."""
    return fmean([sum(span_s(protocol, clips, stride, each) for stride in strides) for each in seconds] or [0.0])


def cached_frames(seconds: Sequence[float], frames_per_second: float) -> int:
    """Return the frames that stage `features` encodes of videos of these lengths."""
    return sum(len(frame_times(0.0, each, frames_per_second)) for each in seconds)
