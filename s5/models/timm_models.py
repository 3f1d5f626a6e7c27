"""Models of timm as frame encoders: building them, reading weights, and how their features are laid out.

A plain Vision Transformer can be run block by block on some of its patches (`backbone.Backbone`). Any other model is
run as it is, through `forward_features`; `TokenLayout` says where the tokens of a frame are in what that returns.

Shapes: B frames, N tokens of a frame, D width.
"""

from __future__ import annotations

import math
import pickle
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.patch_embed import PatchEmbed
from timm.models import adapt_input_conv, vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from s5.config import BackboneConfig

PROJECTION = "patch_embed.proj.weight"


def build_model(config: BackboneConfig) -> Any:
    """Return timm's model for the settings; a plain Vision Transformer without what follows its blocks and their norm.

    Where imported features stand in for it, it is empty.

    Raises:
        ValueError: timm has no model of that name or cannot build it so, it is no plain Vision Transformer and is
            asked for what these alone can do, the frame is no multiple of the patch, or the class token is missing.
    """
    if config.tokens:
        return nn.Module()
    model = _create(config)
    if not is_plain_vit(model):
        _check_runs_whole(config, model)
        return model
    patch = model.patch_embed.patch_size[0]
    if config.frame_size % patch:
        raise ValueError(f"backbone.frame_size is {config.frame_size}: give a multiple of the patch size, {patch}")
    if config.cls_token and not model.has_class_token:
        raise ValueError(f"backbone.cls_token is True: {config.name} has no class token; leave it out")
    # Tokens are taken before pooling: what comes after would get no gradient, and DDP waits for every gradient.
    model.attn_pool = None
    model.fc_norm = nn.Identity()
    return model


def is_plain_vit(model: nn.Module) -> bool:
    """Return whether a model has blocks that need no positions, and patches that do not see one another before them."""
    return isinstance(model, VisionTransformer) and isinstance(model.patch_embed, PatchEmbed)


def _check_runs_whole(config: BackboneConfig, model: nn.Module) -> None:
    other = f"{config.name} (timm's class {type(model).__name__}) is no plain Vision Transformer"
    if not config.frozen:
        raise ValueError(f"backbone.frozen is False: {other} and can only be used as it is; give True")
    if config.tubelet != 1:
        raise ValueError(f"backbone.tubelet is {config.tubelet}: {other} and takes single frames; give 1")


def _create(config: BackboneConfig, pretrained: bool | None = None) -> Any:
    """Timm's own model; its input channels are the colours of a tubelet's frames, frame by frame."""
    if not timm.is_model(config.name):
        close = timm.list_models(f"*{config.name.split('_')[0]}*")[:3]
        raise ValueError(f"backbone.name is {config.name!r}: timm has no such model; try {', '.join(close) or 'a vit'}")
    try:
        timm.get_pretrained_cfg(config.name)
    except RuntimeError as error:
        raise ValueError(f"backbone.name is {config.name!r}: {error} Leave out what follows the dot") from None
    shape = {
        key: value
        for key in ("depth", "embed_dim", "num_heads", "patch_size")
        if (value := getattr(config, key)) is not None
    }
    settings = shape | {
        "pretrained": config.weights == "timm" if pretrained is None else pretrained,
        "num_classes": 0,
        "in_chans": 3 * config.tubelet,
    }
    try:
        try:
            return timm.create_model(config.name, img_size=config.frame_size, **settings)
        except TypeError as error:
            # Convolutions take frames of any size, and no such argument.
            if "img_size" not in str(error):
                raise
            return timm.create_model(config.name, **settings)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"backbone.name is {config.name!r}: timm cannot build it with {shape}: {error}") from None


# --- layout ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of a frame are in what a model's `forward_features` returns."""

    form: Literal["NHWC", "NCHW", "NLC"]
    """Order of dimensions: batch, height, width (or positions L, row by row) and channels."""
    grid: int
    """Tokens of a frame, class token and the like apart."""
    width: int
    """Channels D of a token."""
    prefix: int
    """Class token, registers and the like, which come before the grid where the form is NLC."""
    cls_token: bool
    """Whether the class token, the first of them, is handed on."""

    def tokens(self, features: Tensor) -> Tensor:
        """Return the tokens (B, N, D) of B frames: the class token, if it is handed on, then the grid row by row."""
        if self.form == "NCHW":
            return rearrange(features, "b d h w -> b (h w) d")
        if self.form == "NHWC":
            return rearrange(features, "b h w d -> b (h w) d")
        grid_BND = features[:, self.prefix :]
        return torch.cat([features[:, :1], grid_BND], dim=1) if self.cls_token else grid_BND


def probe_layout(config: BackboneConfig) -> TokenLayout:
    """Return how the features of a model are laid out: by one frame through it, without weights or memory for them.

    Of four dimensions, timm's models name the form where it is not NCHW (`output_fmt`); of three, how many tokens come
    before the grid (`num_prefix_tokens`).

    Raises:
        ValueError: the model takes no frames of that size, its features are no grid, or it has no class token to give.
    """
    with torch.device("meta"), torch.no_grad():
        model = _create(config, pretrained=False).eval()
        try:
            features = model.forward_features(torch.zeros(1, 3, config.frame_size, config.frame_size))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"backbone.frame_size is {config.frame_size}: {config.name} cannot encode such frames ({reason}); give "
                f"timm's size for it, {model.pretrained_cfg['input_size'][-1]}"
            ) from None
    return _layout(config, model, features)


def _layout(config: BackboneConfig, model: Any, features: Any) -> TokenLayout:
    known, cls_token = getattr(model, "num_prefix_tokens", None), getattr(model, "cls_token", None) is not None
    prefix: int = known or 0
    grid = width = 0
    form: Literal["NHWC", "NCHW", "NLC"] = "NLC"
    shape = tuple(features.shape[1:]) if isinstance(features, Tensor) else ()
    if len(shape) == 3:
        form, prefix = ("NHWC" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "NCHW"), 0
        width = shape[2 if form == "NHWC" else 0]
        grid = math.prod(shape) // width
    elif len(shape) == 2:
        grid, width = shape[0] - prefix, shape[1]
    # Frames are square, and so are their grids; a class token that is not counted would be taken for a patch.
    uncounted = form == "NLC" and cls_token and not known
    if width != model.num_features or math.isqrt(max(grid, 0)) ** 2 != grid or uncounted:
        raise ValueError(
            f"backbone.name is {config.name!r}: the features of timm's class {type(model).__name__} are no grid of "
            f"tokens ({shape or type(features).__name__}); give a model whose forward_features gives one"
        )
    if config.cls_token and not (cls_token and prefix):
        raise ValueError(f"backbone.cls_token is True: {config.name} has no class token; leave it out")
    return TokenLayout(form, grid, width, prefix, config.cls_token)


# --- weights --------------------------------------------------------------------------------------------------------


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


def load_weights(model: nn.Module, state: dict[str, Tensor], config: BackboneConfig) -> None:
    """Load weights in timm's layout, or an older layout that timm converts, into a model.

    Raises:
        ValueError: the weights are those of another model.
    """
    own = model.state_dict()

    def unfit() -> list[str]:
        return [key for key in own if key not in state or state[key].shape != own[key].shape]

    if unfit():
        # timm has a function of this name beside each model whose weights had other layouts, or depend on its size.
        module = vision_transformer if is_plain_vit(model) else sys.modules[type(model).__module__]
        convert = getattr(module, "checkpoint_filter_fn", lambda state, model: state)
        # It checks nothing: what it stumbles over stays as it is, and fits no better.
        with suppress(LookupError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError):
            state = convert(state, model)
        if PROJECTION in state and state[PROJECTION].ndim == 4 and state[PROJECTION].shape[1] == 3:
            state[PROJECTION] = adapt_input_conv(3 * config.tubelet, state[PROJECTION])
    if wrong := unfit():
        raise ValueError(
            f"backbone.weights are of another model than {config.name}: {len(wrong)} of {len(own)} are "
            f"missing or of another shape, as {wrong[0]!r}; give a file that fits backbone.name and its sizes"
        )
    model.load_state_dict({key: state[key] for key in own})
