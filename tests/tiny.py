"""Settings of a training run so small that it takes a second, which tests of the pipeline share."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "model.backbone.name": "vit_tiny_patch16_224",
    "model.backbone.frame_size": 32,
    "model.backbone.depth": 1,
    "model.backbone.embed_dim": 16,
    "model.backbone.num_heads": 2,
    "model.backbone.patch_size": 8,
    "model.decoder.blocks": 2,
    "model.decoder.ssm.state": 8,
    "clips.frames": 4,
    "clips.long_stride": 2.0,
    "clips.short_stride": 0.5,
    # Ray Train's processes take ten times as long to start as such a run does.
    "scale.num_workers": 0,
    "scale.cpus_per_worker": 0.5,
    "data.cpus_per_decode": 0.5,
    "data.clips_per_task": 4,
    "loop.batch_size": 8,
    "loop.log_every": 1,
    "optim.lr": 1e-3,
}
HEADS: dict[str, Any] = {"lsmcl.hidden": 32, "lsmcl.dim": 16}
"""Of LSMCL."""
