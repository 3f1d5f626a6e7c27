"""Settings of the model, the clips, LSMCL, the optimiser and the loop, as frozen dataclasses.

Every value is checked where it is made: a bad one raises `ValueError` with its name, its value and the remedy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

Config = TypeVar("Config")

DecoderName = Literal["s5", "vis4mer", "lst", "performer", "orthoformer", "tsn", "vtm"]
EvaluationProtocol = Literal["uniform", "windows", "whole", "multi-clip"]
"""Which clips of a video are learned from and which its result is put together from (`s5.video.clip_times`)."""


SEGMENTS = "segments"
"""Name of a backbone that is none: cached embeddings of segments stand for its tokens."""


@dataclass(frozen=True)
class PathRole:
    """Marks a setting that names a file or folder, in `typing.Annotated`."""

    kind: Literal["input", "output", "scope"]
    """`input`: it has to exist; `output`: it is written; `scope`: what lies below it is meant."""
    what: Literal["file", "folder", "file or folder", "manifest", "checkpoint", "features", "weights"]
    """What is named."""
    not_paths: tuple[str, ...] = ("",)
    """Values that name nothing."""


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise `ValueError` that names the setting, its value and the remedy unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}: {remedy}")


def from_json(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Return a config of that class from nested values as JSON gives them.

    Raises:
        ValueError: a key that the class lacks, or a value out of range.
    """
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        require(key in known, key, values[key], f"{cls.__name__} has no such setting")
    built = {
        key: from_json(hints[key], value)
        if dataclasses.is_dataclass(hints[key])
        else tuple(value)
        if isinstance(value, list)
        else value
        for key, value in values.items()
    }
    return cls(**built)


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise `ValueError` unless `low <= value <= high`; NaN fails."""
    require(low <= value <= high, name, value, f"give a value from {low:g} to {high:g}")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Frame encoder: a Vision Transformer of timm, or frozen any other model of timm whose features are a grid."""

    name: str = "vit_base_patch16_224"
    """timm's name of the model; `segments`: none, but cached embeddings of segments (`features --segment-s`)."""
    frame_size: int = 224
    """Height and width of a frame in pixels; positional embeddings are made for (or interpolated to) it."""
    weights: Annotated[str, PathRole("input", "weights", ("", "timm"))] = ""
    """Where the weights come from: empty for random ones (where the backbone is frozen for timm's), `timm` for timm's
    own (cached or from the hub), or a file (.safetensors, .pt) in timm's layout."""
    frozen: bool = False
    """Keep the backbone's weights as they are and run it without gradient, in evaluation mode."""
    cls_token: bool = False
    """Hand the class token on as one more token a frame."""
    depth: int | None = None
    """Number of transformer blocks, where it is to differ from timm's."""
    embed_dim: int | None = None
    """Width of the tokens, where it is to differ from timm's."""
    num_heads: int | None = None
    """Number of attention heads, where it is to differ from timm's."""
    patch_size: int | None = None
    """Height and width of a patch in pixels, where it is to differ from timm's."""
    tubelet: int = 1
    """Frames that one token spans; a clip's frames must be a multiple. Weights of an image model are spread evenly over
    them, and stay so where `lsmcl.freeze_patches` keeps the patch projection as it is."""

    tokens: int = 0
    """Tokens of a frame of imported features, or of a segment's embedding, which stand in for the frame encoder and set
    this themselves; 0 for a model of timm."""
    width: int = 0
    """Width of these tokens."""
    made_by: str = ""
    """Digest of the encoder that made the embeddings of segments, which set this themselves."""

    def __post_init__(self) -> None:
        if self.tokens:
            require(self.width > 0, "backbone.width", self.width, "give the width of the imported features")
            require(
                self.frozen, "backbone.frozen", self.frozen, "imported features have no encoder to train; give True"
            )
        require(self.frame_size >= 8, "backbone.frame_size", self.frame_size, "give at least 8 pixels")
        for name in ("depth", "embed_dim", "num_heads", "patch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"backbone.{name}", value, "give a positive number or leave it out")
        require(self.tubelet >= 1, "backbone.tubelet", self.tubelet, "give at least 1")

    def steps(self, frames: int) -> int:
        """Return the number of time steps that a clip of so many frames makes.

        Raises:
            ValueError: the frames cannot be shared out among tubelets.
        """
        remedy = f"give a divisor of the {frames} frames of a clip, or change clips.frames"
        require(frames % self.tubelet == 0, "backbone.tubelet", self.tubelet, remedy)
        return frames // self.tubelet


@dataclass(frozen=True, kw_only=True)
class SSMConfig:
    """State-space layer (S4D: arXiv 2206.11893, S4: 2111.00396)."""

    kind: Literal["s4d", "s4"] = "s4d"
    """`s4d`: diagonal state matrix; `s4`: diagonal plus low rank (DPLR), as ViS4mer uses."""
    state: int = 64
    """State size S of one channel, in real numbers (S / 2 conjugate pairs)."""
    init: Literal["legs", "lin", "inv"] = "legs"
    """Initial eigenvalues of S4D: LegS (diagonal of HiPPO-LegS), Lin or Inv. S4 always starts from LegS."""
    discretization: Literal["zoh", "bilinear"] = "zoh"
    """Discretisation of S4D. S4 is always bilinear."""
    dt_min: float = 1e-3
    """Smallest initial time step (log-uniform)."""
    dt_max: float = 1e-1
    """Largest initial time step (log-uniform)."""
    bidirectional: bool = False
    """Add a second kernel that runs backwards in time."""
    lr: float = 1e-3
    """Upper bound of the learning rate of A, B and dt, which have an optimiser group without weight decay."""

    def __post_init__(self) -> None:
        require(self.state >= 2 and self.state % 2 == 0, "ssm.state", self.state, "give an even number of at least 2")
        require(0 < self.dt_min <= self.dt_max, "ssm.dt_min", self.dt_min, "give 0 < dt_min <= dt_max")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Token selection of S5 (arXiv 2303.14526, section 3)."""

    keep_ratio: tuple[float, ...] = (0.5,)
    """Share of tokens that each block keeps (`vtm`: merges into), first block first; blocks beyond the end keep all.
    That only the first block selects, and 0.5, are recollections of the paper's text, not checked against it."""
    generator: Literal["linear", "transformer", "random", "none"] = "linear"
    """Mask generator: one linear layer, one transformer layer, random tokens, or none (all tokens kept). `vtm` has
    saliencies of its own, and merges nothing with none."""
    features: Literal["s4", "backbone"] = "s4"
    """What the mask generator sees: momentum S4 features or the block's own input tokens."""
    estimator: Literal["own", "shared"] = "own"
    """How the mask generator gets a gradient. `own`: each kept token is judged in its own place, by the gradient of
    `sigmoid(logit / rho) * token` there; ours. `shared`: one softmax-weighted mean of all tokens is added to every kept
    place, the straight-through Gumbel-softmax of the paper; it learns to discard what tells (docs/selection.md)."""
    temperature: float = 1.0
    """Temperature rho at the start of training: of the sigmoid (`own`) or the Gumbel-softmax (`shared`)."""
    temperature_end: float = 1.0
    """Temperature rho at the end of training; exponential in between."""
    momentum: float = 0.99
    """Momentum of the moving average that makes the momentum S4."""
    momentum_s4: Literal["convolution", "layer"] = "convolution"
    """What the momentum S4 consists of. `convolution`: the linear state space alone, without GELU and channel mix;
    `layer`: with both, as the block's S4 layer computes."""

    def __post_init__(self) -> None:
        for ratio in self.keep_ratio:
            require(0 < ratio <= 1, "selection.keep_ratio", ratio, "give values in (0, 1]")
        require(self.temperature > 0, "selection.temperature", self.temperature, "give a positive number")
        require(self.temperature_end > 0, "selection.temperature_end", self.temperature_end, "give a positive number")
        require_range("selection.momentum", self.momentum, 0, 1)
        forms = ("convolution", "layer")
        require(self.momentum_s4 in forms, "selection.momentum_s4", self.momentum_s4, "give convolution or layer")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Self-attention of the decoders that have it in place of a state space."""

    heads: int = 8
    """Attention heads of each block; the width of every block must be a multiple."""
    implementation: Literal["fused", "plain"] = "fused"
    """`lst` only: PyTorch's fused attention, or the plain one that keeps the whole (L, L) matrix, to compare with."""
    features: int = 256
    """`performer` only: random features a head; 256 is the default of the authors' code (arXiv 2009.14794)."""
    prototypes: int = 128
    """`orthoformer` only: prototypes a head; 128 is the default of the authors' code (arXiv 2106.05392)."""

    def __post_init__(self) -> None:
        for name in ("heads", "features", "prototypes"):
            require(getattr(self, name) >= 1, f"attention.{name}", getattr(self, name), "give at least 1")
        implementations = ("fused", "plain")
        remedy = f"give one of {', '.join(implementations)}"
        require(self.implementation in implementations, "attention.implementation", self.implementation, remedy)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Temporal pyramid over the tokens of a clip (ViS4mer, arXiv 2204.01692): each block halves length and width."""

    name: DecoderName = "s5"
    """`s5`: S4 on selected tokens; `vis4mer`: S4 on all tokens; `lst`: full attention; `performer`: FAVOR+ attention;
    `orthoformer`: attention through prototypes; `tsn`: average over frames, no pyramid; `vtm`: S4 on merged tokens."""
    width: int | None = None
    """Width D of the first block; where it is not the backbone's, a linear layer stands in between."""
    blocks: int = 3
    """Number of blocks."""
    dropout: float = 0.2
    """Share of channels dropped after each mixing layer; one draw for the whole sequence of a clip."""
    positions: int = 1024
    """Frames (or tubelets) that `lst`, `performer` and `orthoformer` have positional embeddings for."""
    ssm: SSMConfig = field(default_factory=SSMConfig)
    """State-space layer; `s5`, `vis4mer` and `vtm` only."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention layer; `lst`, `performer` and `orthoformer` only."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Token selection of `s5`, or which share of the tokens `vtm` merges into."""

    def __post_init__(self) -> None:
        names = get_args(DecoderName)
        require(self.name in names, "decoder.name", self.name, f"give one of {', '.join(names)}")
        require(self.positions >= 1, "decoder.positions", self.positions, "give at least 1")
        require(self.blocks >= 1, "decoder.blocks", self.blocks, "give at least 1")
        require(0 <= self.dropout < 1, "decoder.dropout", self.dropout, "give a value in [0, 1)")
        ratios = self.selection.keep_ratio
        require(len(ratios) <= self.blocks, "selection.keep_ratio", ratios, f"there are only {self.blocks} blocks")
        if self.width is not None and self.name != "tsn":
            divisor = 2**self.blocks
            require(
                self.width > 0 and self.width % divisor == 0,
                "decoder.width",
                self.width,
                f"give a multiple of {divisor}, since each of {self.blocks} blocks halves it",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Video model: backbone, temporal pyramid, and a head when it is fine-tuned."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Frame encoder."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Temporal pyramid."""


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
        require(self.lr > 0, "optim.lr", self.lr, "give a positive number")
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

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"loop.{name}", getattr(self, name), "give at least 1")
        remedy = "give fp32, bf16 or fp16"
        require(self.precision in ("fp32", "bf16", "fp16"), "loop.precision", self.precision, remedy)
        counts = ("steps", "batch_size", "checkpoint_every", "evaluate_every", "micro_batch", "max_skipped")
        for name in (*counts, "profile_steps"):
            require(getattr(self, name) >= 0, f"loop.{name}", getattr(self, name), "give 0 or more")
