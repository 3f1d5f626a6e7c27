from __future__ import annotations

import torch

from s5.tasks.augment import colour_jitter
from tests.s5.toys import batch


def test_colour_jitter_is_one_draw_a_clip_by_seed() -> None:
    frames, seeds = batch(0).long, torch.arange(4)
    jittered = colour_jitter(frames, seeds, "long/jitter", 0.4)
    halves = [colour_jitter(f, s, "long/jitter", 0.4) for f, s in zip(frames.split(2), seeds.split(2), strict=True)]
    torch.testing.assert_close(torch.cat(halves), jittered)
    assert not torch.equal(jittered, colour_jitter(frames, seeds, "short/jitter", 0.4))
    assert colour_jitter(frames, seeds, "long/jitter", 0) is frames
    still = frames[:, :1].expand(-1, 3, -1, -1, -1)
    moved = colour_jitter(still, seeds, "long/jitter", 0.4)
    torch.testing.assert_close(moved[:, 0], moved[:, 2])
