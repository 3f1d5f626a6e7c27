"""Augmentation of whole clips on the training device, by the seeds of the clips alone.

Shapes: B batch, T frames, H height, W width, C colours.
"""

from __future__ import annotations

from torch import Tensor

from s5 import rng

# Weights of red, green and blue in luminance (ITU-R BT.601).
LUMINANCE = (0.299, 0.587, 0.114)


def colour_jitter(frames_BTHWC: Tensor, seeds_B: Tensor, stream: str, strength: float) -> Tensor:
    """Scale brightness, contrast and saturation, each by a factor from 1 - strength to 1 + strength, one draw a clip.

    Args:
        frames_BTHWC: frames, 0 to 255, uint8 or float.
        seeds_B: one seed a clip.
        stream: name of the draw, so that the two clips of a pair differ.
        strength: 0 to 1; 0 returns the frames as they are.
    """
    if strength == 0:
        return frames_BTHWC
    draws_B3 = 1 + strength * (2 * rng.uniform(seeds_B, stream, 3) - 1)
    brightness, contrast, saturation = draws_B3.to(frames_BTHWC.device).view(-1, 3, 1, 1, 1, 1).unbind(1)
    frames = frames_BTHWC.float() * brightness
    grey = (frames * frames.new_tensor(LUMINANCE)).sum(-1, keepdim=True)
    # Saturation moves away from each pixel's grey, contrast from the clip's mean grey.
    frames = grey + (frames - grey) * saturation
    level = grey.mean(dim=(1, 2, 3), keepdim=True)
    return (level + (frames - level) * contrast).clamp(0, 255)
