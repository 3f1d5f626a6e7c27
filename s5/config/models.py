"""Settings of a video model: backbone, decoder, state spaces, selection and attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from s5.config.checks import PathRole, require, require_range

DecoderName = Literal["s5", "vis4mer", "lst", "performer", "orthoformer", "tsn", "vtm"]
SEGMENTS = "segments"
"""Name of a backbone that is none: cached embeddings of segments stand for its tokens."""


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
    features: Literal["s4", "backbone"] = "backbone"
    """What the mask generator sees. `backbone`: the block's own input tokens. `s4`: momentum S4 features, which the
    paper found to guide better; on the videos of docs/study.md they guide a linear generator worse."""
    estimator: Literal["own", "shared"] = "own"
    """How the mask generator gets a gradient. `own`: each kept token is judged in its own place, by the gradient of
    `sigmoid(logit / rho) * token` there; ours. `shared`: one softmax-weighted mean of all tokens is added to every kept
    place, the straight-through Gumbel-softmax of the paper; it learns to discard what tells (docs/selection.md)."""
    noise: Literal["always", "training"] = "always"
    """When Gumbel noise decides along with the logits. `always`: evaluation draws as training does, from one fixed
    seed, so that the state space sees choices of the kind it learned from; ours. `training`: evaluation keeps the
    highest logits, as the paper does (docs/selection.md). `random` always draws; `vtm` draws in training alone."""
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
        require(self.noise in ("always", "training"), "selection.noise", self.noise, "give always or training")
        forms = ("convolution", "layer")
        require(self.momentum_s4 in forms, "selection.momentum_s4", self.momentum_s4, "give convolution or layer")

    def require_used(self) -> None:
        """Raise `ValueError` where settings of a momentum S4 are given that nothing looks at."""
        has_momentum = self.features == "s4" and self.generator in ("linear", "transformer")
        for name in ("momentum", "momentum_s4"):
            value, remedy = getattr(self, name), "there is no momentum S4; give selection.features s4 and a generator"
            require(has_momentum or value == getattr(SelectionConfig, name), f"selection.{name}", value, remedy)


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
