"""Frame encoder: a Vision Transformer of timm that sees only the patches that masking leaves (as MAE, 2111.06377).

Shapes: B batch, T frames of a clip, N patches of a frame, K patches kept, D width, L = T x K tokens of a clip.
"""

from __future__ import annotations

import pickle
from typing import Any, cast

import timm
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from s5 import noise
from s5.config import BackboneConfig


def build_vit(config: BackboneConfig) -> VisionTransformer:
    """Return timm's model for the settings, without what comes after its blocks and their norm.

    Raises:
        ValueError: timm has no Vision Transformer of that name, the frame is no multiple of the patch, or the model
            lacks the class token that is asked for.
    """
    shape = {
        key: value
        for key in ("depth", "embed_dim", "num_heads", "patch_size")
        if (value := getattr(config, key)) is not None
    }
    if not timm.is_model(config.name):
        close = timm.list_models(f"*{config.name.split('_')[0]}*")[:3]
        raise ValueError(f"backbone.name is {config.name!r}: timm has no such model; try {', '.join(close) or 'a vit'}")
    try:
        vit = timm.create_model(
            config.name, pretrained=config.weights == "timm", num_classes=0, img_size=config.frame_size, **shape
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(f"backbone.name is {config.name!r}: timm cannot build it with {shape}: {error}") from None
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"backbone.name is {config.name!r}: a {type(vit).__name__}; give a Vision Transformer")
    patch = vit.patch_embed.patch_size[0]
    if config.frame_size % patch:
        raise ValueError(f"backbone.frame_size is {config.frame_size}: give a multiple of the patch size, {patch}")
    if config.cls_token and not vit.has_class_token:
        raise ValueError(f"backbone.cls_token is True: {config.name} has no class token; leave it out")
    # Tokens are taken before pooling: what comes after would get no gradient, and DDP waits for every gradient.
    vit.attn_pool = None  # type: ignore[assignment]
    vit.fc_norm = nn.Identity()
    return vit


def read_weights(path: str) -> dict[str, Tensor]:
    """Return the tensors of a weights file, safetensors or PyTorch's, on the CPU.

    Raises:
        ValueError: the file is not there, cannot be read, or has no weights.
    """
    try:
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"backbone.weights is {path!r}: there is no such file; give one, `timm`, or nothing") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"backbone.weights is {path!r}: it cannot be read ({reason}); give a .safetensors or .pt file"
        ) from None
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"backbone.weights is {path!r}: there are no weights in it; give a file in timm's layout")
    return tensors


class Backbone(nn.Module):
    """Clips of uint8 frames to tokens, frame by frame."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = build_vit(config)
        self.width = int(self.vit.embed_dim)
        self.patches = int(self.vit.patch_embed.num_patches)
        statistics = cast(dict[str, Any], self.vit.pretrained_cfg)
        for name in ("mean", "std"):
            values = torch.tensor(statistics[name], dtype=torch.float32).view(1, 3, 1, 1) * 255
            self.register_buffer(name, values, persistent=False)
        if config.frozen:
            self.vit.requires_grad_(False)
        if config.weights not in ("", "timm"):
            self.load(read_weights(config.weights))

    def load(self, state: dict[str, Tensor]) -> None:
        """Load weights in timm's layout; positional embeddings are interpolated to the model's frame size.

        Raises:
            ValueError: the weights are those of another model.
        """
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, self.vit)
        own = self.vit.state_dict()
        wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
        if wrong:
            raise ValueError(
                f"backbone.weights are of another model than {self.config.name}: {len(wrong)} of {len(own)} are "
                f"missing or of another shape, as {wrong[0]!r}; give a file that fits backbone.name and its sizes"
            )
        self.vit.load_state_dict({key: state[key] for key in own})

    def kept(self, mask_ratio: float) -> int:
        """Return the number K of patches of a frame that masking leaves, at least one."""
        return max(1, round(self.patches * (1 - mask_ratio)))

    def forward(self, frames_BTHWC: Tensor, keep_BTK: Tensor | None = None) -> Tensor:
        """Return the tokens (B, L, D) of clips.

        Args:
            frames_BTHWC: frames, 0 to 255, uint8 or float; C is 3.
            keep_BTK: indices of the patches that the encoder sees, or None for all of them.

        Raises:
            ValueError: frames are not of the model's size.
        """
        size = self.config.frame_size
        if frames_BTHWC.ndim != 5 or frames_BTHWC.shape[2:] != (size, size, 3):
            shape = tuple(frames_BTHWC.shape)
            raise ValueError(f"frames are {shape}: the model (backbone.frame_size) wants (B, T, {size}, {size}, 3)")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            tokens = self._encode(frames_BTHWC, keep_BTK)
        return rearrange(tokens, "(b t) n d -> b (t n) d", b=frames_BTHWC.shape[0])

    def _encode(self, frames_BTHWC: Tensor, keep_BTK: Tensor | None) -> Tensor:
        images = rearrange(frames_BTHWC, "b t h w c -> (b t) c h w").to(self.mean.dtype)
        x = self.vit.patch_embed((images - self.mean) / self.std)
        x = self.vit._pos_embed(x)
        prefix = self.vit.num_prefix_tokens
        if keep_BTK is not None:
            index = rearrange(keep_BTK, "b t k -> (b t) k 1").expand(-1, -1, x.shape[-1])
            x = torch.cat([x[:, :prefix], x[:, prefix:].gather(1, index)], dim=1)
        x = self.vit.norm(self.vit.blocks(self.vit.norm_pre(x)))
        if self.config.cls_token:
            # Registers, which come after the class token, only serve the blocks.
            return torch.cat([x[:, :1], x[:, prefix:]], dim=1)
        return cast(Tensor, x[:, prefix:])


def random_masking(seeds_B: Tensor, stream: str, frames: int, patches: int, kept: int) -> Tensor | None:
    """Return which patches of every frame stay, (B, T, K) ascending indices; None where all of them do.

    Each frame draws K of its N patches without replacement: R_mask(x, eta) of LSMCL (arXiv 2303.14526), by seed alone.
    """
    if kept == patches:
        return None
    order = noise.uniform(seeds_B, stream, frames, patches).argsort(dim=-1)
    return order[..., :kept].sort(dim=-1).values
