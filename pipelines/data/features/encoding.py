"""Tokens of frames, or of segments of frames: computed, copied from the device, and stored.

Shapes: T frames, U segments, N tokens of a frame, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines import storage
from pipelines.data.features.cache import FloatArray, ShardWriter, TokenArray
from s5.errors import VideoError
from s5.models.backbone import Backbone
from s5.models.segments import SegmentEncoder
from s5.video.reading import FrameArray

FrameEncoder = Backbone | SegmentEncoder
"""What makes tokens of frames, or of segments of several frames."""


@dataclass(frozen=True)
class Encoded:
    """Tokens on their way to host memory: a GPU may still be computing or copying them."""

    tokens: Tensor
    """(T, N, D), or (U, 1, D) of segments, fp16, on the host."""
    finite: Tensor
    """Whether all of them are; on the host."""
    arrived: torch.cuda.Event | None
    """When both are there; None where they are already."""


def encode(backbone: FrameEncoder, frames_THWC: FrameArray, precision: str) -> Encoded:
    """Return the tokens of frames, or of segments.

    On a GPU nothing is waited for, so that it always has a next chunk to work on: pinned memory lets it copy by itself.
    """
    device = backbone.mean.device
    gpu = device.type == "cuda"
    frames = torch.from_numpy(frames_THWC)[None]
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        tokens: Tensor = backbone((frames.pin_memory() if gpu else frames).to(device, non_blocking=True)).half()
        tokens = tokens.view(-1, backbone.tokens, backbone.width)
        finite = tokens.isfinite().all()
        if not gpu:
            return Encoded(tokens, finite, arrived=None)
        tokens, finite = _leaving(tokens), _leaving(finite)
        return Encoded(tokens, finite, torch.cuda.current_stream(device).record_event())


def _leaving(x: Tensor) -> Tensor:
    """Return a tensor in pinned memory that a GPU will copy another one to."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def on_host(encoded: Encoded) -> TokenArray:
    """Return encoded tokens once they are in host memory.

    Raises:
        VideoError: they are not finite, or too large for fp16.
    """
    if encoded.arrived is not None:
        encoded.arrived.synchronize()
    if not bool(encoded.finite):
        raise VideoError("tokens are not finite in fp16")
    array: TokenArray = encoded.tokens.numpy()
    return array


def store(writer: ShardWriter, row: dict[str, Any], times_T: FloatArray, tokens: Encoded | VideoError | None) -> None:
    """Append a chunk of a video to a shard, and note in its row of the index where it is, or why it cannot be."""
    if row["reason"] or tokens is None:
        return
    try:
        if isinstance(tokens, VideoError):
            raise tokens
        array = on_host(tokens)
    except VideoError as error:
        # What is written of it by now stays in the shard, and nothing points there.
        row |= {"reason": storage.redacted(str(error)), "batch": 0, "frames": 0}
        return
    row["batch"] = row["batch"] if row["frames"] else writer.batches
    row["frames"] += len(times_T)
    writer.add(times_T, array)
