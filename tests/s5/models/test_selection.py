from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from s5 import rng
from s5.config import SelectionConfig, SSMConfig
from s5.models.selection import MOMENTUM_S4, Selection, frame_spread, normalized_entropy
from s5.models.top_k import Estimator, gumbel, keep_count, select, select_reference
from s5.ssm.layers import SSMLayer, build_ssm
from tests.s5.toys import decided


def tokens(batch: int = 3, length: int = 20, width: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, length, width, dtype=dtype)


def online(width: int = 8) -> SSMLayer:
    torch.manual_seed(1)
    return build_ssm(SSMConfig(state=8), width).double()


@pytest.mark.parametrize("k", [1, 7, 20])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("estimator", ["own", "shared"])
def test_select_equals_the_one_hot_matrix(estimator: Estimator, k: int, temperature: float, noisy: bool) -> None:
    x = tokens().requires_grad_()
    logits = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(3, 20) if noisy else None
    fast, indices = select(x, logits, k, temperature, uniform, estimator)
    slow, expected = select_reference(x, logits, k, temperature, uniform, estimator)
    assert torch.equal(indices, expected)
    assert torch.equal(fast, x.gather(1, indices[..., None].expand(-1, -1, 8)))
    torch.testing.assert_close(fast, slow)
    weights = torch.randn_like(fast)
    grads_fast = torch.autograd.grad((fast * weights).sum(), [x, logits])
    grads_slow = torch.autograd.grad((slow * weights).sum(), [x, logits])
    for ours, reference in zip(grads_fast, grads_slow, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("estimator", ["own", "shared"])
def test_gradient_is_that_of_the_formula(estimator: Estimator) -> None:
    x, logits = tokens(1, 6, 4), torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(1, 6)
    picked, indices = select(x, logits, 2, 0.7, uniform, estimator)
    if estimator == "own":
        soft = (torch.sigmoid(logits / 0.7)[..., None] * x)[0, indices[0]][None]
    else:
        y = torch.softmax((torch.log_softmax(logits, 1) + gumbel(uniform)) / 0.7, dim=1)
        soft = (x * y[..., None]).sum(1, keepdim=True)
    formula = x[0, indices[0]][None] + (soft - soft.detach())
    weights = torch.randn_like(picked)
    (ours,) = torch.autograd.grad((picked * weights).sum(), logits)
    (expected,) = torch.autograd.grad((formula * weights).sum(), logits)
    torch.testing.assert_close(ours, expected)
    assert ours.abs().max() > 0


def test_frame_spread_is_1_at_random_and_0_for_equal_shares() -> None:
    keys = rng.uniform(torch.arange(4000), "order", 60)
    random = keys.argsort(1)[:, :20].sort(1).values
    assert abs(float(frame_spread(random, 60, 6).square().mean()) - 1) < 0.03
    torch.testing.assert_close(frame_spread(random, 60, 60), torch.ones(4000))
    equal = torch.arange(0, 60, 3)[None]
    assert float(frame_spread(equal, 60, 6)) < 0.5
    assert float(frame_spread(torch.arange(0, 60, 2)[None], 60, 6)) == 0
    assert float(frame_spread(torch.arange(20)[None], 60, 6)) > 2
    assert float(frame_spread(torch.arange(60)[None], 60, 6)) == float(frame_spread(equal, 60, 1)) == 1


@pytest.mark.parametrize("generator", ["random", "linear"])
def test_overlap_tells_a_random_selection_from_a_sure_one(generator: Literal["random", "linear"]) -> None:
    selection = Selection(SelectionConfig(generator=generator, features="backbone"), online()).double().train()
    x, seeds = tokens(200, 64), torch.arange(200)

    def mean_overlap() -> float:
        found = selection(x, x, 16, seeds, "noise")
        assert found.overlap_B is not None
        assert torch.equal(found.overlap_B, selection(x, x, 16, seeds, "noise").overlap_B)
        return float(found.overlap_B.mean())

    if generator == "random":
        assert abs(mean_overlap() - 0.25) < 0.02
        return
    assert isinstance(selection.generator, torch.nn.Linear)
    with torch.no_grad():
        selection.generator.weight.fill_(100.0)
    assert mean_overlap() > 0.95
    assert selection.eval()(x, x, 16, seeds, "noise").overlap_B is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_k_under_ties(dtype: torch.dtype) -> None:
    x = tokens(dtype=torch.float32).to(dtype)
    logits = torch.zeros(3, 20, dtype=dtype)
    logits[1, 10:] = 1
    picked, indices = select(x, logits, 5)
    assert picked.dtype == dtype
    assert indices[0].tolist() == [0, 1, 2, 3, 4]
    assert indices[1].tolist() == [10, 11, 12, 13, 14]


def test_gumbel_noise_draws_without_replacement_by_probability() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20_000, 4)
    uniform = rng.uniform(torch.arange(20_000), "gumbel", 4)
    _, first = select(torch.zeros(20_000, 4, 1), logits, 1, 1.0, uniform)
    share = torch.bincount(first.flatten(), minlength=4) / 20_000
    torch.testing.assert_close(share, logits[0].exp(), rtol=0, atol=0.02)
    _, pairs = select(torch.zeros(20_000, 4, 1), logits, 2, 1.0, uniform)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    # P(both 0 and 1) of successive draws without replacement.
    both = ((pairs == torch.tensor([0, 1])).all(1)).float().mean()
    assert abs(float(both) - (0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7)) < 0.02


def test_gumbel_is_finite_at_the_ends() -> None:
    assert torch.isfinite(gumbel(torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24]))).all()


def test_select_refuses_impossible_counts() -> None:
    for k in (0, 21):
        with pytest.raises(ValueError, match=f"k is {k}: give 1 to 20"):
            select(tokens(), torch.zeros(3, 20), k)


def test_keep_count() -> None:
    assert [keep_count(0.5, length) for length in (1, 2, 10, 3136)] == [1, 1, 5, 1568]
    assert keep_count(0.01, 10) == 1
    assert keep_count(1.0, 7) == 7


def test_normalized_entropy() -> None:
    uniform, certain = torch.zeros(2, 50), torch.zeros(2, 50)
    certain[:, 3] = 1e4
    assert float(normalized_entropy(uniform)) == pytest.approx(1)
    assert float(normalized_entropy(certain)) == pytest.approx(0)
    assert float(normalized_entropy(torch.cat([uniform, certain]))) == pytest.approx(0.5)
    assert float(normalized_entropy(torch.zeros(2, 1))) == 1
    assert not normalized_entropy(uniform.requires_grad_()).requires_grad


@pytest.mark.parametrize("form", ["convolution", "layer"])
def test_momentum_is_a_moving_average(form: Literal["convolution", "layer"]) -> None:
    layer = online()
    momentum = MOMENTUM_S4[form](layer, 0.9)
    averaged = momentum.averaged(layer)
    assert averaged is (layer.ssm if form == "convolution" else layer)
    assert not any(p.requires_grad for p in momentum.parameters())
    assert set(momentum.state_dict()) == {f"average.{name}" for name in averaged.state_dict()}
    before = {name: p.clone() for name, p in momentum.average.named_parameters()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    momentum.update(layer)
    for name, parameter in momentum.average.named_parameters():
        torch.testing.assert_close(parameter, 0.9 * before[name] + 0.1 * averaged.get_parameter(name).detach())
    momentum.reset(layer)
    for name, parameter in momentum.average.named_parameters():
        assert torch.equal(parameter, averaged.get_parameter(name))
    x = tokens().requires_grad_()
    assert not momentum(x).requires_grad
    torch.testing.assert_close(momentum(x), layer.convolve(x) if form == "convolution" else layer(x))


@pytest.mark.parametrize("form", ["convolution", "layer"])
def test_scores_are_those_of_the_momentum_features(form: Literal["convolution", "layer"]) -> None:
    """Values and gradient, without the features that the reference builds."""
    momentum = MOMENTUM_S4[form](online(), 0.9)
    x, weight, upstream = tokens(), torch.randn(8).double().requires_grad_(), torch.randn(3, 20).double()
    fast, slow = momentum.score(x, weight), momentum(x) @ weight
    torch.testing.assert_close(fast, slow)
    (by_features,) = torch.autograd.grad((slow * upstream).sum(), weight)
    torch.testing.assert_close(momentum.score_gradient(upstream, x), by_features)
    torch.testing.assert_close(torch.autograd.grad((fast * upstream).sum(), weight)[0], by_features)


@pytest.mark.parametrize(("features", "form"), [("s4", "convolution"), ("s4", "layer"), ("backbone", "convolution")])
@pytest.mark.parametrize("generator", ["linear", "transformer", "random"])
def test_generators(
    generator: Literal["linear", "transformer", "random"],
    features: Literal["s4", "backbone"],
    form: Literal["convolution", "layer"],
) -> None:
    torch.manual_seed(0)
    ssm = online()
    selection = decided(
        Selection(SelectionConfig(generator=generator, features=features, momentum_s4=form), ssm)
    ).double()
    x = tokens().requires_grad_()
    logits = selection.logits(x)
    assert logits.shape == (3, 20)
    if generator == "random":
        assert not logits.any()
    else:
        (grad,) = torch.autograd.grad(logits.square().sum(), x, allow_unused=True)
        assert grad is None
    selected = selection(x, x, 5, torch.arange(3), "noise")
    selected.tokens.square().sum().backward()
    for parameter in () if selection.generator is None else selection.generator.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    assert all(p.grad is None for p in ssm.parameters())
    assert (selection.momentum is not None) == (features == "s4" and generator != "random")


def test_all_tokens_are_alike_until_the_generator_has_learned() -> None:
    x = tokens()
    for generator in ("linear", "transformer"):
        selection = Selection(SelectionConfig(generator=generator), online()).double()  # type: ignore[arg-type]
        random = Selection(SelectionConfig(generator="random"), online()).double()
        seeds = torch.arange(3)
        assert not selection.logits(x).any()
        assert torch.equal(selection(x, x, 5, seeds, "noise").indices, random(x, x, 5, seeds, "noise").indices)


def test_evaluation_draws_as_training_does_or_keeps_the_highest_logits() -> None:
    selection = decided(Selection(SelectionConfig(), online())).double()
    x, seeds = tokens(), torch.arange(3)
    drawn = selection(x, x, 5, torch.zeros_like(seeds), "noise").indices
    selection.eval()
    for given in (seeds, None):
        assert torch.equal(selection(x, x, 5, given, "noise").indices, drawn)

    plain = Selection(SelectionConfig(noise="training"), online()).double()
    plain.load_state_dict(selection.state_dict())
    assert torch.equal(plain(x, x, 5, torch.zeros_like(seeds), "noise").indices, drawn)
    best = selection.logits(x).topk(5, dim=1).indices.sort(dim=1).values
    for given in (seeds, None):
        assert torch.equal(plain.eval()(x, x, 5, given, "noise").indices, best)
    assert not torch.equal(drawn, best)


def test_training_draws_by_seed() -> None:
    selection = Selection(SelectionConfig(), online()).double()
    x = tokens(1).expand(4, -1, -1)
    indices = selection(x, x, 5, torch.tensor([1, 1, 2, 3]), "noise").indices
    assert torch.equal(indices[0], indices[1])
    assert not torch.equal(indices[0], indices[2])
    assert not torch.equal(indices, selection(x, x, 5, torch.tensor([1, 1, 2, 3]), "other").indices)
    with pytest.raises(ValueError, match="seeds_B is None"):
        selection(x, x, 5, None, "noise")


def test_random_selection_is_random_and_repeatable_in_evaluation() -> None:
    selection = Selection(SelectionConfig(generator="random"), online()).eval()
    x = tokens()
    unseeded = selection(x, x, 5, None, "noise").indices
    assert unseeded[0].tolist() != [0, 1, 2, 3, 4]
    assert torch.equal(unseeded, selection(x, x, 5, None, "noise").indices)
    assert torch.equal(unseeded, selection(x, x, 5, torch.arange(5, 8), "noise").indices)


def test_temperature_schedule() -> None:
    selection = Selection(SelectionConfig(temperature=4.0, temperature_end=0.25), online())
    for progress, expected in ((0.0, 4.0), (0.5, 1.0), (1.0, 0.25)):
        selection.set_progress(progress)
        assert float(selection.temperature) == pytest.approx(expected)
    assert "temperature" not in selection.state_dict()
    with pytest.raises(ValueError, match=r"progress is 1\.5"):
        selection.set_progress(1.5)


def test_none_is_no_selection() -> None:
    with pytest.raises(ValueError, match=r"selection\.generator is 'none'"):
        Selection(SelectionConfig(generator="none"), online())


def test_bf16_autocast_compares_logits_in_fp32() -> None:
    torch.manual_seed(0)
    for settings in ({}, {"features": "s4"}, {"features": "s4", "momentum_s4": "layer"}):
        selection = Selection(SelectionConfig(**settings), build_ssm(SSMConfig(state=8), 8))  # type: ignore[arg-type]
        x = tokens(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = selection.logits(x)
            selected = selection(x.bfloat16(), x.bfloat16(), 5, torch.arange(3), "noise")
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, selection.logits(x))
        assert selected.tokens.dtype == torch.bfloat16
        assert selected.entropy.dtype == torch.float32
