"""The selection learns what to keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from s5 import rng
from s5.config import DecoderConfig, SelectionConfig, SSMConfig
from s5.models.decoders import Pyramid


def needle_clips(seeds_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """64 tokens of noise, one of which is marked and carries the class; class and place follow from the seed."""
    batch = len(seeds_B)
    labels = (rng.uniform(seeds_B, "label") * 4).long()
    places = (rng.uniform(seeds_B, "place") * 64).long()
    x = gauss(seeds_B, 64, 16)
    x[torch.arange(batch), places] = 4 * nn.functional.one_hot(labels, 16).float()
    x[torch.arange(batch), places, 8] = 8.0
    return x, labels, places


def gauss(seeds_B: Tensor, *shape: int) -> Tensor:
    return torch.special.ndtri(rng.uniform(seeds_B, "gauss", *shape).clamp(1e-6, 1 - 1e-6))


@pytest.mark.slow
def test_selection_learns_to_keep_the_one_token_that_matters() -> None:
    torch.manual_seed(0)
    selection = SelectionConfig(keep_ratio=(4 / 64,), momentum=0.9)
    decoder = Pyramid(DecoderConfig(blocks=1, dropout=0.0, ssm=SSMConfig(state=8), selection=selection), 16)
    head = nn.Linear(decoder.out_width, 4)
    optimizer = torch.optim.Adam([p for p in (*decoder.parameters(), *head.parameters()) if p.requires_grad], lr=1e-2)

    def kept_share(seeds: Tensor) -> float:
        x, _, places = needle_clips(seeds)
        with torch.no_grad():
            kept = decoder.eval()(x).kept[0]
        return float((kept == places[:, None]).any(1).float().mean())

    held_out = torch.arange(1_000_000, 1_000_256)
    before = kept_share(held_out)
    for step in range(600):
        seeds = torch.arange(64 * step, 64 * step + 64)
        x, labels, _ = needle_clips(seeds)
        out = decoder.train()(x, seeds)
        loss = nn.functional.cross_entropy(head(out.features_BD), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decoder.update_momentum()
    after = kept_share(held_out)
    assert before < 0.2
    assert after > 0.5, (before, after, loss.item())  # chance is 1 in 16
