"""Settings of clips, views, LSMCL, the optimiser and the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from s5.config.checks import require, require_range

EvaluationProtocol = Literal["uniform", "windows", "whole", "multi-clip"]
"""Which clips of a video are learned from and which its result is put together from (`s5.video.clip_times`)."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which frames of a video make a long and a short clip (LSTCL, arXiv 2106.09212)."""

    frames: int = 16
    """Frames T of a clip, long or short."""
    long_stride: float = 2.0
    """Time between two frames of a long clip, in `unit`."""
    short_stride: float = 0.5
    """Time between two frames of a short clip, in `unit`."""
    unit: Literal["seconds", "frames"] = "seconds"
    """Unit of the strides; frames are those of the video's own frame rate."""
    too_short: Literal["error", "drop", "shrink"] = "error"
    """What to do with a video shorter than its clip: refuse to start, leave it out, or shrink the stride to fit."""

    def __post_init__(self) -> None:
        require(self.frames >= 1, "clips.frames", self.frames, "give at least 1")
        require(self.short_stride > 0, "clips.short_stride", self.short_stride, "give a positive number")
        require(
            math.isfinite(self.long_stride) and self.long_stride >= self.short_stride,
            "clips.long_stride",
            self.long_stride,
            f"give at least the short stride, {self.short_stride:g}",
        )


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Random views of clips in training, as in MoCo v3 (arXiv 2104.02057): one draw for all frames of a clip, and one
    of its own for each clip of a pair. Off where nothing is given, and in evaluation."""

    crop_scale: tuple[float, ...] = ()
    """Smallest and largest share of the picture that a random resized crop shows (MoCo v3: 0.08 1); empty for the
    largest square at the centre."""
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    """Smallest and largest width over height of a random resized crop."""
    flip: float = 0.0
    """Share of clips that are mirrored, left to right (MoCo v3: 0.5)."""
    jitter: float = 0.0
    """Strength of the colour jitter: brightness, contrast and saturation change by up to this share; 0 for none."""
    jitter_share: float = 1.0
    """Share of clips with colour jitter (MoCo v3: 0.8)."""
    grey: float = 0.0
    """Share of clips that lose their colours (MoCo v3: 0.2)."""
    blur: tuple[float, ...] = (0.0, 0.0)
    """Shares of long clips, or of clips that are no pairs, and of short ones that are blurred, by a Gaussian of 0.1 to
    2 pixels in frames of 224 pixels, and in proportion in others (MoCo v3: 1 0.1)."""
    solarise: tuple[float, ...] = (0.0, 0.0)
    """Shares of the same clips whose values from 128 on are inverted (MoCo v3: 0 0.2)."""

    def __post_init__(self) -> None:
        scale, ratio = self.crop_scale, self.crop_ratio
        fits = scale == () or (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1)
        remedy = "give a smallest and a largest share of the picture, above 0 and up to 1, or nothing"
        require(fits, "views.crop_scale", scale, remedy)
        fits = len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < math.inf
        require(fits, "views.crop_ratio", ratio, "give a smallest and a largest ratio above 0")
        for name in ("flip", "jitter", "jitter_share", "grey"):
            require_range(f"views.{name}", getattr(self, name), 0, 1)
        for name in ("blur", "solarise"):
            shares = getattr(self, name)
            fits = len(shares) == 2 and all(0 <= share <= 1 for share in shares)
            require(fits, f"views.{name}", shares, "give two shares from 0 to 1, of long and of short clips")

    def changing(self) -> dict[str, tuple[Any, str]]:
        """Return what changes frames, under dotted keys: each setting with what to give to turn it off."""
        off = {"crop_scale": "", "flip": "0", "jitter": "0", "grey": "0", "blur": "0 0", "solarise": "0 0"}
        changed = [name for name in off if getattr(self, name) != getattr(ViewsConfig, name)]
        return {f"views.{name}": (getattr(self, name), off[name]) for name in changed}


@dataclass(frozen=True, kw_only=True)
class LSMCLConfig:
    """Long-short masked contrastive pretraining (arXiv 2303.14526); where it is silent, MoCo v3 (2104.02057)."""

    mask_ratio: float = 0.5
    """Masking ratio eta: share of the patches or tokens of long and short clips that is masked."""
    mask_on: Literal["patches", "tokens"] = "patches"
    """What is masked. `patches`: that share of every frame's patches, which the backbone does not see; `tokens`: that
    share of all L tokens of a clip, after the backbone, as the mask generator selects them: a frame may lose all."""
    temperature: float = 0.2
    """Temperature rho of InfoNCE."""
    momentum: float = 0.99
    """Momentum of the momentum encoder at the start; it rises to 1 along a cosine."""
    hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    dim: int = 256
    """Width of the embeddings that are compared."""
    freeze_patches: bool = True
    """Keep the patch projection at its initial weights, which MoCo v3 found to be stabler."""
    collapse_spread: float = 0.1
    """Alarm when the embedding spread (1 for independent random directions, 0 for one point) falls below this."""

    def __post_init__(self) -> None:
        require(0 <= self.mask_ratio < 1, "lsmcl.mask_ratio", self.mask_ratio, "give a value in [0, 1)")
        require(self.mask_on in ("patches", "tokens"), "lsmcl.mask_on", self.mask_on, "give patches or tokens")
        require(self.temperature > 0, "lsmcl.temperature", self.temperature, "give a positive number")
        require_range("lsmcl.momentum", self.momentum, 0, 1)
        require(self.hidden >= 1, "lsmcl.hidden", self.hidden, "give at least 1")
        require(self.dim >= 2, "lsmcl.dim", self.dim, "give at least 2")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine."""

    lr: float = 1.5e-4
    """Peak learning rate for the whole (global) batch, or for `lr_batch` where that is given."""
    lr_batch: int = 0
    """Global batch that `lr` is meant for: the peak is lr x loop.batch_size / lr_batch (256 in MoCo v3, arXiv
    2104.02057); 0 for the batch as it is."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms, biases and state-space parameters have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    warmup: float = 0.1
    """Share of the training that the learning rate rises linearly for."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 for no limit."""
    fused: bool = True
    """Update all weights in one kernel."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "optim.lr", self.lr, "give a positive number")
        require(self.lr_batch >= 0, "optim.lr_batch", self.lr_batch, "give 0 or more")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "give 0 or more")
        require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "give a value in [0, 1)")
        require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, "give 0 or more")

    def peak_lr(self, batch_size: int) -> float:
        """Return the peak learning rate of a global batch of so many videos."""
        return self.lr * batch_size / self.lr_batch if self.lr_batch else self.lr


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length and rhythm of a training run."""

    epochs: int = 10
    """Passes over the training videos."""
    steps: int = 0
    """Length of the run in optimiser steps, instead of `epochs`; 0 to go by `epochs`."""
    batch_size: int = 32
    """Videos in the global batch, all workers together; 0 for as many as there are, up to 32."""
    seed: int = 0
    """Seed of the initial weights, the order of the videos, the clips, the masks and all noise."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """`bf16`, `fp16`: autocast; weights, their moving averages, state-space parameters, FFT and losses stay in fp32.
    `fp16` scales the loss."""
    micro_batch: int = 0
    """Videos that a worker's model sees at once, to save memory: a larger share is computed in parts, with the
    gradient of the whole (for LSMCL by gradient caching, one forward pass more); 0 for all at once."""
    recompute: bool = False
    """Activation checkpointing: blocks of backbone and decoder keep their input alone for the backward pass."""
    compile: bool = False
    """Compile backbone and decoder with torch.compile."""
    max_skipped: int = 5
    """Steps in a row that are skipped where loss or gradient are not finite; one more ends the run."""
    profile_steps: int = 0
    """Steps, after the first three, whose trace by torch's profiler rank 0 keeps; 0 for none."""
    log_every: int = 10
    """Steps between two rows of logged metrics."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0 for one after each epoch."""
    keep_checkpoints: int = 2
    """Checkpoints kept: the last ones, and the best where there is a validation metric."""
    evaluate_every: int = 1
    """Epochs between two evaluations on the validation split (in pretraining: kNN probes); 0 for only the last."""
    stop_after_epoch: int = 0
    """Epoch after which to end, evaluated and with a checkpoint, while all schedules are those of the whole length; a
    later one, or 0 for the whole length, goes on in the same --out."""

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"loop.{name}", getattr(self, name), "give at least 1")
        remedy = "give fp32, bf16 or fp16"
        require(self.precision in ("fp32", "bf16", "fp16"), "loop.precision", self.precision, remedy)
        counts = ("steps", "batch_size", "checkpoint_every", "evaluate_every", "micro_batch", "max_skipped")
        for name in (*counts, "profile_steps", "stop_after_epoch"):
            require(getattr(self, name) >= 0, f"loop.{name}", getattr(self, name), "give 0 or more")
