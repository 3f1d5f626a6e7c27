"""Frame encoder: a Vision Transformer of timm that sees only the patches that masking leaves (as MAE, 2111.06377).

It runs on every frame, or on every tubelet: a few frames whose patches are projected together (as ViViT, 2103.15691).

Shapes: B batch, T frames of a clip, U = T / tubelet time steps, N patches of a step, K patches kept, D width,
L = U x K tokens of a clip.
"""

from __future__ import annotations

import pickle
from typing import Any, cast

import timm
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.patch_embed import PatchEmbed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s5 import rng
from s5.config import SEGMENTS, BackboneConfig

PROJECTION = "patch_embed.proj.weight"


def build_vit(config: BackboneConfig) -> VisionTransformer:
    """Return timm's model for the settings, without what comes after its blocks and their norm.

    Raises:
        ValueError: timm has no Vision Transformer of that name, its patches see one another before its blocks, the
            frame is no multiple of the patch, or the model lacks the class token that is asked for.
    """
    vit = _create_vit(config)
    stem = vit.patch_embed
    if not isinstance(stem, PatchEmbed):
        raise ValueError(
            f"backbone.name is {config.name!r}: a {type(stem).__name__} mixes patches before the blocks, so that "
            "masked ones would be seen; give a Vision Transformer with a plain patch projection"
        )
    patch = stem.patch_size[0]
    if config.frame_size % patch:
        raise ValueError(f"backbone.frame_size is {config.frame_size}: give a multiple of the patch size, {patch}")
    if config.cls_token and not vit.has_class_token:
        raise ValueError(f"backbone.cls_token is True: {config.name} has no class token; leave it out")
    # Tokens are taken before pooling: what comes after would get no gradient, and DDP waits for every gradient.
    vit.attn_pool = None  # type: ignore[assignment]
    vit.fc_norm = nn.Identity()
    return vit


def _create_vit(config: BackboneConfig) -> VisionTransformer:
    """Timm's own model; its input channels are the colours of a tubelet's frames, frame by frame."""
    shape = {
        key: value
        for key in ("depth", "embed_dim", "num_heads", "patch_size")
        if (value := getattr(config, key)) is not None
    }
    if not timm.is_model(config.name):
        close = timm.list_models(f"*{config.name.split('_')[0]}*")[:3]
        raise ValueError(f"backbone.name is {config.name!r}: timm has no such model; try {', '.join(close) or 'a vit'}")
    try:
        timm.get_pretrained_cfg(config.name)
    except RuntimeError as error:
        raise ValueError(f"backbone.name is {config.name!r}: {error} Leave out what follows the dot") from None
    try:
        vit = timm.create_model(
            config.name,
            pretrained=config.weights == "timm",
            num_classes=0,
            in_chans=3 * config.tubelet,
            img_size=config.frame_size,
            **shape,
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(f"backbone.name is {config.name!r}: timm cannot build it with {shape}: {error}") from None
    if not isinstance(vit, VisionTransformer):
        raise ValueError(
            f"backbone.name is {config.name!r}: timm's class {type(vit).__name__}; give a model of its class "
            "VisionTransformer, whose blocks need no positions when patches are dropped"
        )
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
    """Clips of uint8 frames to tokens, frame by frame or tubelet by tubelet."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether blocks keep their input alone for the backward pass."""
        self.vit = build_vit(config)
        self.width = int(self.vit.embed_dim)
        self.patches = int(self.vit.patch_embed.num_patches)
        self.tokens = self.patches + config.cls_token
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

        The patch projection of an image model is spread evenly over the frames of a tubelet, so that a tubelet of one
        frame repeated gives the image's tokens (average inflation, as in ViViT, arXiv 2103.15691).

        Raises:
            ValueError: the weights are those of another model.
        """
        state = checkpoint_filter_fn(state, self.vit)
        if PROJECTION in state and state[PROJECTION].ndim == 4 and state[PROJECTION].shape[1] == 3:
            state[PROJECTION] = adapt_input_conv(3 * self.config.tubelet, state[PROJECTION])
        own = self.vit.state_dict()
        wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
        if wrong:
            raise ValueError(
                f"backbone.weights are of another model than {self.config.name}: {len(wrong)} of {len(own)} are "
                f"missing or of another shape, as {wrong[0]!r}; give a file that fits backbone.name and its sizes"
            )
        self.vit.load_state_dict({key: state[key] for key in own})

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
            ValueError: frames are not of the model's size, or cannot be shared out among tubelets.
        """
        size = self.config.frame_size
        if frames_BTHWC.ndim != 5 or frames_BTHWC.shape[2:] != (size, size, 3):
            shape = tuple(frames_BTHWC.shape)
            raise ValueError(f"frames are {shape}: the model (backbone.frame_size) wants (B, T, {size}, {size}, 3)")
        steps = self.steps(frames_BTHWC.shape[1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            tokens = self._encode(rearrange(frames_BTHWC, "b (u t) h w c -> (b u) t c h w", u=steps), keep_BUK)
        return rearrange(tokens, "(b u) n d -> b (u n) d", u=steps)

    def _encode(self, tubelets: Tensor, keep_BUK: Tensor | None) -> Tensor:
        colours = (tubelets.to(self.mean.dtype) - self.mean) / self.std
        x = self.vit._pos_embed(self.vit.patch_embed(colours.flatten(1, 2)))
        prefix = self.vit.num_prefix_tokens
        if keep_BUK is not None:
            index = rearrange(keep_BUK, "b u k -> (b u) k 1").expand(-1, -1, x.shape[-1])
            x = torch.cat([x[:, :prefix], x[:, prefix:].gather(1, index)], dim=1)
        x = self.vit.norm_pre(x)
        for block in self.vit.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        x = self.vit.norm(x)
        if self.config.cls_token:
            # Registers, which come after the class token, only serve the blocks.
            return torch.cat([x[:, :1], x[:, prefix:]], dim=1)
        return cast(Tensor, x[:, prefix:])


class CachedBackbone(Backbone):
    """No frame encoder: the model reads embeddings of segments, one token of width `embed_dim` each."""

    def __init__(self, config: BackboneConfig) -> None:
        nn.Module.__init__(self)
        if config.embed_dim is None:
            raise ValueError(
                f"backbone.name is {config.name!r}: a model of it reads embeddings; give cached features of segments"
            )
        self.config, self.recompute = config, False
        self.width, self.patches, self.tokens = config.embed_dim, 1, 1
        for name in ("mean", "std"):
            self.register_buffer(name, torch.zeros(1, 3, 1, 1), persistent=False)

    def forward(self, frames_BTHWC: Tensor, keep_BUK: Tensor | None = None) -> Tensor:
        """Raise `ValueError`: there is nothing that could see frames."""
        raise ValueError(f"backbone.name is {self.config.name!r}: the model reads embeddings of segments, not frames")


def build_backbone(config: BackboneConfig) -> Backbone:
    """Return the frame encoder for the settings.

    Raises:
        ValueError: see `build_vit`.
    """
    return CachedBackbone(config) if config.name == SEGMENTS else Backbone(config)


def random_masking(seeds_B: Tensor, stream: str, steps: int, patches: int, kept: int) -> Tensor | None:
    """Return which patches of every time step stay, (B, U, K) ascending indices; None where all of them do.

    Each step draws K of its N patches without replacement: R_mask(x, eta) of LSMCL (arXiv 2303.14526), by seed alone.
    """
    if kept == patches:
        return None
    order = rng.uniform(seeds_B, stream, steps, patches).argsort(dim=-1)
    return order[..., :kept].sort(dim=-1).values
