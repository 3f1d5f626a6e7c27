"""The fused front of a block equals its parts, in values and gradients, and keeps nothing but its input."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from s5.config import SelectionConfig, SSMConfig
from s5.models.fused import normed_convolution, selective_convolution
from s5.models.selection import Selection
from s5.models.top_k import Estimator
from s5.ssm.convolution import convolve_score
from s5.ssm.layers import LinearSSM, build_ssm
from tests.s5.toys import decided

WIDTH = 6


def parts(
    kind: Literal["s4d", "s4"] = "s4d",
    features: Literal["s4", "backbone"] = "s4",
    bidirectional: bool = False,
    estimator: Estimator = "own",
    momentum_s4: Literal["convolution", "layer"] = "convolution",
    noise: Literal["always", "training"] = "always",
) -> tuple[nn.LayerNorm, LinearSSM, Selection]:
    """A norm, a state space and a selection in float64, whose momentum S4 is not the online one."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    config = SSMConfig(kind=kind, state=8, bidirectional=bidirectional)
    settings = SelectionConfig(
        features=features, temperature=0.7, estimator=estimator, momentum_s4=momentum_s4, noise=noise
    )
    selection = decided(Selection(settings, build_ssm(config, WIDTH)))
    return norm.double(), build_ssm(config, WIDTH).ssm.double(), selection.double()


def tokens(batch: int = 3, length: int = 20) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, requires_grad=True)


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    loss = sum((out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() for out in outputs)
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("length", [1, 2, 20, 101])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["s4d", "s4"])
def test_normed_convolution(kind: Literal["s4d", "s4"], bidirectional: bool, length: int) -> None:
    norm, ssm, _ = parts(kind, bidirectional=bidirectional)
    x = tokens(length=length)
    fast, slow = normed_convolution(x, norm, ssm), ssm.convolve(norm(x))
    torch.testing.assert_close(fast, slow)
    inputs = [x, *norm.parameters(), *ssm.parameters()]
    for ours, reference in zip(gradients([fast], inputs), gradients([slow], inputs), strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("k", [1, 9, 20])
@pytest.mark.parametrize(("training", "noise"), [(True, "always"), (False, "always"), (False, "training")])
@pytest.mark.parametrize(
    ("features", "momentum_s4"), [("s4", "convolution"), ("s4", "layer"), ("backbone", "convolution")]
)
@pytest.mark.parametrize("kind", ["s4d", "s4"])
@pytest.mark.parametrize("estimator", ["own", "shared"])
def test_selective_convolution(
    momentum_s4: Literal["convolution", "layer"],
    estimator: Estimator,
    kind: Literal["s4d", "s4"],
    features: Literal["s4", "backbone"],
    training: bool,
    noise: Literal["always", "training"],
    k: int,
) -> None:
    norm, ssm, selection = parts(kind, features, estimator=estimator, momentum_s4=momentum_s4, noise=noise)
    selection.train(training)
    x, seeds = tokens(), torch.arange(3)
    selected, y = selective_convolution(x, norm, ssm, selection, k, seeds, "noise")
    expected = selection(x, norm(x), k, seeds, "noise")
    expected_y = ssm.convolve(norm(expected.tokens))
    assert torch.equal(selected.indices, expected.indices)
    assert torch.equal(selected.tokens, expected.tokens)
    torch.testing.assert_close(selected.entropy, expected.entropy)
    torch.testing.assert_close(selected.overlap_B, expected.overlap_B)
    assert (selected.overlap_B is not None) == training
    torch.testing.assert_close(y, expected_y)
    assert selection.generator is not None
    inputs = [x, *norm.parameters(), *ssm.parameters(), *selection.generator.parameters()]
    fast, slow = gradients([selected.tokens, y], inputs), gradients([expected.tokens, expected_y], inputs)
    for ours, reference in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, reference)
    assert fast[-1].abs().max() > 0 or (k == 20 and estimator == "shared")


@pytest.mark.parametrize("length", [1, 2, 33, 64])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_momentum_scores_are_those_of_its_features(bidirectional: bool, length: int) -> None:
    _, _, selection = parts(bidirectional=bidirectional)
    momentum, x = selection.momentum, tokens(length=length).detach()
    assert momentum is not None
    weight = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)
    fast, slow = momentum.score(x, weight), momentum(x) @ weight
    torch.testing.assert_close(fast, slow)
    grad = torch.randn_like(fast)
    (expected,) = torch.autograd.grad(slow, weight, grad)
    torch.testing.assert_close(torch.autograd.grad(fast, weight, grad)[0], expected)
    torch.testing.assert_close(momentum.score_gradient(grad, x), expected)


def test_score_over_several_tiles() -> None:
    torch.manual_seed(0)
    x, kernel = torch.randn(3, 4100, 70, dtype=torch.float64), torch.randn(70, 4100, dtype=torch.float64)
    weight = torch.randn(70, dtype=torch.float64, requires_grad=True)
    whole = convolve_score(x, kernel, 8400, weight)
    apart = sum(convolve_score(x[..., i : i + 1], kernel[i : i + 1], 8400, weight[i : i + 1]) for i in range(70))
    torch.testing.assert_close(whole, apart)
    assert isinstance(apart, Tensor)
    grad = torch.randn_like(whole)
    torch.testing.assert_close(*(torch.autograd.grad(out, weight, grad)[0] for out in (whole, apart)))


def saved_bytes(output: Tensor) -> int:
    """Bytes of the distinct storages that the graph behind an output keeps, parameters apart."""
    storages: dict[int, int] = {}
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        for value in getattr(node, "saved_tensors", ()):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


def test_only_the_input_is_kept() -> None:
    norm, ssm, selection = parts()
    x = tokens(batch=64, length=200)
    inputs = x.numel() * x.element_size()
    _, y = selective_convolution(x, norm, ssm, selection, 100, torch.arange(64), "noise")
    assert inputs <= saved_bytes(y) < 1.6 * inputs  # scores and indices are (B, L), and D is only 6 here
    assert inputs <= saved_bytes(normed_convolution(x, norm, ssm)) < 1.1 * inputs


def test_only_the_linear_generator_is_fused() -> None:
    norm, ssm, _ = parts()
    selection = Selection(SelectionConfig(generator="transformer"), build_ssm(SSMConfig(state=8), WIDTH)).double()
    with pytest.raises(ValueError, match=r"selection\.generator is 'transformer': only the linear one"):
        selective_convolution(tokens(), norm, ssm, selection, 5, None, "")
    with pytest.raises(ValueError, match="k is 21: give 1 to 20"):
        selective_convolution(tokens(), norm, ssm, parts()[2], 21, None, "")


def test_operators_fit_torch() -> None:
    x, kernel = torch.randn(2, 5, 3), torch.randn(3, 5)
    weight = torch.randn(3, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.s5.convolve_score.default, (x, kernel, 16, weight), test_utils=checks)
    log_A = torch.complex(-torch.rand(3, 4), torch.randn(3, 4)).requires_grad_()
    weights = torch.randn(3, 4, dtype=torch.complex64, requires_grad=True)
    torch.library.opcheck(torch.ops.s5.vandermonde.default, (log_A, weights, 10), test_utils=checks)
