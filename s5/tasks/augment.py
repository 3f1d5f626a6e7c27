"""Random views of whole clips on the training device, by the seeds of the clips alone; crops come with the frames.

Shapes: B batch, R drawn clips, T frames, H height, W width, C colours, K weights of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from s5 import rng
from s5.config import ViewsConfig

# Weights of red, green and blue in luminance (ITU-R BT.601).
LUMINANCE = (0.299, 0.587, 0.114)
BLUR_SIGMA, BLUR_WIDTH = (0.1, 2.0), 224
"""Smallest and largest standard deviation of a blur in pixels, in frames of so many pixels (MoCo v3)."""
SOLARISE_FROM = 128
"""Lowest value that solarising inverts (MoCo v3)."""

Change = Callable[[Tensor, Tensor], Tensor]
"""From frames (R, T, H, W, C) and seeds (R,) of clips to their changed frames."""


def augment(frames_BTHWC: Tensor, seeds_B: Tensor, view: Literal["long", "short"], config: ViewsConfig) -> Tensor:
    """Return random views of clips, all but crops, in MoCo v3's order; what is all off returns the frames as they are.

    Args:
        frames_BTHWC: frames, 0 to 255, uint8 or float.
        seeds_B: one seed a clip.
        view: which clip of a pair; draws of the two are independent.
        config: what is drawn, and how often.
    """
    place = ("long", "short").index(view)
    jitter_share = config.jitter_share if config.jitter else 0.0
    changes: tuple[tuple[str, float, Change], ...] = (
        ("jitter", jitter_share, partial(colour_jitter, stream=f"{view}/jitter", strength=config.jitter)),
        ("grey", config.grey, grey),
        ("blur", config.blur[place], partial(blur, stream=f"{view}/blur")),
        ("solarise", config.solarise[place], solarise),
        ("flip", config.flip, flip),
    )
    for name, share, change in changes:
        frames_BTHWC = _on_share(frames_BTHWC, seeds_B, f"{view}/{name}/share", share, change)
    return frames_BTHWC


def _on_share(frames_BTHWC: Tensor, seeds_B: Tensor, stream: str, share: float, change: Change) -> Tensor:
    """Return the frames with those clips changed that are drawn, each with the probability `share`."""
    if share in (0, 1):
        return change(frames_BTHWC, seeds_B) if share else frames_BTHWC
    drawn_R = (rng.uniform(seeds_B, stream, 1)[:, 0] < share).nonzero()[:, 0]
    if len(drawn_R) == 0:
        return frames_BTHWC
    rows_R = drawn_R.to(frames_BTHWC.device)
    changed = change(frames_BTHWC[rows_R], seeds_B[drawn_R])
    return frames_BTHWC.to(changed.dtype).index_copy(0, rows_R, changed)


def colour_jitter(frames_BTHWC: Tensor, seeds_B: Tensor, stream: str, strength: float) -> Tensor:
    """Scale brightness, contrast and saturation, each by a factor from 1 - strength to 1 + strength, one draw a clip.

    Black frames stay black: windows of short videos end in such.

    Args:
        frames_BTHWC: frames, 0 to 255, uint8 or float.
        seeds_B: one seed a clip.
        stream: name of the draw, so that the two clips of a pair differ.
        strength: 0 to 1.
    """
    draws_B3 = 1 + strength * (2 * rng.uniform(seeds_B, stream, 3) - 1)
    brightness, contrast, saturation = draws_B3.to(frames_BTHWC.device).view(-1, 3, 1, 1, 1, 1).unbind(1)
    shown = frames_BTHWC.amax((2, 3, 4), keepdim=True) > 0
    frames = frames_BTHWC.float() * brightness
    luminance = _luminance(frames)
    # Saturation moves away from each pixel's grey, contrast from the clip's mean grey.
    frames = luminance + (frames - luminance) * saturation
    level = luminance.mean(dim=(1, 2, 3), keepdim=True)
    return (level + (frames - level) * contrast).clamp(0, 255) * shown


def grey(frames_BTHWC: Tensor, seeds_B: Tensor) -> Tensor:
    """Return the frames without colour, as floats."""
    return _luminance(frames_BTHWC.float()).expand(frames_BTHWC.shape)


def blur(frames_BTHWC: Tensor, seeds_B: Tensor, stream: str) -> Tensor:
    """Return the frames, as floats, blurred by a Gaussian, one standard deviation a clip (SimCLR, arXiv 2002.05709).

    Pixels beyond the edge are those at the edge, as in Pillow, which MoCo v3 blurs with.
    """
    batch, frames, height, width, colours = frames_BTHWC.shape
    low, high = (sigma * width / BLUR_WIDTH for sigma in BLUR_SIGMA)
    sigma_B = low + (high - low) * rng.uniform(seeds_B, stream, 1)[:, 0].to(frames_BTHWC.device)
    reach = math.ceil(3 * high)
    at_K = torch.arange(-reach, reach + 1, device=frames_BTHWC.device)
    kernel_BK = torch.softmax(-0.5 * (at_K / sigma_B[:, None]) ** 2, dim=1)
    # Clips become channels, each with a kernel of its own. Autocast would round to half precision.
    x = frames_BTHWC.float().permute(1, 4, 0, 2, 3).reshape(-1, batch, height, width)
    with torch.autocast(x.device.type, enabled=False):
        for across in (True, False):
            pad, shape = ((reach, reach, 0, 0), (1, -1)) if across else ((0, 0, reach, reach), (-1, 1))
            x = F.conv2d(F.pad(x, pad, "replicate"), kernel_BK.view(batch, 1, *shape), groups=batch)
    return x.view(frames, colours, batch, height, width).permute(2, 0, 3, 4, 1)


def solarise(frames_BTHWC: Tensor, seeds_B: Tensor) -> Tensor:
    """Return the frames with values from `SOLARISE_FROM` on inverted (BYOL, arXiv 2006.07733)."""
    return torch.where(frames_BTHWC >= SOLARISE_FROM, 255 - frames_BTHWC, frames_BTHWC)


def flip(frames_BTHWC: Tensor, seeds_B: Tensor) -> Tensor:
    """Return the frames mirrored, left to right."""
    return frames_BTHWC.flip(3)


def _luminance(frames_BTHWC: Tensor) -> Tensor:
    return (frames_BTHWC * frames_BTHWC.new_tensor(LUMINANCE)).sum(-1, keepdim=True)
