"""Random views of clips against loops over clips and frames, of Pillow where it defines a change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from s5 import rng
from s5.config import ViewsConfig
from s5.tasks import augment as module
from s5.tasks.augment import augment, colour_jitter
from tests.s5.toys import batch

MOCO = ViewsConfig(flip=0.5, jitter=0.4, jitter_share=0.8, grey=0.2, blur=(1.0, 0.1), solarise=(0.0, 0.2))
SEEDS = torch.arange(4)


def smooth(clips: int = 3, frames: int = 2, width: int = 224) -> Tensor:
    """Random uint8 clips (B, T, H, W, C) of large blots."""
    small = torch.rand(clips * frames, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(small, (width // 2, width), mode="bicubic").clamp(0, 1) * 255
    return large.permute(0, 2, 3, 1).unflatten(0, (clips, frames)).to(torch.uint8)


def by_pillow(clips: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Change frame by frame."""
    frames = [np.asarray(change(Image.fromarray(frame.numpy())).convert("RGB")) for frame in clips.flatten(0, 1)]
    return torch.from_numpy(np.stack(frames)).view(clips.shape)


def test_grey_solarise_and_flip_are_pillows() -> None:
    clips = torch.randint(0, 256, (2, 3, 8, 12, 3), dtype=torch.uint8)
    seeds = torch.arange(2)
    for settings, change, error in (
        ({"grey": 1.0}, ImageOps.grayscale, 1.0),
        ({"solarise": (1.0, 1.0)}, ImageOps.solarize, 0.0),
        ({"flip": 1.0}, ImageOps.mirror, 0.0),
    ):
        found = augment(clips, seeds, "long", ViewsConfig(**settings))  # type: ignore[arg-type]
        torch.testing.assert_close(found.float(), by_pillow(clips, change).float(), atol=error, rtol=0)


@pytest.mark.parametrize("width", [224, 64, 12])
def test_a_blur_is_a_gaussian_with_the_sigma_of_the_clip(width: int) -> None:
    clips, seeds = smooth(width=width), torch.arange(3)
    found = augment(clips, seeds, "short", ViewsConfig(blur=(0.0, 1.0)))
    sigmas = (0.1 + 1.9 * rng.uniform(seeds, "short/blur", 1)[:, 0]) * width / 224
    assert len(set(sigmas.tolist())) == 3
    for clip, seen, sigma in zip(clips, found, sigmas.tolist(), strict=True):
        right = clip.numpy().astype(float)
        for axis in (1, 2):
            right = np.apply_along_axis(blurred, axis, right, sigma)
        np.testing.assert_allclose(seen.numpy(), right, atol=0.5)
        pillow = by_pillow(clip[None], lambda frame, s=sigma: frame.filter(ImageFilter.GaussianBlur(s)))[0]  # type: ignore[misc]
        assert float((seen - pillow).abs().max()) < 3


def blurred(row: np.ndarray, sigma: float) -> np.ndarray:
    """Blur one row of pixels; those beyond its ends are those at its ends."""
    at = np.arange(-12, 13)
    weights = np.exp(-0.5 * (at / sigma) ** 2)
    return np.convolve(np.pad(row, 12, "edge"), weights / weights.sum(), "valid")


def slow_jitter(clip: Tensor, seed: Tensor, stream: str, strength: float) -> Tensor:
    """Frame by frame and pixel by pixel: brightness, then saturation about each pixel's grey, then contrast."""
    brightness, contrast, saturation = (1 + strength * (2 * rng.uniform(seed[None], stream, 3)[0] - 1)).tolist()
    weights = torch.tensor([0.299, 0.587, 0.114])
    level = torch.stack([(frame.float() * weights).sum(-1).mean() for frame in clip]).mean() * brightness
    frames = []
    for frame in clip.float():
        grey = (frame * weights).sum(-1, keepdim=True)
        coloured = (grey + (frame - grey) * saturation) * brightness
        frames.append((level + (coloured - level) * contrast).clamp(0, 255) if frame.any() else frame)
    return torch.stack(frames)


def slow(clips: Tensor, seeds: Tensor, view: Literal["long", "short"], config: ViewsConfig) -> Tensor:
    """Clip by clip: jitter, grey, blur, solarise and flip, each if the clip's own draw says so."""
    place, rows = int(view == "short"), []
    for clip, seed in zip(clips, seeds, strict=True):

        def drawn(name: str, share: float, seed: Tensor = seed) -> bool:
            return float(rng.uniform(seed[None], f"{view}/{name}/share", 1)) < share

        if config.jitter and drawn("jitter", config.jitter_share):
            clip = slow_jitter(clip, seed, f"{view}/jitter", config.jitter)
        if drawn("grey", config.grey):
            clip = (clip.float() @ torch.tensor([0.299, 0.587, 0.114]))[..., None].expand(clip.shape)
        if drawn("blur", config.blur[place]):
            clip = module.blur(clip[None], seed[None], f"{view}/blur")[0]
        if drawn("solarise", config.solarise[place]):
            clip = torch.stack([torch.where(frame >= 128, 255 - frame, frame) for frame in clip])
        if drawn("flip", config.flip):
            clip = torch.stack([frame[:, range(frame.shape[1] - 1, -1, -1)] for frame in clip])
        rows.append(clip.float())
    return torch.stack(rows)


@pytest.mark.parametrize("view", ["long", "short"])
@pytest.mark.parametrize(
    "config",
    [MOCO, ViewsConfig(flip=0.5), ViewsConfig(jitter=0.4), ViewsConfig(grey=0.5, solarise=(0.5, 0.5)), ViewsConfig()],
)
def test_views_are_those_of_the_slow_loop(view: Any, config: ViewsConfig) -> None:
    seeds = torch.arange(16)
    clips = smooth(16, 3, 24)
    clips[1, 1:] = 0
    found = augment(clips, seeds, view, config)
    torch.testing.assert_close(found.float(), slow(clips, seeds, view, config), atol=1e-2, rtol=0)
    # Whatever else is in the batch, and in half precision around it.
    parts = [augment(c, s, view, config) for c, s in zip(clips.split(5), seeds.split(5), strict=True)]
    torch.testing.assert_close(torch.cat([part.float() for part in parts]), found.float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(augment(clips, seeds, view, config), found)


def test_black_frames_stay_black() -> None:
    clips = smooth(4, 3, 24)
    clips[:, 2] = 0
    found = augment(clips, SEEDS, "long", MOCO)
    assert bool((found[:, 2] == 0).all())
    assert bool((found[:, :2] > 0).any())


def test_all_frames_of_a_clip_share_a_draw_and_the_clips_of_a_pair_do_not() -> None:
    config = replace(MOCO, blur=(0.5, 0.5), solarise=(0.5, 0.5))
    still = smooth(16, 1, 24).expand(-1, 3, -1, -1, -1)
    seeds = torch.arange(16)
    long, short = (augment(still, seeds, view, config) for view in ("long", "short"))  # type: ignore[arg-type]
    for frames in (long, short):
        torch.testing.assert_close(frames[:, 0], frames[:, 2])
    assert all(not torch.equal(a, b) for a, b in zip(long, short, strict=True))


def test_as_many_clips_change_as_the_shares_say() -> None:
    seeds, clips = torch.arange(4000), torch.tensor([[200.0, 10, 90], [10, 180, 250]]).view(1, 1, 1, 2, 3)
    clips = clips.expand(4000, 1, 2, 2, 3)
    for view, place in (("long", 0), ("short", 1)):
        for settings, share in (
            ({"flip": 0.5}, 0.5),
            ({"grey": 0.2}, 0.2),
            ({"jitter": 0.4, "jitter_share": 0.8}, 0.8),
            ({"solarise": (0.3, 0.1)}, (0.3, 0.1)[place]),
        ):
            found = augment(clips, seeds, view, ViewsConfig(**settings))  # type: ignore[arg-type]
            changed = (found != clips).flatten(1).any(1).float()
            assert float(changed.mean()) == pytest.approx(share, abs=0.03)


def test_what_is_off_leaves_frames_as_they_are() -> None:
    clips = batch(0).long
    assert augment(clips, SEEDS, "long", ViewsConfig()) is clips
    flipped = augment(clips, SEEDS, "long", ViewsConfig(flip=0.5, solarise=(0.5, 0.0)))
    assert flipped.dtype == torch.uint8
    assert torch.equal(clips, batch(0).long)


def test_colour_jitter_is_one_draw_a_clip_by_seed() -> None:
    frames = batch(0).long
    jittered = colour_jitter(frames, SEEDS, "long/jitter", 0.4)
    halves = [colour_jitter(f, s, "long/jitter", 0.4) for f, s in zip(frames.split(2), SEEDS.split(2), strict=True)]
    torch.testing.assert_close(torch.cat(halves), jittered)
    assert not torch.equal(jittered, colour_jitter(frames, SEEDS, "short/jitter", 0.4))
