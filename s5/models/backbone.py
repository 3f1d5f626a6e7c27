"""Frame encoder: a model of timm. A Vision Transformer sees only the patches that masking leaves (as MAE, 2111.06377).

It runs on every frame, or on every tubelet: a few frames whose patches are projected together (as ViViT, 2103.15691).
Any other model of timm whose features are a grid stays frozen and sees whole frames.

Shapes: B batch, T frames of a clip, U = T / tubelet time steps, N patches of a step, K patches kept, D width,
L = U x K tokens of a clip.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s5 import rng
from s5.config import BackboneConfig
from s5.models.timm_models import TokenLayout, build_model, is_plain_vit, load_weights, probe_layout, read_weights


class Backbone(nn.Module):
    """Clips of uint8 frames to tokens, frame by frame or tubelet by tubelet."""

    mean: Tensor
    std: Tensor
    frames = 1
    """Frames that are encoded together, those of a tubelet apart."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether blocks keep their input alone for the backward pass."""
        self.vit = build_model(config)
        """timm's model, a Vision Transformer or not, under the name that checkpoints have for it; nothing where
        imported features stand in its place."""
        self.layout = self._layout(config)
        """How the features of a model that sees whole frames are laid out; None where patches can be dropped."""
        self.width = int(self.layout.width if self.layout else self.vit.embed_dim)
        self.patches = int(self.layout.grid if self.layout else self.vit.patch_embed.num_patches)
        self.tokens = self.patches + config.cls_token
        statistics = {} if config.tokens else cast(dict[str, Any], self.vit.pretrained_cfg)
        for name, plain in (("mean", [0.0] * 3), ("std", [1.0] * 3)):
            values = torch.tensor(statistics.get(name, plain), dtype=torch.float32).view(1, 3, 1, 1) * 255
            self.register_buffer(name, values, persistent=False)
        if config.frozen:
            self.vit.requires_grad_(False).eval()
        if config.weights not in ("", "timm"):
            self.load(read_weights(config.weights))

    def _layout(self, config: BackboneConfig) -> TokenLayout | None:
        if config.tokens:
            return TokenLayout("NLC", config.tokens, config.width, prefix=0, cls_token=False)
        return None if is_plain_vit(self.vit) else probe_layout(config)

    def load(self, state: dict[str, Tensor]) -> None:
        """Load weights in timm's layout; positional embeddings are interpolated to the model's frame size.

        The patch projection of an image model is spread evenly over the frames of a tubelet, so that a tubelet of one
        frame repeated gives the image's tokens (average inflation, as in ViViT, arXiv 2103.15691).

        Raises:
            ValueError: the weights are those of another model.
        """
        load_weights(self.vit, state, self.config)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode; a frozen encoder stays in evaluation mode, where it drops nothing and moves no statistics."""
        return super().train(mode and not self.config.frozen)

    def check_masking(self, on_patches: bool) -> None:
        """Raise `ValueError` where patches are to be dropped for a model that sees whole frames."""
        if on_patches and self.layout:
            raise ValueError(
                f"lsmcl.mask_on is 'patches': {self.config.name} sees whole frames, patches can be dropped "
                "for plain Vision Transformers alone; give tokens"
            )

    def kept(self, mask_ratio: float) -> int:
        """Return the number K of patches of a time step that masking leaves, at least one."""
        return max(1, round(self.patches * (1 - mask_ratio)))

    def steps(self, frames: int) -> int:
        """Return the number U of time steps that a clip of so many frames makes.

        Raises:
            ValueError: the frames cannot be shared out among tubelets.
        """
        return self.config.steps(frames)

    def forward(self, frames_BTHWC: Tensor, keep_BUK: Tensor | None = None) -> Tensor:
        """Return the tokens (B, L, D) of clips.

        Without masking, token `l` is that of time step `l // M` with M = L / U tokens a step: of patch `l % M`, row by
        row, or with a class token, which comes first, of patch `l % M - 1`. Step `u` spans the frames from
        `u * tubelet` up to `(u + 1) * tubelet`.

        Args:
            frames_BTHWC: frames, 0 to 255, uint8 or float; C is 3.
            keep_BUK: indices of the patches of each time step that the encoder sees, or None for all of them.

        Raises:
            ValueError: frames are not of the model's size, cannot be shared out among tubelets, or are to be masked
                for a model that sees whole ones.
        """
        if self.config.tokens:
            raise ValueError(f"frames are given: the model reads imported features of {self.config.name!r}; give those")
        self.check_masking(keep_BUK is not None)
        size = self.config.frame_size
        if frames_BTHWC.ndim != 5 or frames_BTHWC.shape[2:] != (size, size, 3):
            shape = tuple(frames_BTHWC.shape)
            raise ValueError(f"frames are {shape}: the model (backbone.frame_size) wants (B, T, {size}, {size}, 3)")
        steps = self.steps(frames_BTHWC.shape[1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            tokens = self._encode(rearrange(frames_BTHWC, "b (u t) h w c -> (b u) t c h w", u=steps), keep_BUK)
        return rearrange(tokens, "(b u) n d -> b (u n) d", u=steps)

    def _colours(self, pixels: Tensor) -> Tensor:
        """Normalised colours, whose dimension is the third last."""
        return (pixels.to(self.mean.dtype) - self.mean) / self.std

    def _embed_kept(self, tubelets: Tensor, keep_RK: Tensor) -> Tensor:
        """What `_pos_embed(patch_embed(colours))` gives, of the patches that stay alone, for R = B x U time steps."""
        embed = self.vit.patch_embed
        rows, columns = embed.patch_size
        cut = rearrange(tubelets, "r t c (h p) (w q) -> r h w t c p q", p=rows, q=columns)
        across = embed.grid_size[1]
        kept = cut[torch.arange(len(cut), device=cut.device)[:, None], keep_RK // across, keep_RK % across]
        # The convolution does not overlap: it is a product with each patch.
        weight = embed.proj.weight.flatten(1)
        x_RKD = embed.norm(nn.functional.linear(self._colours(kept).flatten(2), weight, embed.proj.bias))
        shape = embed.grid_size if self.vit.dynamic_img_size else (self.patches,)
        positions = self.vit._pos_embed(x_RKD.new_zeros(1, *shape, x_RKD.shape[-1]))[0]
        prefix_PD, positions_ND = positions.split([self.vit.num_prefix_tokens, self.patches])
        return torch.cat([prefix_PD.expand(len(x_RKD), -1, -1), x_RKD + positions_ND[keep_RK]], dim=1)

    def _encode(self, tubelets: Tensor, keep_BUK: Tensor | None) -> Tensor:
        if self.layout:
            return self.layout.tokens(self.vit.forward_features(self._colours(tubelets).flatten(1, 2)))
        if keep_BUK is None:
            x = self.vit._pos_embed(self.vit.patch_embed(self._colours(tubelets).flatten(1, 2)))
        else:
            x = self._embed_kept(tubelets, keep_BUK.flatten(0, 1))
        x, prefix = self.vit.norm_pre(x), self.vit.num_prefix_tokens
        for block in self.vit.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        x = self.vit.norm(x)
        if self.config.cls_token:
            # Registers, which come after the class token, only serve the blocks.
            return torch.cat([x[:, :1], x[:, prefix:]], dim=1)
        return cast(Tensor, x[:, prefix:])


def random_masking(seeds_B: Tensor, stream: str, steps: int, patches: int, kept: int) -> Tensor | None:
    """Return which patches of every time step stay, (B, U, K) ascending indices; None where all of them do.

    Each step draws K of its N patches without replacement: R_mask(x, eta) of LSMCL (arXiv 2303.14526), by seed alone.
    """
    if kept == patches:
        return None
    order = rng.uniform(seeds_B, stream, steps, patches).argsort(dim=-1)
    return order[..., :kept].sort(dim=-1).values
