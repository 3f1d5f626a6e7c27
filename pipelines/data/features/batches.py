"""Batches of clips from cached features; the counterpart of `clip_batches`, which decodes videos.

While the model trains, threads copy the tokens of the next `data.prefetch_batches` batches from the shards.

Shapes: B clips of this worker, T frames, N tokens a frame, D width.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.data.clip_batches import CANDIDATE_COLUMNS
from pipelines.data.clip_order import ClipOrder
from pipelines.data.decoding.decode_tasks import NO_LABEL, ClipSpec
from pipelines.data.features.cache import TokenArray, check_fresh, read_meta
from pipelines.data.features.reader import FeatureReader
from pipelines.errors import UserError
from pipelines.storage.weights import weights_digest
from s5.batch import ClipBatch
from s5.config import BackboneConfig, ClipConfig, EvaluationProtocol
from s5.errors import Failure, VideoError
from s5.video.clip_times import beyond, clip_seed, stride_s

THREADS = 4
"""Most threads that read; otherwise one more than `prefetch_batches`."""


class BufferPool:
    """Reuses the memory of batches once nothing refers to them any more, not even a view.

    Allocating new memory, which the system zeroes page by page, takes longer than copying tokens into it.
    """

    def __init__(self, keep: int) -> None:
        """Hold the memory of at most `keep` unused batches."""
        self._free: deque[TokenArray] = deque(maxlen=keep)

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return an uninitialised fp16 tensor; with a GPU a pinned one of torch, which has its own pool."""
        if torch.cuda.is_available():
            return torch.empty(shape, dtype=torch.float16, pin_memory=True)
        size = math.prod(shape)
        try:
            whole = self._free.pop()
        except IndexError:
            whole = np.empty(size, np.float16)
        if len(whole) < size:
            whole = np.empty(size, np.float16)
        # The tensor's storage, which all its views share, holds this one array, and nothing else does.
        held = whole[:size].reshape(shape)
        weakref.finalize(held, _return_to_pool, weakref.ref(self._free), whole).atexit = False
        return torch.from_numpy(held)


def _return_to_pool(free: weakref.ref[deque[TokenArray]], whole: TokenArray) -> None:
    """Return memory to the pool, if the pool still exists."""
    if (kept := free()) is not None:
        kept.append(whole)


@dataclass(frozen=True)
class _Clip:
    """A clip to be read: its video, its seed, and which frames (T,) of it, -1 for black ones."""

    video: dict[str, Any]
    seed: int
    frames_T: Any


def check_stride(
    frames_per_second: float, clips: ClipConfig, protocol: EvaluationProtocol, fps: Sequence[float], pairs: bool = False
) -> None:
    """Check that frames of clips are no closer than those of the features; `whole` clips have no stride.

    Args:
        frames_per_second: of the features.
        clips: the clips.
        protocol: how they are read.
        fps: frame rates of the videos.
        pairs: whether short clips are read beside the long ones.

    Raises:
        UserError: they are.
    """
    if protocol == "whole" or clips.frames == 1:
        return
    name, stride = ("short_stride", clips.short_stride) if pairs else ("long_stride", clips.long_stride)
    shortest_s = min(stride_s(clips, stride, rate) for rate in fps)
    if shortest_s * frames_per_second < 1 - 1e-6:
        raise UserError(
            f"clips.{name} is {stride:g} {clips.unit}, {shortest_s:g} s: the cached features are "
            f"{1 / frames_per_second:g} s apart; raise it, or compute features with more --frames-per-second"
        )


def check_features(
    folder: str,
    manifest: pa.Table,
    clips: ClipConfig,
    protocol: EvaluationProtocol,
    backbone: BackboneConfig,
    weights: dict[str, torch.Tensor] | None,
    pairs: bool = False,
) -> str:
    """Return the digest of cached features after checking that they match a manifest, its clips and a backbone.

    With `pairs`, short clips are read beside the long ones.

    Raises:
        UserError: they do not; gives the reason.
    """
    meta = read_meta(folder)
    if weights is None and not meta.imported:
        raise UserError(
            "features come from a trained backbone: give the checkpoint or model.backbone.weights that computed them"
        )
    check_fresh(folder, meta, backbone, weights_digest(weights or {}), manifest)
    check_stride(meta.frames_per_second, clips, protocol, manifest["fps"].to_pylist(), pairs)
    return meta.digest


class FeatureClips:
    """Reads the clips of a manifest's videos."""

    def __init__(self, features: str, manifest: pa.Table, spec: ClipSpec, prefetch: int) -> None:
        self._reader = FeatureReader(features)
        # Beside the prefetched ones, one that is being read and one that is trained on.
        self._views = 1 + (spec.pairs and not spec.evaluated)
        self._memory = BufferPool(self._views * (prefetch + 2))
        self._videos = manifest.select(CANDIDATE_COLUMNS)
        self._spec = spec

    def videos(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return rows of the manifest."""
        return list(self._videos.take(pa.array(indices, pa.int64())).to_pylist())

    def clips(self, video: dict[str, Any], seed: int) -> list[_Clip]:
        """Return the clips of a video; of a pair first the long one.

        Raises:
            VideoError: it is too short for them, or has no features; gives the reason.
        """
        found = []
        for times_T in self._spec.times(video | {"seed": seed, "first_clip": None, "end_clip": None}):
            frames_T = self._reader.frames(video["video_id"], times_T)
            if self._spec.protocol == "windows":
                frames_T[beyond(times_T, video["end_s"])] = -1
            found.append(_Clip(video, seed, frames_T))
        return found

    def batch(self, clips: list[_Clip], failures: list[Failure], step: int, epoch: int) -> ClipBatch:
        """Read clips, or pairs whose long and short clips take turns."""
        long = self._tokens(clips[:: self._views])
        short = self._tokens(clips[1::2]) if self._views == 2 else None
        clips = clips[:: self._views]
        labels = [NO_LABEL if clip.video["label"] is None else clip.video["label"] for clip in clips]
        targets = [math.nan if clip.video["target"] is None else clip.video["target"] for clip in clips]
        return ClipBatch(
            step=step,
            epoch=epoch,
            video_ids=[clip.video["video_id"] for clip in clips],
            long=long,
            short=short,
            seeds=torch.tensor([clip.seed for clip in clips], dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            targets=torch.tensor(targets, dtype=torch.float32),
            failures=failures,
        )

    def _tokens(self, clips: list[_Clip]) -> torch.Tensor:
        """Copy the tokens (B, T, N, D) of clips from the shards."""
        meta = self._reader.meta
        tokens = self._memory.take((len(clips), self._spec.clips.frames, meta.tokens, meta.width))
        for clip, out_TND in zip(clips, tokens.numpy(), strict=True):
            self._reader.read(clip.video["video_id"], clip.frames_T, out_TND)
        return tokens


@dataclass(frozen=True, kw_only=True)
class CachedClips:
    """A `ClipSource` of cached features, which threads of this process read."""

    features: str
    """Their folder."""
    clips: ClipConfig
    """Which frames."""
    frame_size: int
    """Height and width of the encoded frames in pixels."""
    data: DataConfig
    """Batches prefetched."""
    protocol: EvaluationProtocol = "uniform"
    """Which clips of a video, but for pairs."""
    pairs: bool = False
    """Read a short clip beside each long one in training."""
    rank: int = 0
    """This worker."""
    world_size: int = 1
    """Workers."""

    def training(self, videos: pa.Table, order: ClipOrder, seed: int, start_step: int = 0) -> Generator[ClipBatch]:
        """Yield this worker's batches of the order's steps; see `ClipSource.training`."""
        source = self._opened(videos)

        def batch(step: int) -> ClipBatch:
            rows = order.rows(step, step + 1, self.rank, self.world_size)
            epoch = step // order.steps_per_epoch
            failures: list[Failure] = []
            chosen: list[_Clip] = []
            for index, spares in zip(rows.video, rows.spares, strict=True):
                candidates = source.videos([int(index), *(int(spare) for spare in spares if spare >= 0)])
                for video in candidates:
                    try:
                        chosen += source.clips(video, clip_seed(seed, epoch, video["video_id"]))
                        break
                    except VideoError as error:
                        failures.append(_failure(video, error))
                else:
                    tried = "; ".join(f"{failure.uri}: {failure.reason}" for failure in failures)
                    raise VideoError(f"step {step}: a video and all its spares fail ({tried})")
            return replace(source.batch(chosen, failures, step, epoch), global_size=order.batch_size)

        yield from _ahead(batch, range(start_step, order.total_steps), self.data.prefetch_batches)

    def evaluation(self, videos: pa.Table, clips_per_video: int, batch_size: int) -> Generator[ClipBatch]:
        """Yield the clips of this worker's videos; failures come with the first batch. See `ClipSource.evaluation`."""
        source = self._opened(videos, clips_per_video)
        failures: list[Failure] = []
        chosen: list[_Clip] = []
        for video in source.videos(list(range(self.rank, len(videos), self.world_size))):
            try:
                chosen += source.clips(video, 0)
            except VideoError as error:
                failures.append(_failure(video, error))

        def batch(number: int) -> ClipBatch:
            here = chosen[number * batch_size : (number + 1) * batch_size]
            return source.batch(here, failures if number == 0 else [], number, 0)

        yield from _ahead(batch, range(max(1, -(-len(chosen) // batch_size))), self.data.prefetch_batches)

    def _opened(self, videos: pa.Table, clips_per_video: int = 0) -> FeatureClips:
        spec = ClipSpec(self.clips, self.frame_size, self.pairs, protocol=self.protocol, evaluated=clips_per_video)
        return FeatureClips(self.features, videos, spec, self.data.prefetch_batches)


def _failure(video: dict[str, Any], error: VideoError) -> Failure:
    return Failure(video["video_id"], storage.redacted(video["uri"]), str(error))


def _ahead(read: Callable[[int], ClipBatch], numbers: range, prefetch: int) -> Generator[ClipBatch]:
    """Yield `read(number)` for each number, in order; threads read `prefetch` batches ahead."""
    coming: deque[Future[ClipBatch]] = deque()
    with ThreadPoolExecutor(min(THREADS, prefetch + 1), thread_name_prefix="features") as pool:
        try:
            for number in numbers:
                coming.append(pool.submit(read, number))
                if len(coming) > prefetch:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
