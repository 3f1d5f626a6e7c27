from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s5.models import merging
from s5.models.merging import Merging, merge, merge_reference


def inputs(length: int = 20, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, saliencies and noise of three samples, in float64."""
    generator = torch.Generator().manual_seed(0)
    tokens, logits = (torch.randn(3, length, *rest, generator=generator).double() for rest in ((width,), ()))
    return tokens.requires_grad_(), logits.requires_grad_(), torch.rand(3, length, generator=generator).double()


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("similarities", [1, 40, 2**24])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_merge_equals_the_slow_loop(k: int, similarities: int, noisy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, positions and gradients, however the search is cut into chunks."""
    monkeypatch.setattr(merging, "_SIMILARITIES", similarities)
    tokens, logits, uniform = inputs()
    noise = uniform if noisy else None
    merged, positions = merge(tokens, logits, k, noise)
    expected, targets = merge_reference(tokens, logits, k, noise)
    assert torch.equal(positions, targets)
    torch.testing.assert_close(merged, expected)
    weights = torch.randn(merged.shape, generator=torch.Generator().manual_seed(1)).double()
    fast = torch.autograd.grad((merged * weights).sum(), (tokens, logits))
    slow = torch.autograd.grad((expected * weights).sum(), (tokens, logits), allow_unused=True)
    torch.testing.assert_close(fast[0], slow[0])
    torch.testing.assert_close(fast[1], slow[1] if slow[1] is not None else torch.zeros_like(logits))


def test_weights_of_a_merged_token_sum_to_one() -> None:
    """A channel that is one in every token stays one; identical tokens merge to that token."""
    tokens, logits, uniform = inputs()
    ones = torch.cat([tokens, torch.ones_like(tokens[..., :1])], dim=2)
    torch.testing.assert_close(merge(ones, logits, 4, uniform)[0][..., -1], torch.ones(3, 4).double())
    same = tokens[:, :1].expand_as(tokens)
    torch.testing.assert_close(merge(same, logits, 4)[0], same[:, :4])


def test_merging_into_all_tokens_changes_nothing() -> None:
    tokens, logits, uniform = inputs()
    merged, positions = merge(tokens, logits, 20, uniform)
    assert torch.equal(merged, tokens)
    assert torch.equal(positions, torch.arange(20).expand(3, -1))


def test_the_most_salient_tokens_are_targets_and_weigh_the_most() -> None:
    """Two groups of one direction each: the merged token is close to the more salient member, in order of time."""
    tokens = torch.tensor([[[1.0, 0], [0, 1], [3, 0], [0, 5]]]).double()
    logits = torch.tensor([[0.0, 1, 2, 0]]).double()
    merged, positions = merge(tokens, logits, 2)
    assert positions.tolist() == [[1, 2]]
    share = torch.sigmoid(torch.tensor(2.0)).item(), torch.sigmoid(torch.tensor(1.0)).item()
    expected = [[0, share[1] * 1 + (1 - share[1]) * 5], [share[0] * 3 + (1 - share[0]) * 1, 0]]
    torch.testing.assert_close(merged[0], torch.tensor(expected).double())


def test_saliencies_of_any_size_are_finite() -> None:
    tokens, logits, _ = inputs()
    scaled = (logits.detach() * 1e4).float().requires_grad_()
    merged, _ = merge(tokens.detach().float(), scaled, 5)
    assert torch.isfinite(merged).all()
    assert torch.isfinite(torch.autograd.grad(merged.sum(), scaled)[0]).all()


def test_a_count_out_of_range_is_named() -> None:
    tokens, logits, _ = inputs()
    with pytest.raises(ValueError, match=r"k is 21: give 1 to 20, the number of tokens"):
        merge(tokens, logits, 21)


def test_saliency_learns_and_noise_is_the_samples() -> None:
    torch.manual_seed(0)
    layer, tokens, seeds = Merging(6), inputs()[0].detach().float(), torch.arange(3)
    first = layer(tokens, tokens, 5, seeds, "noise")
    assert not torch.equal(first.indices, layer(tokens, tokens, 5, seeds + 3, "noise").indices)
    alone = layer(tokens[1:2], tokens[1:2], 5, seeds[1:2], "noise")
    assert torch.equal(alone.indices, first.indices[1:2])
    first.tokens.square().sum().backward()
    assert layer.saliency.weight.grad is not None
    assert layer.saliency.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="seeds_B is None"):
        layer(tokens, tokens, 5, None, "noise")
    layer.eval()
    assert torch.equal(layer(tokens, tokens, 5, None, "noise").tokens, layer(tokens, tokens, 5, seeds, "noise").tokens)
