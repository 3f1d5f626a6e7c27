"""What a backbone makes of a frame, and what that costs: from a model without memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.errors import UserError
from s5.config import BackboneConfig
from s5.models.backbone import Backbone

STORED_BYTES = 2
"""Of a cached number (fp16)."""


@dataclass(frozen=True)
class Facts:
    """What a backbone makes of a frame, and what that costs."""

    tokens: int
    width: int
    flops: float
    parameters: int

    def stored_bytes(self, frames: int) -> int:
        """Return the size of so many frames in the feature cache (fp16)."""
        return STORED_BYTES * frames * self.tokens * self.width


def facts_of(config: BackboneConfig) -> Facts:
    """Return the facts of a backbone, from a model without memory; imported features cost no FLOPs.

    Raises:
        UserError: there is no such backbone.
    """
    if config.tokens:
        return Facts(config.tokens, config.width, 0.0, 0)
    try:
        with torch.device("meta"):
            backbone = Backbone(replace(config, weights=""))
            frames = torch.zeros(1, config.tubelet, config.frame_size, config.frame_size, 3, dtype=torch.uint8)
            with FlopCounterMode(display=False) as counter:
                backbone(frames)
    except ValueError as error:
        raise UserError(str(error)) from None
    parameters = sum(weight.numel() for weight in backbone.parameters())
    return Facts(backbone.tokens, backbone.width, counter.get_total_flops() / config.tubelet, parameters)
