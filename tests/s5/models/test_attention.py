from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from s5.config import AttentionConfig
from s5.models.attention import (
    OrthoformerAttention,
    PerformerAttention,
    SoftmaxAttention,
    favor_attention,
    favor_reference,
    orthogonal_features,
    orthogonal_prototypes,
    prototype_attention,
    softmax_attention,
)


def heads(length: int = 12, width: int = 4, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values (2, 3, length, width) in float64."""
    torch.manual_seed(seed)
    shape = (2, 3, length, width)
    return [(scale * torch.randn(shape, dtype=torch.float64)).requires_grad_() for _ in range(3)]


def values_and_gradients(attention: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = attention(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return (out, *torch.autograd.grad((out * weights).sum(), inputs))


def compare(fast: Callable[..., Tensor], slow: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    results = [values_and_gradients(attention, inputs) for attention in (fast, slow)]
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


# --- softmax --------------------------------------------------------------------------------------------------------


def test_plain_attention_equals_a_loop_over_queries() -> None:
    q, k, v = heads()
    out = softmax_attention(q, k, v)
    for i in range(q.shape[2]):
        scores = torch.stack([(q[:, :, i] * k[:, :, j]).sum(-1) for j in range(k.shape[2])], -1) / math.sqrt(4)
        torch.testing.assert_close(out[:, :, i], (scores.softmax(-1)[..., None] * v).sum(2))


def test_fused_layer_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    fused = SoftmaxAttention(AttentionConfig(heads=2), 8).double()
    plain = SoftmaxAttention(AttentionConfig(heads=2, implementation="plain"), 8).double()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    compare(fused, plain, [x])


def test_heads_do_not_mix_before_the_output() -> None:
    """A change of one head's queries changes the channels of that head alone."""
    layer = SoftmaxAttention(AttentionConfig(heads=2), 8)
    torch.nn.init.eye_(layer.output.weight)
    x = torch.randn(1, 5, 8)
    before = layer(x)
    with torch.no_grad():
        layer.qkv.weight[:4] *= 2
    changed = (layer(x) - before).abs().amax((0, 1)) > 1e-6
    assert changed.tolist() == [True] * 4 + [False] * 4


def test_heads_that_do_not_divide_the_width_are_named() -> None:
    with pytest.raises(ValueError, match=r"decoder.attention.heads is 3: give a divisor of 8"):
        SoftmaxAttention(AttentionConfig(heads=3), 8)
    with pytest.raises(ValueError, match=r"attention.heads is 0: give at least 1"):
        AttentionConfig(heads=0)
    with pytest.raises(ValueError, match=r"attention.implementation is 'flash': give one of fused, plain"):
        AttentionConfig(implementation="flash")  # type: ignore[arg-type]


# --- Performer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_favor_equals_its_kernel(scale: float) -> None:
    directions = orthogonal_features(10, 4).double()
    fast, slow = (partial(attention, w_ME=directions) for attention in (favor_attention, favor_reference))
    compare(fast, slow, heads(scale=scale))


def test_favor_approaches_softmax_attention_as_features_grow() -> None:
    """The error of a mean over features falls with the root of their number."""
    errors = []
    for features in (64, 1024, 16384):
        squares = []
        for seed in range(8):
            q, k, v = heads(scale=0.3, seed=seed)
            estimate = favor_attention(q, k, v, orthogonal_features(features, 4).double())
            squares.append((estimate - softmax_attention(q, k, v)).square().mean().item())
        errors.append(math.sqrt(sum(squares) / len(squares)))
    for larger, smaller in pairwise(errors):
        assert 3 < larger / smaller < 5.3  # sqrt(16) is 4


def test_features_are_orthogonal_in_blocks_and_normal() -> None:
    torch.manual_seed(0)
    directions = orthogonal_features(20, 8)
    assert directions.shape == (20, 8)
    for block in directions.split(8):
        products = torch.nn.functional.normalize(block, dim=1) @ torch.nn.functional.normalize(block, dim=1).T
        torch.testing.assert_close(products, torch.eye(len(block)), atol=1e-5, rtol=0)
    many = orthogonal_features(40_000, 8)
    torch.testing.assert_close(many.T @ many / len(many), torch.eye(8), atol=0.03, rtol=0)
    assert many.mean(0).abs().max() < 0.02


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_favor_neither_overflows_nor_divides_by_zero(scale: float) -> None:
    """Exponents of these lengths are beyond fp32 by far; each result stays an average of values."""
    inputs = [x.detach().float().requires_grad_() for x in heads(scale=scale)[:2]]
    v = heads()[2].detach().float()
    out = favor_attention(*inputs, v, orthogonal_features(16, 4))
    assert (out <= v.amax(2, keepdim=True) + 1e-5).all()
    assert (out >= v.amin(2, keepdim=True) - 1e-5).all()
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.square().sum(), inputs))


def test_favor_computes_in_fp32_under_autocast() -> None:
    q, k, v = (x.detach().bfloat16() for x in heads(length=40, scale=2))
    directions = orthogonal_features(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = favor_attention(q, k, v, directions)
    exact = favor_attention(q.double(), k.double(), v.double(), directions)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.bfloat16(), atol=1e-6, rtol=0.01)


def test_random_features_are_part_of_the_checkpoint() -> None:
    first, second = (PerformerAttention(AttentionConfig(heads=2, features=6), 8) for _ in range(2))
    x = torch.randn(2, 5, 8)
    assert not torch.equal(first.directions, second.directions)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    assert not first.directions.requires_grad


# --- Orthoformer ----------------------------------------------------------------------------------------------------


def slow_prototypes(candidates: Tensor, count: int) -> list[int]:
    """Algorithm 1 for one head, with all cosines at hand; the longest vector comes first."""
    cosines = torch.nn.functional.normalize(candidates, dim=1)
    cosines = (cosines @ cosines.T).abs()
    chosen = [int(candidates.norm(dim=1).argmax())]
    while len(chosen) < count:
        rest = [i for i in range(len(candidates)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: float(cosines[i, chosen].max())))
    return chosen


def slow_prototype_attention(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """The two softmax products, one sample and head at a time."""
    out = torch.zeros_like(v)
    for at in [(sample, head) for sample in range(q.shape[0]) for head in range(q.shape[1])]:
        candidates = torch.cat([q[at], k[at]]).detach()
        prototypes = candidates[slow_prototypes(candidates, count)]
        width = math.sqrt(q.shape[-1])
        first = (q[at] @ prototypes.T / width).softmax(-1)
        second = (prototypes @ k[at].T / width).softmax(-1)
        out = out.index_put(tuple(torch.tensor(i) for i in at), first @ second @ v[at])
    return out


def test_prototypes_are_chosen_greedily() -> None:
    q, k, _ = heads()
    chosen = orthogonal_prototypes(q, k, 9)
    assert chosen.shape == (2, 3, 9)
    for sample in range(2):
        for head in range(3):
            candidates = torch.cat([q[sample, head], k[sample, head]]).detach()
            assert chosen[sample, head].tolist() == slow_prototypes(candidates, 9)


def test_the_first_prototypes_are_orthogonal_where_the_tokens_are() -> None:
    """Among copies of the axes, of any sign, the first prototypes are one of each."""
    axes = torch.eye(4, dtype=torch.float64).repeat(3, 1) * torch.linspace(1, 2, 12)[:, None]
    q = axes.view(1, 1, 12, 4)
    chosen = orthogonal_prototypes(q, -q, 4)[0, 0]
    assert sorted((chosen % 12 % 4).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 3, 11])
def test_orthoformer_equals_the_two_softmax_products(count: int) -> None:
    compare(partial(prototype_attention, count=count), partial(slow_prototype_attention, count=count), heads(length=12))


@pytest.mark.parametrize("count", [12, 128])
def test_orthoformer_is_exact_attention_where_all_tokens_are_prototypes(count: int) -> None:
    compare(partial(prototype_attention, count=count), softmax_attention, heads(length=12))


def test_orthoformer_is_exact_for_long_queries_that_are_all_prototypes() -> None:
    """Copies of orthogonal queries: each is identified with one prototype, in the limit with that one alone."""
    _, k, v = (x.detach() for x in heads(length=8))
    k = 1 + 0.1 * k
    axes = torch.eye(4, dtype=torch.float64).repeat(2, 1).expand(2, 3, 8, 4)
    errors = [
        (prototype_attention(q, k, v, 4) - softmax_attention(q, k, v)).abs().max().item()
        for q in (3 * axes, 4 * axes, 9 * axes)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] > 1e-4
    assert errors[2] < 1e-12


def test_orthoformer_draws_no_random_numbers() -> None:
    layer = OrthoformerAttention(AttentionConfig(heads=2, prototypes=3), 8)
    x = torch.randn(2, 9, 8)
    state = torch.get_rng_state()
    first = layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, layer(x))


@pytest.mark.parametrize("kind", [SoftmaxAttention, PerformerAttention, OrthoformerAttention])
def test_attention_without_positions_is_blind_to_order(
    kind: type[SoftmaxAttention | PerformerAttention | OrthoformerAttention],
) -> None:
    layer = kind(AttentionConfig(heads=2, prototypes=3, features=6), 8).double()
    x, order = torch.randn(2, 9, 8, dtype=torch.float64), torch.randperm(9)
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]))
