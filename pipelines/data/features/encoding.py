"""Tokens of frames, or of segments of frames: computed, copied from the device, and stored.

Shapes: T frames, U segments, N tokens of a frame, D width.
"""

from __future__ import annotations

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


def encode(backbone: FrameEncoder, frames_THWC: FrameArray, precision: str) -> Tensor:
    """Return the tokens (T, N, D) of frames, or (U, 1, D) of segments, fp16, on the backbone's device.

    It may still be computing them.
    """
    device = backbone.mean.device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        tokens: Tensor = backbone(torch.from_numpy(frames_THWC)[None].to(device)).half()
    return tokens.view(-1, backbone.tokens, backbone.width)


def on_host(tokens: Tensor) -> TokenArray:
    """Return encoded tokens in host memory.

    Raises:
        VideoError: they are not finite, or too large for fp16.
    """
    if not bool(torch.isfinite(tokens).all()):
        raise VideoError("tokens are not finite in fp16")
    array: TokenArray = tokens.cpu().numpy()
    return array


def store(writer: ShardWriter, row: dict[str, Any], times_T: FloatArray, tokens: Tensor | VideoError | None) -> None:
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
