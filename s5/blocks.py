"""The block of the temporal pyramids, whatever mixes the tokens, and its parts.

Shapes: B batch, L sequence, D width, K kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s5 import noise
from s5.attention import ATTENTIONS, Attention
from s5.config import DecoderConfig
from s5.merging import Merging
from s5.selection import Selected, Selection, keep_count
from s5.ssm import SSMLayer, build_ssm


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


def build_mixer(config: DecoderConfig, width: int) -> SSMLayer | Attention:
    """Build the layer that mixes the tokens, (B, L, D) -> (B, L, D): attention or a state space, by the decoder's name.

    Raises:
        ValueError: the layer cannot have this width.
    """
    if config.name in ATTENTIONS:
        return ATTENTIONS[config.name](config.attention, width)
    return build_ssm(config.ssm, width)


class Block(nn.Module):
    """Block of ViS4mer (arXiv 2204.01692, section 3); S5 (2303.14526) selects tokens in front of it, VTM merges them.

    LayerNorm, mixer, dropout, residual; average over pairs, linear that halves the width, GELU.

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
        self.layer = build_mixer(config, width)
        self.narrow = nn.Linear(width, width // 2)
        self.selection: Selection | None = None
        self.merging: Merging | None = None
        if config.selection.generator != "none" and self.keep_ratio < 1:
            if config.name == "s5" and isinstance(self.layer, SSMLayer):
                self.selection = Selection(config.selection, self.layer.ssm)
            elif config.name == "vtm":
                self.merging = Merging(width)

    def _shorten(self, x_BLD: Tensor, seeds_B: Tensor | None) -> Selected | None:
        """Select or merge tokens, where the block does."""
        shorten = self.selection or self.merging
        if shorten is None:
            return None
        with torch.no_grad():
            tokens_BLD = self.norm(x_BLD).to(x_BLD.dtype)
        k = keep_count(self.keep_ratio, x_BLD.shape[1])
        selected: Selected = shorten(x_BLD, tokens_BLD, k, seeds_B, f"decoder.{self.index}.gumbel")
        return selected

    def forward(self, x_BLD: Tensor, seeds_B: Tensor | None) -> tuple[Tensor, Selected | None]:
        """(B, L, D) -> (B, ceil(K / 2), D / 2), and what was kept of the input; K is L where all of it is."""
        selected = self._shorten(x_BLD, seeds_B)
        if selected is not None:
            x_BLD = selected.tokens
        y_BLD = self.layer(self.norm(x_BLD))
        if self.training and self.dropout > 0 and seeds_B is not None:
            y_BLD = drop_channels(y_BLD, self.dropout, seeds_B, f"decoder.{self.index}.dropout")
        return nn.functional.gelu(self.narrow(pool_pairs(x_BLD + y_BLD))), selected
