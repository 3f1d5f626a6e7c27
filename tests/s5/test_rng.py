from __future__ import annotations

import pytest
import torch

from s5 import rng

SEEDS = torch.arange(8, dtype=torch.int64)


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


def test_uniform_is_uniform() -> None:
    drawn = rng.uniform(SEEDS, "gumbel", 50_000).double()
    assert drawn.shape == (8, 50_000)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    # Five standard deviations of the mean and of the variance of each row.
    assert (drawn.mean(1) - 0.5).abs().max() < 5 * (1 / 12 / 50_000) ** 0.5
    assert (drawn.var(1) - 1 / 12).abs().max() < 5 * (1 / 180 / 50_000) ** 0.5
    # Chi-square of 100 bins: mean 99, standard deviation 14.
    for row in drawn:
        bins = torch.histc(row, 100, 0, 1)
        assert ((bins - 500) ** 2 / 500).sum() < 99 + 5 * 14


def test_every_bit_is_fair() -> None:
    words = (rng.uniform(SEEDS, "bits", 50_000) * 2**24).long()
    for bit in range(24):
        assert abs(float((words >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / 400_000**0.5


def test_neighbours_are_independent() -> None:
    limit = 5 / 20_000**0.5
    drawn = rng.uniform(SEEDS, "gumbel", 20_000)
    other = rng.uniform(SEEDS, "dropout", 20_000)
    for row in range(7):
        assert abs(correlation(drawn[row], drawn[row + 1])) < limit
        assert abs(correlation(drawn[row], other[row])) < limit
    for lag in (1, 2, 3, 64):
        assert abs(correlation(drawn[0, lag:], drawn[0, :-lag])) < limit
    across = rng.uniform(torch.arange(20_000), "gumbel", 2)
    assert abs(correlation(across[1:, 0], across[:-1, 0])) < limit
    assert abs(correlation(across[:, 0], across[:, 1])) < limit


def test_a_number_depends_on_its_own_sample_only() -> None:
    torch.manual_seed(0)
    whole = rng.uniform(SEEDS, "gumbel", 4, 5)
    torch.manual_seed(1)
    assert torch.equal(rng.uniform(SEEDS[3:5], "gumbel", 4, 5), whole[3:5])
    assert torch.equal(rng.uniform(SEEDS, "gumbel", 7), whole.flatten(1)[:, :7])


def test_fold_makes_new_seeds() -> None:
    seeds = torch.arange(1000)
    derived = torch.cat([seeds, *(rng.fold(seeds, stream) for stream in ("long", "short", 0, 1, "1"))])
    assert derived.unique().numel() == derived.numel()
    assert torch.equal(rng.fold(seeds, "long"), rng.fold(seeds, "long"))


def test_golden_values() -> None:
    # Checkpoints resume with the noise of the run that wrote them: these numbers never change.
    seeds = torch.tensor([0, -1, 2**62])
    assert rng.fold(seeds, "golden").tolist() == [-1544669190585719174, -5295715919658197237, -6988208886409480724]
    assert (rng.uniform(seeds, "golden", 2) * 2**24).long().tolist() == [
        [3273442, 15365457],
        [2129552, 15893836],
        [164109, 13185543],
    ]


def test_mixer_is_splitmix64() -> None:
    # First outputs of the published generator for seed 1234567.
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        outputs.append(int(rng._mix(torch.tensor([rng._signed(state)]))[0]) % 2**64)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_fresh_seeds_follow_torch() -> None:
    torch.manual_seed(3)
    first = rng.fresh_seeds(4, "cpu")
    assert first.dtype == torch.int64
    assert not torch.equal(first, rng.fresh_seeds(4, "cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, rng.fresh_seeds(4, "cpu"))


def test_seeds_must_be_integers() -> None:
    with pytest.raises(ValueError, match=r"float32.*int64"):
        rng.fold(torch.zeros(2), "gumbel")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree() -> None:
    on_gpu = rng.uniform(SEEDS.cuda(), "gumbel", 1000)
    assert torch.equal(on_gpu.cpu(), rng.uniform(SEEDS, "gumbel", 1000))
