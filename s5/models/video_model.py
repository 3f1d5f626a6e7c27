"""The video model: frame encoder, temporal pyramid and, for a labelled task, a head. It is built from its config alone.

Shapes: B batch, T frames, U time steps, N tokens of a step, K patches of a step or tokens of a clip
that are kept, L tokens of a clip, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from s5.config import ModelConfig
from s5.models.backbone import Backbone
from s5.models.decoders import DecoderOutput, build_decoder
from s5.models.top_k import rows

# Weights that pretraining does not make: it runs without selection or merging, and without a head.
NOT_PRETRAINED = ("selection.", "merging.", "head.")


class Prediction(NamedTuple):
    """What a video model says of a batch of clips."""

    logits_BC: Tensor
    """Scores, one a class, or one number in regression."""
    features_BD: Tensor
    """What the head saw."""
    kept: list[Tensor]
    """Indices of the tokens kept by each selecting block, (B, K). Those of the pyramid's first block are positions in
    time and frame, as `Backbone.forward` numbers them."""
    keep_ratio: float
    """Share of the clip's tokens that all selecting blocks let through, 1 without selection."""
    selection: dict[str, Tensor]
    """What the first selecting block does: see `DecoderOutput.selection`."""


class VideoModel(nn.Module):
    """Clips of frames to features, and to predictions where there is a head."""

    def __init__(self, config: ModelConfig, outputs: int | None = None) -> None:
        """Build the model.

        Args:
            config: its settings.
            outputs: numbers that the head gives: classes, or 1 for regression; None for no head.
        """
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone)
        width = config.decoder.width or self.backbone.width
        self.projection = nn.Identity() if width == self.backbone.width else nn.Linear(self.backbone.width, width)
        self.decoder = build_decoder(config.decoder, width)
        self.head = nn.Linear(self.decoder.out_width, outputs) if outputs else None

    def encode(self, clips: Tensor, seeds_B: Tensor | None = None, keep_BUK: Tensor | None = None) -> DecoderOutput:
        """Return the features of clips, with what the selection kept.

        Args:
            clips: frames (B, T, H, W, C), 0 to 255, or the tokens (B, U, N, D) that the backbone makes of them.
            seeds_B: seeds of dropout and Gumbel noise in training, one a clip; None draws them from torch's generator.
            keep_BUK: patches of frames that masking leaves, None for all.

        Raises:
            ValueError: frames or tokens are not of the backbone's size.
        """
        return self.decode(self.tokens(clips, keep_BUK), seeds_B, self.steps(clips))

    def steps(self, clips: Tensor) -> int:
        """Return the number U of time steps of clips of frames or tokens, as `encode` takes them.

        Raises:
            ValueError: the frames cannot be shared out among tubelets.
        """
        return clips.shape[1] if clips.ndim == 4 else self.backbone.steps(clips.shape[1])

    def tokens(self, clips: Tensor, keep_BUK: Tensor | None = None, keep_BK: Tensor | None = None) -> Tensor:
        """Return the tokens (B, L, D) of clips, or those (B, K, D) that masking leaves.

        Args:
            clips: frames or tokens, see `encode`.
            keep_BUK: patches of frames that the backbone sees, None for all.
            keep_BK: ascending indices of the tokens that are returned, None for all.

        Raises:
            ValueError: frames or tokens are not of the backbone's size, or patches of tokens are to be masked.
        """
        if clips.ndim == 4 and keep_BUK is not None:
            raise ValueError("lsmcl.mask_on is 'patches': tokens are of whole frames; give tokens, or mask frames")
        tokens_BLD = self._cached(clips) if clips.ndim == 4 else self.backbone(clips, keep_BUK)
        if keep_BK is not None:
            tokens_BLD = rows(tokens_BLD, keep_BK)
        return tokens_BLD.to(self.backbone.mean.dtype) if clips.ndim == 4 else cast(Tensor, tokens_BLD)

    def decode(
        self, tokens_BLD: Tensor, seeds_B: Tensor | None, steps: int, keep_BK: Tensor | None = None
    ) -> DecoderOutput:
        """Return the features of clips from their tokens.

        Args:
            tokens_BLD: what `tokens` returns.
            seeds_B: seeds of dropout and Gumbel noise, see `encode`.
            steps: time steps U of the clips.
            keep_BK: which of the clips' tokens they are, None for all or equally many of each step.
        """
        steps_BK = None if keep_BK is None else keep_BK // self.backbone.tokens
        return cast(DecoderOutput, self.decoder(self.projection(tokens_BLD), seeds_B, steps, steps_BK))

    def _cached(self, tokens_BUND: Tensor) -> Tensor:
        number, width = self.backbone.tokens, self.backbone.width
        if tokens_BUND.shape[2:] != (number, width):
            raise ValueError(f"tokens are {tuple(tokens_BUND.shape)}: the backbone gives (B, U, {number}, {width})")
        return rearrange(tokens_BUND, "b u n d -> b (u n) d")

    def forward(self, clips: Tensor, seeds_B: Tensor | None = None) -> Prediction:
        """Return predictions for clips: frames or tokens, see `encode`.

        Raises:
            ValueError: the model has no head.
        """
        if self.head is None:
            raise ValueError("the model has no head: it was built for pretraining; fine-tune it, or call encode")
        out = self.encode(clips, seeds_B)
        return Prediction(self.head(out.features_BD), out.features_BD, out.kept, out.keep_ratio, out.selection)

    def load_backbone(self, state: dict[str, Tensor]) -> None:
        """Load the frame encoder's weights, in timm's layout; positional embeddings are interpolated.

        Raises:
            ValueError: the weights are those of another model.
        """
        self.backbone.load(state)

    def load_pretrained(self, state: dict[str, Tensor]) -> None:
        """Load an encoder's weights; mask generator and head stay as they are, the momentum S4 starts as a copy.

        Raises:
            ValueError: the weights are those of another architecture.
        """
        own = {key: value for key, value in self.state_dict().items() if not any(n in key for n in NOT_PRETRAINED)}
        wrong = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
        if wrong:
            raise ValueError(f"the checkpoint is of another architecture: {wrong[0]!r} is missing or of another shape")
        self.load_state_dict({key: state[key] for key in own}, strict=False)
        self.decoder.reset_momentum()


def check_model(config: ModelConfig) -> None:
    """Build a model without memory for its weights, to find settings that do not fit together.

    Raises:
        ValueError: names the setting and the remedy.
    """
    with torch.device("meta"):
        VideoModel(replace(config, backbone=replace(config.backbone, weights="")))
