"""Predict what a video of any length shows, from a checkpoint of `finetune`: its label, also over time.

The clips are those of the evaluation protocol, so that the result is what an evaluation gives, and windows over time.
What is in memory does not grow with the length of the video (`streaming`).

Shapes: W clips, T frames of a clip, F distinct frames, C classes or one value, R and Q rows and columns of a frame's
tokens, S height and width of a frame in pixels.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from s5.checkpoints.checkpoint import Meta, read_model
from s5.checkpoints.history import checkpoint_in
from s5.config import ClipConfig, EvaluationProtocol, from_json, require
from s5.errors import CheckpointError
from s5.evaluation.streaming import KeptCounts, Read, Seconds, stream_clips
from s5.models.blocks import Block
from s5.models.video_model import VideoModel
from s5.video.clip_times import beyond, clips_per_video, protocol_times, stride_s, windows_over_time
from s5.video.reader import FloatArray
from s5.video.reading import SquareReader, VideoFacts, probe


@dataclass(frozen=True)
class Stretch:
    """What is predicted of a stretch of a video."""

    start_s: float
    end_s: float
    classes: tuple[str, ...]
    """Names of the classes; none in regression."""
    values: tuple[float, ...]
    """Probability of each class, or the value in regression."""

    @property
    def label(self) -> str:
        """The most probable class; empty in regression."""
        return self.classes[int(np.argmax(self.values))] if self.classes else ""

    @property
    def probability(self) -> float:
        """Probability of the label; NaN in regression."""
        return max(self.values) if self.classes else math.nan

    @property
    def value(self) -> float:
        """The value in regression; NaN for classes."""
        return math.nan if self.classes else self.values[0]


@dataclass(frozen=True)
class KeptTokens:
    """Which tokens the first block of S5 keeps, frame by frame."""

    times_F: FloatArray
    """When each frame, or first frame of a tubelet, is on screen, ascending."""
    share_FRQ: npt.NDArray[np.float32]
    """Share of the clips that show the frame in which each of its tokens is kept, 0 to 1."""


@dataclass(frozen=True)
class VideoPrediction(Stretch):
    """What is predicted of a whole video: the mean over the protocol's clips."""

    clips: int
    """Clips that the mean is over."""
    over_time: tuple[Stretch, ...]
    """Predictions of windows that cover the video; none where it is too short for two, or in protocol `whole`."""
    kept: KeptTokens | None = field(compare=False, repr=False)
    """Tokens that are kept, where they were asked for: over time, else by the protocol's clips."""
    seconds: Seconds = field(compare=False)
    """What it took."""


class TrainedModel(NamedTuple):
    """The model of a checkpoint, in evaluation mode, and the checkpoint's meta data."""

    model: VideoModel
    meta: Meta

    def predict(
        self,
        video: str | Path | IO[bytes],
        *,
        protocol: EvaluationProtocol | Literal["auto"] = "auto",
        clips_per_video: int = 0,
        every_s: float = 0.0,
        batch_size: int = 16,
    ) -> VideoPrediction:
        """Return what a fine-tuned model says of a video of any length, on the model's device.

        Args:
            video: a local file, or an open one.
            protocol: clips whose predictions are averaged; `auto`: those of the checkpoint's training.
            clips_per_video: their number; 0 for 10 in protocol multi-clip and else 1. `windows` takes all.
            every_s: seconds between two predictions over time; 0 for one window after the other.
            batch_size: clips that the model sees at once.

        Raises:
            CheckpointError: the model predicts nothing of a video: it was only pretrained, or reads cached features.
            VideoError: the video cannot be read.
        """
        predictor = Predictor(self, protocol, clips_per_video, every_s, batch_size)
        source, seconds = str(video) if isinstance(video, Path) else video, Seconds()
        with seconds.of("total"), seconds.of("decode"):
            facts = probe(source)
        size = predictor.frame_size, (facts.width, facts.height)
        with closing(SquareReader(source, *size, facts.decoder)) as reader:
            return predictor.predict(facts, reader.read, seconds)


def load_model(folder: str | Path) -> TrainedModel:
    """Return the model of a checkpoint's folder, or of the --out of a finished `pretrain` or `finetune`.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    return TrainedModel(*read_model(checkpoint_in(Path(folder).expanduser())))


class Predictor:
    """Predicts videos whose frames come from anywhere; the other arguments are those of `TrainedModel.predict`.

    Args:
        trained: model and meta data.
        protocol: clips whose predictions are averaged.
        clips_per_video: their number.
        every_s: seconds between two predictions over time.
        batch_size: clips that the model sees at once.
        keeps: whether kept tokens are asked for.

    Raises:
        CheckpointError: the model predicts nothing of a video, or kept tokens are asked for and it keeps all.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        trained: TrainedModel,
        protocol: EvaluationProtocol | Literal["auto"] = "auto",
        clips_per_video: int = 0,
        every_s: float = 0.0,
        batch_size: int = 16,
        keeps: bool = False,
    ) -> None:
        require(clips_per_video >= 0, "clips_per_video", clips_per_video, "give 0 or more")
        require(0 <= every_s < math.inf, "every_s", every_s, "give 0 or more seconds")
        require(batch_size >= 1, "batch_size", batch_size, "give at least 1")
        self.model, self.meta = trained
        _check(trained, keeps)
        self.protocol = trained_protocol(self.meta) if protocol == "auto" else protocol
        # A short video has a clip too: the stride shrinks until it fits.
        self.clips = replace(from_json(ClipConfig, self.meta.settings["clips"]), too_short="shrink")
        self._clips_per_video, self._every_s = clips_per_video, every_s
        self._batch_size, self._keeps = batch_size, keeps

    @property
    def frame_size(self) -> int:
        """Height and width S of the frames that the model sees, in pixels."""
        return self.model.config.backbone.frame_size

    def predict(self, facts: VideoFacts, read: Read, seconds: Seconds | None = None) -> VideoPrediction:
        """Return what is predicted of a video.

        Args:
            facts: of the video.
            read: returns its frames, scaled and cropped to S x S.
            seconds: what the video has taken so far.

        Raises:
            VideoError: frames cannot be read.
        """
        seconds = seconds or Seconds()
        with seconds.of("total"):
            times = facts.duration_s, facts.fps
            count = clips_per_video(self.protocol, self._clips_per_video)
            mean_WT = protocol_times(self.protocol, self.clips, 0.0, *times, count)
            over_WT = windows_over_time(self.clips, *times, self._every_s)
            if self.protocol == "whole":
                # One clip spans the whole video: it was not trained on parts of one.
                over_WT = over_WT[:0]
            values_WC, kept = self._outputs(mean_WT, over_WT, facts, read, seconds)
            classes = tuple(self.meta.classes) if self.meta.kind == "class" else ()
            length_s = self.clips.frames * stride_s(self.clips, self.clips.long_stride, facts.fps)
            over_time = tuple(
                Stretch(float(start_s), float(start_s) + length_s, classes, tuple(values_C.tolist()))
                for start_s, values_C in zip(over_WT[:, 0], values_WC[len(mean_WT) :], strict=True)
            )
            mean_C = values_WC[: len(mean_WT)].mean(0)
        whole = 0.0, facts.duration_s, classes, tuple(mean_C.tolist())
        return VideoPrediction(*whole, len(mean_WT), over_time, kept, seconds)

    def _outputs(
        self, mean_WT: FloatArray, over_WT: FloatArray, facts: VideoFacts, read: Read, seconds: Seconds
    ) -> tuple[Tensor, KeptTokens | None]:
        """Return the outputs (W, C) of the protocol's clips and then of the windows over time, with what was kept."""
        clips_WT, place_W = np.unique(np.concatenate([mean_WT, over_WT]), axis=0, return_inverse=True)
        place_W = place_W.reshape(-1)
        dark_WT = beyond(clips_WT, facts.duration_s)
        shown = np.isin(np.arange(len(clips_WT)), place_W[len(mean_WT) :] if len(over_WT) else place_W)
        values_WC = torch.empty(len(clips_WT), self.model.head.out_features if self.model.head else 0)
        counts = KeptCounts(self.model) if self._keeps else None
        for rows, prediction in stream_clips(self.model, read, clips_WT, dark_WT, self._batch_size, seconds):
            logits_BC = prediction.logits_BC
            values_WC[torch.from_numpy(rows)] = logits_BC.softmax(-1) if self.meta.kind == "class" else logits_BC
            if counts:
                counts.add(clips_WT[rows], dark_WT[rows] | ~shown[rows, None], prediction)
        return values_WC[torch.from_numpy(place_W)], KeptTokens(*counts.shares()) if counts else None


def trained_protocol(meta: Meta) -> EvaluationProtocol:
    """Return the protocol that a checkpoint was trained and validated with; `uniform` where an earlier version wrote it
    and its settings leave it to the manifest."""
    stated = meta.settings.get("protocol", "auto")
    return meta.protocol or ("uniform" if stated == "auto" else stated)


def _check(trained: TrainedModel, keeps: bool) -> None:
    """Raise `CheckpointError` where a model cannot do what is asked for."""
    model, meta = trained
    if meta.pretrained:
        raise CheckpointError(
            f"the checkpoint is of a pretrained encoder (task {meta.kind}), which predicts no label: give one of "
            "`finetune` with task class or regression"
        )
    if model.config.backbone.tokens:
        raise CheckpointError(
            f"the checkpoint's model reads cached features of {model.config.backbone.name!r}, not frames: give one "
            "trained on videos"
        )
    first = next(model.decoder.children(), None)
    block = first[0] if isinstance(first, torch.nn.ModuleList) else None
    if keeps and not (isinstance(block, Block) and block.selection):
        raise CheckpointError(
            f"the checkpoint's model, {model.config.decoder.name}, keeps all tokens in its first block, so there are "
            "none to dim: give a checkpoint of s5 that selects there"
        )
