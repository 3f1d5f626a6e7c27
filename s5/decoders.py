"""Temporal pyramids: from the tokens of a clip to one feature vector.

Shapes: B batch, L sequence, D width, K kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from s5 import noise
from s5.config import DecoderConfig
from s5.selection import Selected, Selection, keep_count
from s5.ssm import build_ssm


class DecoderOutput(NamedTuple):
    """What a decoder makes of a batch of clips."""

    features_BD: Tensor
    """Features (B, out_width): the mean over the sequence that is left."""
    kept: list[Tensor]
    """Indices (B, K) kept by each selecting block in turn, as positions in that block's own input. Those of the first
    block are positions of the clip's tokens."""
    entropy: Tensor | None
    """Normalised entropy of the selection probabilities, 0 to 1, mean over selecting blocks; None without selection."""
    keep_ratio: float
    """Share of the clip's tokens that reach the state space of the last selecting block, 1 without selection; a pair
    that was averaged before counts as both of its tokens."""


def pool_pairs(x_BLD: Tensor) -> Tensor:
    """Average neighbours along the sequence: (B, L, D) -> (B, ceil(L / 2), D). A last token without a neighbour stays.

    The mean of a token and its own copy is that token, hence the padding.
    """
    batch, length, width = x_BLD.shape
    if length % 2:
        x_BLD = torch.cat([x_BLD, x_BLD[:, -1:]], dim=1)
    return x_BLD.reshape(batch, -1, 2, width).mean(2)


def drop_channels(x_BLD: Tensor, share: float, seeds_B: Tensor, stream: str) -> Tensor:
    """Dropout tied over the sequence: one draw a sample and channel; the rest is scaled by 1 / (1 - share)."""
    drawn_BD = noise.uniform(seeds_B, stream, x_BLD.shape[2])
    factor_BD = (drawn_BD >= share).to(x_BLD.dtype) / (1 - share)
    return x_BLD * factor_BD[:, None]


class Block(nn.Module):
    """Block of ViS4mer (arXiv 2204.01692, section 3), with the token selection of S5 (2303.14526) in front if wanted.

    LayerNorm, state-space layer, dropout, residual; average over pairs, linear that halves the width, GELU.

    Args:
        config: settings of the decoder.
        width: width D of the input; the output has half of it.
        index: position in the pyramid, from 0.
    """

    def __init__(self, config: DecoderConfig, width: int, index: int) -> None:
        super().__init__()
        self.index = index
        self.dropout = config.dropout
        ratios = config.selection.keep_ratio
        self.keep_ratio = ratios[index] if index < len(ratios) else 1.0
        self.norm = nn.LayerNorm(width)
        self.layer = build_ssm(config.ssm, width)
        self.narrow = nn.Linear(width, width // 2)
        self.selection: Selection | None = None
        if config.name == "s5" and config.selection.generator != "none" and self.keep_ratio < 1:
            self.selection = Selection(config.selection, self.layer.ssm)

    def _select(self, x_BLD: Tensor, seeds_B: Tensor | None) -> Selected | None:
        if self.selection is None:
            return None
        with torch.no_grad():
            tokens_BLD = self.norm(x_BLD).to(x_BLD.dtype)
        k = keep_count(self.keep_ratio, x_BLD.shape[1])
        selected: Selected = self.selection(x_BLD, tokens_BLD, k, seeds_B, f"decoder.{self.index}.gumbel")
        return selected

    def forward(self, x_BLD: Tensor, seeds_B: Tensor | None) -> tuple[Tensor, Selected | None]:
        """(B, L, D) -> (B, ceil(K / 2), D / 2), and what was selected; K is L without selection."""
        selected = self._select(x_BLD, seeds_B)
        if selected is not None:
            x_BLD = selected.tokens
        y_BLD = self.layer(self.norm(x_BLD))
        if self.training and self.dropout > 0 and seeds_B is not None:
            y_BLD = drop_channels(y_BLD, self.dropout, seeds_B, f"decoder.{self.index}.dropout")
        return nn.functional.gelu(self.narrow(pool_pairs(x_BLD + y_BLD))), selected


class Pyramid(nn.Module):
    """Pyramid of state-space blocks: ViS4mer (arXiv 2204.01692), and with token selection S5 (2303.14526).

    Without selection the state dict is that of ViS4mer; with it, keys under `selection.` are added and the others stay,
    so that a pyramid pretrained without selection loads with `strict=False` followed by `reset_momentum()`.

    Args:
        config: settings; `vis4mer`, or `s5` with generator `none`, selects nothing. Its `width` is not looked at.
        width: width of the incoming tokens and of the first block.

    Raises:
        ValueError: `width` cannot be halved once a block.
    """

    out_width: int
    """Width of the features."""

    def __init__(self, config: DecoderConfig, width: int) -> None:
        super().__init__()
        divisor = 2**config.blocks
        if width < 1 or width % divisor:
            raise ValueError(f"width is {width}: set decoder.width to a multiple of {divisor}, halved once a block")
        self.width = width
        self.blocks = nn.ModuleList(Block(config, width >> index, index) for index in range(config.blocks))
        self.out_width = width >> config.blocks

    def forward(self, x_BLD: Tensor, seeds_B: Tensor | None = None) -> DecoderOutput:
        """Decode the tokens of clips.

        Args:
            x_BLD: (B, L, D) tokens in order of time, any L of at least 1.
            seeds_B: (B,) int64 seeds of the samples' noise; None draws them from torch's generator in training.

        Returns:
            Features, kept indices and the entropy of the selection.

        Raises:
            ValueError: the tokens do not have the decoder's width, or there are none.
        """
        if self.training and seeds_B is None:
            seeds_B = noise.fresh_seeds(x_BLD.shape[0], x_BLD.device)
        if x_BLD.dim() != 3 or x_BLD.shape[1] < 1 or x_BLD.shape[2] != self.width:
            raise ValueError(f"tokens have shape {tuple(x_BLD.shape)}: give (batch, length >= 1, {self.width})")
        selections: list[Selected] = []
        keep_ratio = 1.0
        for block in self.blocks:
            length = x_BLD.shape[1]
            x_BLD, selected = block(x_BLD, seeds_B)
            if selected is not None:
                selections.append(selected)
                keep_ratio *= selected.indices.shape[1] / length
        entropy = torch.stack([selected.entropy for selected in selections]).mean() if selections else None
        return DecoderOutput(x_BLD.mean(1), [selected.indices for selected in selections], entropy, keep_ratio)

    def _selecting(self) -> list[tuple[Block, Selection]]:
        """Blocks that select, with their selections."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        return [(block, block.selection) for block in blocks if block.selection is not None]

    def update_momentum(self) -> None:
        """Move every momentum S4 towards its online S4; to be called after each step of the optimiser."""
        for block, selection in self._selecting():
            if selection.momentum is not None:
                selection.momentum.update(block.layer.ssm)

    def reset_momentum(self) -> None:
        """Copy every online S4 into its momentum S4; to be called after weights without momentum were loaded."""
        for block, selection in self._selecting():
            if selection.momentum is not None:
                selection.momentum.reset(block.layer.ssm)

    def set_progress(self, progress: float) -> None:
        """Set the temperature for a share of the training, 0 to 1.

        Raises:
            ValueError: `progress` is not in [0, 1].
        """
        for _, selection in self._selecting():
            selection.set_progress(progress)
