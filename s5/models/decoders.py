"""Decoders: from the tokens of a clip to one feature vector, by a temporal pyramid or by consensus.

Shapes: B batch, L sequence, D width, K kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s5 import rng
from s5.config import DecoderConfig
from s5.models.attention import ATTENTIONS
from s5.models.blocks import Block, drop_channels
from s5.models.selection import Selection, describe
from s5.ssm.layers import SSMLayer, register_hint


class DecoderOutput(NamedTuple):
    """What a decoder makes of a batch of clips."""

    features_BD: Tensor
    """Features (B, out_width): the mean over the sequence that is left."""
    kept: list[Tensor]
    """Indices (B, K) kept by each block in turn that selects, or merged into by each that merges, as positions in that
    block's own input. Those of the first block are positions of the clip's tokens."""
    keep_ratio: float
    """Share of the clip's tokens that reach the mixer of the last of these blocks, 1 without any; a pair that was
    averaged before counts as both of its tokens."""
    selection: dict[str, Tensor]
    """What the first of these blocks does, empty without any: `entropy` (scalar, 0 to 1) of its probabilities or
    saliencies over that of the uniform distribution; `frame_spread` (B,), see `selection.frame_spread`; in training
    `overlap` (B,), the share of the tokens kept that other noise keeps too, which is the keep ratio at random."""


class Decoder(nn.Module, ABC):
    """What every decoder has.

    Args:
        width: width of the incoming tokens.
        out_width: width of the features.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.width = width
        self.out_width = out_width
        self.recompute = False
        """Whether blocks keep their input alone for the backward pass."""
        self.check_finite = True
        """Whether `forward` looks for NaN and infinity, for which it has to wait for a GPU."""

    @abstractmethod
    def decode(
        self, x_BLD: Tensor, seeds_B: Tensor | None, frames: int, frames_BL: Tensor | None = None
    ) -> DecoderOutput:
        """Decode tokens of the right shape; there are seeds in training."""

    def forward(
        self,
        x_BLD: Tensor,
        seeds_B: Tensor | None = None,
        frames: int | None = None,
        frames_BL: Tensor | None = None,
    ) -> DecoderOutput:
        """Decode the tokens of clips.

        Args:
            x_BLD: (B, L, D) tokens in order of time, any L of at least 1.
            seeds_B: (B,) int64 seeds of the samples' noise; None draws them from torch's generator in training.
            frames: number of frames that the tokens come from, in equal shares; None where each token is a frame's.
            frames_BL: frame of each token, from 0, where the shares differ since some are masked.

        Returns:
            Features, kept indices and the entropy of the selection.

        Raises:
            ValueError: the tokens do not have the decoder's width, there are none, or the frames cannot share them.
            FloatingPointError: tokens or features are not finite; found only where the decoder is not compiled, and
                with `check_finite`.
        """
        if self.training and seeds_B is None:
            seeds_B = rng.fresh_seeds(x_BLD.shape[0], x_BLD.device)
        if x_BLD.dim() != 3 or x_BLD.shape[1] < 1 or x_BLD.shape[2] != self.width:
            raise ValueError(f"tokens have shape {tuple(x_BLD.shape)}: give (batch, length >= 1, {self.width})")
        frames = x_BLD.shape[1] if frames is None else frames
        if frames < 1 or (frames_BL is None and x_BLD.shape[1] % frames):
            raise ValueError(f"frames is {frames}: give a divisor of the number of tokens, {x_BLD.shape[1]}")
        out = self.decode(x_BLD, seeds_B, frames, frames_BL)
        looks = self.check_finite and not torch.compiler.is_compiling()
        if looks and not torch.isfinite(out.features_BD).all():
            _explain_not_finite(x_BLD, out.features_BD)
        return out

    def update_momentum(self) -> None:
        """Move every momentum S4 towards its online S4; to be called after each step of the optimiser."""

    def reset_momentum(self) -> None:
        """Copy every online S4 into its momentum S4; to be called after weights without momentum were loaded."""

    def set_progress(self, progress: float) -> None:
        """Set the temperature for a share of the training, 0 to 1.

        Raises:
            ValueError: `progress` is not in [0, 1].
        """


def _samples_not_finite(x: Tensor) -> list[int]:
    return (~torch.isfinite(x.flatten(1)).all(1)).nonzero()[:, 0].tolist()


def _explain_not_finite(x_BLD: Tensor, features_BD: Tensor) -> None:
    """Raise `FloatingPointError` that tells where NaN or infinity came from."""
    samples = _samples_not_finite(x_BLD)
    if samples:
        raise FloatingPointError(
            f"the decoder's input tokens have NaN or infinity in samples {samples} of the batch: check the frames of "
            "these videos and the backbone's weights (backbone.weights); after some steps of training, lower optim.lr"
        )
    raise FloatingPointError(
        f"the decoder's output has NaN or infinity in samples {_samples_not_finite(features_BD)} of the batch, though "
        "its input tokens are finite: lower optim.lr, or check the checkpoint, whose weights may have diverged"
    )


class Pyramid(Decoder):
    """Pyramid of blocks that differ in their mixer, or in what shortens the sequence in front of it.

    `vis4mer` (arXiv 2204.01692) is the plain pyramid of state spaces; `s5` (2303.14526) selects tokens and `vtm`
    (2410.23782) merges them; `lst`, `performer` (2009.14794) and `orthoformer` (2106.05392) have attention instead, as
    ViS4mer's baselines, and learned positions: one vector a frame, added to all of its tokens.

    Without selection the state dict of S5 is that of ViS4mer; with it, keys under `selection.` are added and the others
    stay, so that a pyramid pretrained without selection loads with `strict=False` followed by `reset_momentum()`. The
    same holds for merging, under `merging.`.

    Args:
        config: settings; where `selection.generator` is `none`, nothing is selected or merged. Its `width` is not
            looked at.
        width: width of the incoming tokens and of the first block.

    Raises:
        ValueError: `width` cannot be halved once a block, or the heads of attention cannot share it.
    """

    def __init__(self, config: DecoderConfig, width: int) -> None:
        super().__init__(width, width >> config.blocks)
        divisor = 2**config.blocks
        if width < 1 or width % divisor:
            raise ValueError(f"width is {width}: set decoder.width to a multiple of {divisor}, halved once a block")
        self.blocks = nn.ModuleList(Block(config, width >> index, index) for index in range(config.blocks))
        self.positions: nn.Parameter | None = None
        if config.name in ATTENTIONS:
            drawn = nn.init.trunc_normal_(torch.empty(config.positions, width), std=0.02)
            self.positions = register_hint(nn.Parameter(drawn), weight_decay=0.0)

    def _add_positions(self, x_BLD: Tensor, positions: Tensor, frames: int, frames_BL: Tensor | None) -> Tensor:
        if frames > len(positions):
            raise ValueError(
                f"decoder.positions is {len(positions)}: a clip has {frames} frames; give at least as many positions "
                "as frames"
            )
        if frames_BL is None:
            added = positions[:frames].repeat_interleave(x_BLD.shape[1] // frames, dim=0)
        else:
            added = nn.functional.embedding(frames_BL, positions)
        return x_BLD + added.to(x_BLD.dtype)

    def decode(
        self, x_BLD: Tensor, seeds_B: Tensor | None, frames: int, frames_BL: Tensor | None = None
    ) -> DecoderOutput:
        """Decode tokens of the right shape; there are seeds in training.

        Raises:
            ValueError: there are more frames than positions.
        """
        if self.positions is not None:
            x_BLD = self._add_positions(x_BLD, self.positions, frames, frames_BL)
        kept: list[Tensor] = []
        statistics: dict[str, Tensor] = {}
        keep_ratio = 1.0
        for block in self.blocks:
            length = x_BLD.shape[1]
            mix = partial(checkpoint, block, use_reentrant=False) if self.recompute else block
            x_BLD, selected = mix(x_BLD, seeds_B)
            if selected is not None:
                statistics = statistics or describe(selected, length, min(frames, length))
                kept.append(selected.indices)
                keep_ratio *= selected.indices.shape[1] / length
        return DecoderOutput(x_BLD.mean(1), kept, keep_ratio, statistics)

    def _selecting(self) -> list[tuple[SSMLayer, Selection]]:
        """Layers of the blocks that select, with their selections."""
        return [
            (block.layer, block.selection)
            for block in self.blocks
            if isinstance(block, Block) and block.selection is not None and isinstance(block.layer, SSMLayer)
        ]

    def update_momentum(self) -> None:
        """Move every momentum S4 towards its online S4; to be called after each step of the optimiser."""
        for online, selection in self._selecting():
            if selection.momentum is not None:
                selection.momentum.update(online)

    def reset_momentum(self) -> None:
        """Copy every online S4 into its momentum S4; to be called after weights without momentum were loaded."""
        for online, selection in self._selecting():
            if selection.momentum is not None:
                selection.momentum.reset(online)

    def set_progress(self, progress: float) -> None:
        """Set the temperature for a share of the training, 0 to 1.

        Raises:
            ValueError: `progress` is not in [0, 1].
        """
        for _, selection in self._selecting():
            selection.set_progress(progress)


class Consensus(Decoder):
    """Segment consensus of TSN (arXiv 1608.00859): the average over frames, blind to their order.

    With a linear head, the average of the frames' scores is the score of the average token, which is what this decoder
    gives; frames have equally many tokens. There are no weights; in training, channels are dropped as in a pyramid.

    Args:
        config: settings, of which only `dropout` counts.
        width: width of the tokens and of the features.
    """

    def __init__(self, config: DecoderConfig, width: int) -> None:
        super().__init__(width, width)
        self.dropout = config.dropout

    def decode(
        self, x_BLD: Tensor, seeds_B: Tensor | None, frames: int, frames_BL: Tensor | None = None
    ) -> DecoderOutput:
        """Decode tokens of the right shape; there are seeds in training."""
        x_B1D = x_BLD.mean(1, keepdim=True)
        if self.training and self.dropout > 0 and seeds_B is not None:
            x_B1D = drop_channels(x_B1D, self.dropout, seeds_B, "decoder.dropout")
        return DecoderOutput(x_B1D[:, 0], [], 1.0, {})


def build_decoder(config: DecoderConfig, width: int) -> Pyramid | Consensus:
    """Build the decoder that `config.name` names, for tokens of `width` channels.

    Raises:
        ValueError: the decoder cannot have this width.
    """
    return Consensus(config, width) if config.name == "tsn" else Pyramid(config, width)
