"""Run a model over many clips of one video in one ascending pass over its frames.

Each frame is read once and, where tokens are of single frames, encoded once, however many clips show it: the windows of
LVU's protocol share all but one of theirs. Only what clips that are not finished need stays in memory.

Shapes: W clips, T frames of a clip, F distinct frames, U time steps, N tokens of a step, D width, R and Q rows and
columns of the tokens of a step, S height and width of a frame in pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from s5.models.video_model import Prediction, VideoModel
from s5.video.reader import FloatArray, FrameArray, IntArray

FRAMES_AT_ONCE = 64
"""Frames that are read and encoded together."""

Read = Callable[[FloatArray], list[FrameArray]]
"""Returns the frames (S, S, 3) at ascending times, which ascend from call to call too."""


@dataclass
class Seconds:
    """Seconds that a video has taken."""

    decode: float = 0.0
    """Opening the file and reading frames."""
    model: float = 0.0
    total: float = 0.0

    @property
    def rest(self) -> float:
        """All but decoding and the model."""
        return self.total - self.decode - self.model

    @contextmanager
    def of(self, part: Literal["decode", "model", "total"]) -> Iterator[None]:
        """Add the time that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - started)


@torch.no_grad()
def stream_clips(
    model: VideoModel,
    read: Read,
    times_WT: FloatArray,
    dark_WT: npt.NDArray[np.bool_],
    batch_size: int,
    seconds: Seconds,
) -> Iterator[tuple[IntArray, Prediction]]:
    """Yield batches of clips, by their rows, with what the model says of them; those whose frames end first come first.

    Args:
        model: in evaluation mode, with a head.
        read: reads the frames.
        times_WT: when the frames of each clip are on screen, ascending in each clip.
        dark_WT: frames that are black in place of read; never all of a clip.
        batch_size: clips that the model sees at once.
        seconds: to which decoding and the model are added.

    Raises:
        VideoError: frames cannot be read.
    """
    frames = _Frames(model)
    ends_W = np.where(dark_WT, -np.inf, times_WT).max(1)
    waiting: IntArray = np.argsort(ends_W, kind="stable")
    times_F = np.unique(times_WT[~dark_WT])
    for first in range(0, len(times_F), FRAMES_AT_ONCE):
        here_F = times_F[first : first + FRAMES_AT_ONCE]
        with seconds.of("decode"):
            pictures = read(here_F)
        with seconds.of("model"):
            frames.add(here_F, pictures)
        ready = int(np.searchsorted(ends_W[waiting], here_F[-1], side="right"))
        for start in range(0, ready, batch_size):
            rows = waiting[start : min(start + batch_size, ready)]
            with seconds.of("model"):
                clips = torch.stack([frames.clip(*each) for each in zip(times_WT[rows], dark_WT[rows], strict=True)])
                prediction = model(clips)
                # Waits for a GPU, whose work counts here.
                prediction = prediction._replace(logits_BC=prediction.logits_BC.float().cpu())
            yield rows, prediction
        waiting = waiting[ready:]
        frames.forget(float(times_WT[waiting].min()) if len(waiting) else math.inf)


class _Frames:
    """Frames that clips still need: tokens (N, D), or pixels (S, S, 3) where a token spans several frames."""

    def __init__(self, model: VideoModel) -> None:
        self._model = model
        self._encodes = model.backbone.config.tubelet == 1
        self._held: dict[float, Tensor] = {}

    @cached_property
    def _black(self) -> Tensor:
        size = self._model.config.backbone.frame_size
        return self._made([np.zeros((size, size, 3), np.uint8)])[0]

    def add(self, times_F: FloatArray, pictures: list[FrameArray]) -> None:
        self._held |= zip(times_F.tolist(), self._made(pictures), strict=True)

    def clip(self, times_T: FloatArray, dark_T: npt.NDArray[np.bool_]) -> Tensor:
        """Return what the model takes for a clip: tokens (T, N, D) or frames (T, S, S, 3)."""
        frames = zip(times_T.tolist(), dark_T.tolist(), strict=True)
        return torch.stack([self._black if dark else self._held[time_s] for time_s, dark in frames])

    def forget(self, before_s: float) -> None:
        self._held = {time_s: frame for time_s, frame in self._held.items() if time_s >= before_s}

    def _made(self, pictures: list[FrameArray]) -> Tensor:
        frames_FSSC = torch.from_numpy(np.stack(pictures)).to(self._model.backbone.mean.device)
        if not self._encodes:
            return frames_FSSC
        return cast(Tensor, rearrange(self._model.backbone(frames_FSSC[None]), "1 (f n) d -> f n d", f=len(pictures)))


class KeptCounts:
    """How often each token of a frame is kept, over all clips that show the frame."""

    def __init__(self, model: VideoModel) -> None:
        self._backbone = model.backbone
        self._counts: dict[float, tuple[Any, int]] = {}

    def add(self, times_BT: FloatArray, dark_BT: npt.NDArray[np.bool_], prediction: Prediction) -> None:
        """Count what was kept of a batch of clips; black frames do not count."""
        tubelet, patches = self._backbone.config.tubelet, self._backbone.patches
        times_BU, dark_BU = times_BT[:, ::tubelet], dark_BT[:, ::tubelet]
        indices_BK = prediction.kept[0].cpu().numpy()
        kept_BL = np.zeros((len(times_BU), times_BU.shape[1] * self._backbone.tokens), np.float32)
        np.put_along_axis(kept_BL, indices_BK, 1.0, axis=1)
        # A class token, where there is one, comes before the patches of its step.
        kept_BUN = kept_BL.reshape(*times_BU.shape, -1)[..., -patches:]
        side = math.isqrt(patches)
        for time_s, dark, kept_N in zip(times_BU.flat, dark_BU.flat, kept_BUN.reshape(-1, patches), strict=True):
            if not dark:
                total, count = self._counts.get(float(time_s), (0.0, 0))
                self._counts[float(time_s)] = total + kept_N.reshape(side, side), count + 1

    def shares(self) -> tuple[FloatArray, npt.NDArray[np.float32]]:
        """Return the times (F,) of the frames, ascending, and the share of clips that keep each token (F, R, Q)."""
        times = sorted(self._counts)
        shares = [total / count for total, count in map(self._counts.__getitem__, times)]
        return np.array(times), np.stack(shares).astype(np.float32)
