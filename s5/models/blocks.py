"""The block of the temporal pyramids, whatever mixes the tokens, and its parts.

Shapes: B batch, L sequence, D width, K kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s5 import rng
from s5.config import DecoderConfig
from s5.models.attention import ATTENTIONS, Attention
from s5.models.fused import normed_convolution, selective_convolution
from s5.models.merging import Merging
from s5.models.selection import Selected, Selection
from s5.models.top_k import keep_count
from s5.ssm.layers import SSMLayer, build_ssm


def pool_pairs(x_BLD: Tensor) -> Tensor:
    """Average pairs along the sequence: (B, L, D) -> (B, ceil(L / 2), D). A last token without a neighbour stays."""
    batch, length, width = x_BLD.shape
    even = length - length % 2
    pooled_BLD = x_BLD[:, :even].reshape(batch, even // 2, 2, width).mean(2)
    return torch.cat([pooled_BLD, x_BLD[:, even:]], dim=1) if length % 2 else pooled_BLD


def drop_channels(x_BLD: Tensor, share: float, seeds_B: Tensor, stream: str) -> Tensor:
    """Dropout tied over the sequence: one draw a sample and channel; the rest is scaled by 1 / (1 - share)."""
    drawn_BD = rng.uniform(seeds_B, stream, x_BLD.shape[2])
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
                self.selection = Selection(config.selection, self.layer)
            elif config.name == "vtm":
                self.merging = Merging(width)
        linear = self.selection is None or isinstance(self.selection.generator, nn.Linear)
        self.fused = isinstance(self.layer, SSMLayer) and self.merging is None and linear
        """Whether `mix_fused` can take the place of `mix_by_parts`."""

    def mix_by_parts(self, x_BLD: Tensor, seeds_B: Tensor | None) -> tuple[Tensor, Tensor, Selected | None]:
        """Tokens left, the mixer's output for them, and what was kept, for any mixer and any way to shorten."""
        selected: Selected | None = None
        shorten = self.selection or self.merging
        if shorten is not None:
            with torch.no_grad():
                tokens_BLD = self.norm(x_BLD).to(x_BLD.dtype)
            k = keep_count(self.keep_ratio, x_BLD.shape[1])
            selected = shorten(x_BLD, tokens_BLD, k, seeds_B, f"decoder.{self.index}.gumbel")
            x_BLD = selected.tokens
        return x_BLD, self.layer(self.norm(x_BLD)), selected

    def mix_fused(self, x_BLD: Tensor, seeds_B: Tensor | None) -> tuple[Tensor, Tensor, Selected | None]:
        """`mix_by_parts` in less memory, for state spaces with a linear mask generator or none."""
        assert isinstance(self.layer, SSMLayer)
        ssm, selected = self.layer.ssm, None
        if self.selection is None:
            y_BLD = normed_convolution(x_BLD, self.norm, ssm)
        else:
            k = keep_count(self.keep_ratio, x_BLD.shape[1])
            stream = f"decoder.{self.index}.gumbel"
            selected, y_BLD = selective_convolution(x_BLD, self.norm, ssm, self.selection, k, seeds_B, stream)
            x_BLD = selected.tokens
        return x_BLD, self.layer.mix(y_BLD), selected

    def forward(self, x_BLD: Tensor, seeds_B: Tensor | None) -> tuple[Tensor, Selected | None]:
        """(B, L, D) -> (B, ceil(K / 2), D / 2), and what was kept of the input; K is L where all of it is."""
        # The compiler keeps and fuses by itself, and is to see the parts.
        mix = self.mix_fused if self.fused and not torch.compiler.is_compiling() else self.mix_by_parts
        x_BLD, y_BLD, selected = mix(x_BLD, seeds_B)
        if self.training and self.dropout > 0 and seeds_B is not None:
            y_BLD = drop_channels(y_BLD, self.dropout, seeds_B, f"decoder.{self.index}.dropout")
        return nn.functional.gelu(self.narrow(pool_pairs(x_BLD + y_BLD))), selected
