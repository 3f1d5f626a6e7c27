from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from s5.config import SSMConfig
from s5.ssm.convolution import fft_conv, fft_conv_reference, good_fft_size
from s5.ssm.hippo import diagonal_eigenvalues
from s5.ssm.kernels import (
    discretize_dplr,
    dplr_kernel,
    real_output,
    s4_kernel_reference,
    s4d_kernel_reference,
    truncated_output,
)
from s5.ssm.layers import SSMLayer, build_ssm, hippo_legs, nplr_legs, s4_kernel, s4d_kernel

LENGTHS = (1, 2, 3, 31, 64, 101)
KINDS: tuple[Literal["s4d", "s4"], ...] = ("s4d", "s4")


def system(channels: int = 3, pairs: int = 4) -> dict[str, Tensor]:
    """Random parameters, float64, that take gradients."""
    torch.manual_seed(0)
    shape = (channels, pairs)
    parameters = {
        "dt": torch.rand(channels, dtype=torch.float64) * 0.3 + 0.01,
        "A": torch.complex(-torch.rand(shape, dtype=torch.float64) - 0.1, 5 * torch.randn(shape, dtype=torch.float64)),
        "P": torch.randn(shape, dtype=torch.complex128),
        "B": torch.randn(shape, dtype=torch.complex128),
        "C": torch.randn(shape, dtype=torch.complex128),
    }
    return {name: value.requires_grad_() for name, value in parameters.items()}


def dense_kernel(state_matrix: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, rule: str) -> Tensor:
    """Kernel by stepping the discretised dense complex system (H, 2N, 2N), both members of each pair."""
    eye = torch.eye(state_matrix.shape[1], dtype=state_matrix.dtype)
    step = dt[:, None, None] * state_matrix
    if rule == "bilinear":
        inverse = torch.linalg.inv(eye - step / 2)
        A_bar, B_bar = inverse @ (eye + step / 2), dt[:, None] * (inverse @ B[..., None])[..., 0]
    else:
        A_bar = torch.linalg.matrix_exp(step)
        B_bar = torch.linalg.solve(state_matrix, ((A_bar - eye) @ B[..., None]))[..., 0]
    taps, hidden = [], B_bar
    for _ in range(length):
        taps.append((C * hidden).sum(1))
        hidden = (A_bar @ hidden[..., None])[..., 0]
    kernel = torch.stack(taps, dim=1)
    assert kernel.imag.abs().max() < 1e-9
    return kernel.real


def both(values: Tensor) -> Tensor:
    return torch.cat([values, values.conj()], dim=-1)


def assert_same_gradients(
    fast: Callable[[], Tensor], slow: Callable[[], Tensor], inputs: list[Tensor], tolerance: float = 1e-9
) -> None:
    """Values and gradients of both functions agree, the latter for a random weighting of the output."""
    first, second = fast(), slow()
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(first)
    grads_fast = torch.autograd.grad((first * weights).sum(), inputs)
    grads_slow = torch.autograd.grad((second * weights).sum(), inputs)
    for grad_fast, grad_slow in zip(grads_fast, grads_slow, strict=True):
        scale = max(1.0, float(grad_slow.abs().max()))
        torch.testing.assert_close(grad_fast, grad_slow, rtol=tolerance, atol=tolerance * scale)


def test_hippo_is_the_published_matrix() -> None:
    A, B = hippo_legs(5)
    for n in range(5):
        assert B[n] == pytest.approx((2 * n + 1) ** 0.5)
        for k in range(5):
            expected = -((2 * n + 1) ** 0.5) * (2 * k + 1) ** 0.5 if n > k else -(n + 1) if n == k else 0
            assert A[n, k] == pytest.approx(expected)


@pytest.mark.parametrize("state", [2, 8, 64])
def test_nplr_is_hippo(state: int) -> None:
    A, B = hippo_legs(state)
    eigenvalues, P, B_diagonal, V = nplr_legs(state)
    V, P, B_diagonal = both(V), both(P), both(B_diagonal)
    complex_A = V @ (torch.diag(both(eigenvalues)) - torch.outer(P, P.conj())) @ V.mH
    torch.testing.assert_close(complex_A, A.to(torch.complex128), rtol=1e-9, atol=1e-9 * state**2)
    torch.testing.assert_close(V @ B_diagonal, B.to(torch.complex128))
    torch.testing.assert_close(V.mH @ V, torch.eye(state, dtype=torch.complex128))
    assert (eigenvalues.imag > 0).all()
    assert torch.equal(eigenvalues.real, torch.full((state // 2,), -0.5, dtype=torch.float64))


def test_diagonal_initialisations() -> None:
    pi = torch.pi
    assert torch.equal(diagonal_eigenvalues("legs", 64), nplr_legs(64)[0])
    torch.testing.assert_close(diagonal_eigenvalues("lin", 6).imag, torch.tensor([0, pi, 2 * pi], dtype=torch.float64))
    expected = torch.tensor([6 / pi * 5, 6 / pi, 6 / pi * 0.2], dtype=torch.float64)
    torch.testing.assert_close(diagonal_eigenvalues("inv", 6).imag, expected)
    with pytest.raises(ValueError, match="state is 3"):
        diagonal_eigenvalues("lin", 3)
    with pytest.raises(ValueError, match="state is 0"):
        nplr_legs(0)
    with pytest.raises(ValueError, match="state is 0"):
        hippo_legs(0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_s4d_kernel(length: int, rule: Literal["zoh", "bilinear"]) -> None:
    p = system()
    inputs = [p[name] for name in ("dt", "A", "B", "C")]

    def fast() -> Tensor:
        return s4d_kernel(*inputs, length, discretization=rule)

    def slow() -> Tensor:
        return s4d_kernel_reference(*inputs, length, discretization=rule)

    def dense() -> Tensor:
        return dense_kernel(torch.diag_embed(both(p["A"])), both(p["B"]), both(p["C"]), p["dt"], length, rule)

    assert_same_gradients(fast, slow, inputs)
    assert_same_gradients(fast, dense, inputs)
    with torch.no_grad():
        torch.testing.assert_close(fast(), slow())


@pytest.mark.parametrize("length", LENGTHS)
def test_dplr_kernel(length: int) -> None:
    p = system()
    inputs = [p[name] for name in ("dt", "A", "P", "B", "C")]

    def fast() -> Tensor:
        return dplr_kernel(*inputs, length)

    def cauchy() -> Tensor:
        C_tilde = truncated_output(p["dt"], p["A"], p["P"], p["C"], length)
        return s4_kernel_reference(p["dt"], p["A"], p["P"], p["B"], C_tilde, length)

    def dense() -> Tensor:
        P = both(p["P"])
        matrix = torch.diag_embed(both(p["A"])) - P[..., None] * P[:, None].conj()
        return dense_kernel(matrix, both(p["B"]), both(p["C"]), p["dt"], length, "bilinear")

    assert_same_gradients(fast, cauchy, inputs)
    assert_same_gradients(fast, dense, inputs)
    with torch.no_grad():
        torch.testing.assert_close(fast(), dense())


@pytest.mark.parametrize("length", LENGTHS)
def test_s4_kernel_is_the_paper_s_algorithm(length: int) -> None:
    """The parameter is C~ = C (I - Abar^L); gradients flow to it too."""
    p = system()
    inputs = [p[name] for name in ("dt", "A", "P", "B")]
    C_tilde = truncated_output(*(p[name] for name in ("dt", "A", "P", "C")), length).detach().requires_grad_()
    inputs.append(C_tilde)
    assert_same_gradients(
        lambda: s4_kernel(*inputs, length), lambda: s4_kernel_reference(*inputs, length), inputs, tolerance=1e-8
    )
    with torch.no_grad():
        expected = dplr_kernel(*(p[name] for name in ("dt", "A", "P", "B", "C")), length)
        torch.testing.assert_close(s4_kernel(*inputs, length), expected)


def test_s4_kernel_is_that_of_hippo() -> None:
    A, B = hippo_legs(8)
    eigenvalues, P, B_diagonal, V = (values[None] for values in nplr_legs(8))
    C, dt = torch.randn(1, 8, dtype=torch.float64), torch.tensor([0.05], dtype=torch.float64)
    C_diagonal = (C.to(V.dtype)[:, None] @ V)[:, 0]
    expected = dense_kernel(*(v.to(torch.complex128) for v in (A[None], B[None], C)), dt, 50, "bilinear")
    torch.testing.assert_close(dplr_kernel(dt, eigenvalues, P, B_diagonal, C_diagonal, 50), expected)


def test_dplr_system_is_stable() -> None:
    p = system()
    A_bar, B_bar = discretize_dplr(p["dt"], p["A"], p["P"], p["B"])
    assert (torch.linalg.matrix_norm(A_bar, ord=2) <= 1).all()
    first = (real_output(p["C"]) * B_bar).sum(1)
    torch.testing.assert_close(first, dplr_kernel(p["dt"], p["A"], p["P"], p["B"], p["C"], 1)[:, 0])


def test_kernels_refuse_no_length() -> None:
    p = system()
    with pytest.raises(ValueError, match="length is 0"):
        s4d_kernel(p["dt"], p["A"], p["B"], p["C"], 0)
    with pytest.raises(ValueError, match="length is 0"):
        s4_kernel(p["dt"], p["A"], p["P"], p["B"], p["C"], 0)
    with pytest.raises(ValueError, match="length is 0"):
        dplr_kernel(p["dt"], p["A"], p["P"], p["B"], p["C"], 0)


@pytest.mark.parametrize(
    "length", [11_820, pytest.param(32_768, marks=pytest.mark.slow)], ids=["11820 tokens", "32768 tokens"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_long_kernels_in_fp32(kind: Literal["s4d", "s4"], length: int) -> None:
    torch.manual_seed(0)
    ssm = build_ssm(SSMConfig(kind=kind), 4).ssm
    with torch.no_grad():
        ours = ssm.kernel(torch.view_as_complex(ssm.C)[0], length)
        ssm.double()
        C = torch.view_as_complex(ssm.C)[0]
        exact = ssm.kernel(C, length)
        A_bar, B_bar = ssm.discretize()
        log_A = A_bar.log() if kind == "s4d" else None
        for position in (0, 1, 100, length - 1):
            if log_A is not None:
                tap = 2 * (C * B_bar * torch.exp(log_A * position)).real.sum(1)
            else:
                power = torch.linalg.matrix_power(A_bar, position)
                tap = (real_output(C)[:, None] @ power @ B_bar[..., None])[:, 0, 0]
            torch.testing.assert_close(exact[:, position], tap, rtol=1e-6, atol=1e-9)
    assert (ours - exact).abs().max() < 1e-3 * exact.abs().max()


def test_good_fft_size() -> None:
    def is_good(size: int) -> bool:
        if size % 8:
            return False
        for prime in (2, 3, 5, 7):
            while size % prime == 0:
                size //= prime
        return size == 1

    good = [size for size in range(8, 3001) if is_good(size)]
    for at_least in range(1, 2900):
        assert good_fft_size(at_least) == next(size for size in good if size >= at_least)
    assert good_fft_size(2 * 11_820 - 1) == 24_000
    with pytest.raises(ValueError, match="at_least is 0"):
        good_fft_size(0)


@pytest.mark.parametrize("length", [1, 2, 7, 40, 97])
@pytest.mark.parametrize("taps", [(1, None), (40, None), (97, 96), (97, 97), (13, 50)])
def test_fft_conv(length: int, taps: tuple[int, int | None]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, length, 5, dtype=torch.float64, requires_grad=True)
    kernels = [torch.randn(5, t, dtype=torch.float64, requires_grad=True) for t in taps if t is not None]
    assert_same_gradients(lambda: fft_conv(x, *kernels), lambda: fft_conv_reference(x, *kernels), [x, *kernels])


def test_fft_conv_over_several_tiles() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5000, 70, dtype=torch.float64)
    kernel = torch.randn(70, 5000, dtype=torch.float64)
    whole = fft_conv(x, kernel)
    for channel, sample in ((0, 0), (69, 1)):
        part = fft_conv(x[sample : sample + 1, :, channel : channel + 1], kernel[channel : channel + 1])
        torch.testing.assert_close(whole[sample, :, channel], part[0, :, 0])
    assert fft_conv(x.transpose(0, 1).contiguous().transpose(0, 1), kernel).equal(whole)


def test_fft_operators_fit_torch() -> None:
    x = torch.randn(2, 5, 3, requires_grad=True)
    kernel = torch.randn(3, 5, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.s5.convolve.default, (x, kernel, 16), test_utils=checks)


def test_fft_conv_refuses_wrong_shapes() -> None:
    kernel = torch.randn(4, 8)
    for shape in ((2, 8, 5), (2, 0, 4), (8, 4)):
        with pytest.raises(ValueError, match="x has shape"):
            fft_conv(torch.randn(shape), kernel)


def layer(kind: Literal["s4d", "s4"], bidirectional: bool = False, width: int = 6) -> SSMLayer:
    torch.manual_seed(0)
    return build_ssm(SSMConfig(kind=kind, state=8, bidirectional=bidirectional), width).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 13, 64])
def test_streaming_equals_convolution(kind: Literal["s4d", "s4"], length: int) -> None:
    s4 = layer(kind)
    x = torch.randn(2, length, 6, dtype=torch.float64)
    state, outputs = s4.initial_state(2), []
    for token in x.unbind(1):
        y, state = s4.step(token, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, dim=1), s4(x))


@pytest.mark.parametrize("kind", KINDS)
def test_causal_unless_bidirectional(kind: Literal["s4d", "s4"]) -> None:
    x = torch.randn(1, 20, 6, dtype=torch.float64, requires_grad=True)
    for bidirectional in (False, True):
        (grad,) = torch.autograd.grad(layer(kind, bidirectional)(x)[:, 7].sum(), x)
        assert (grad[:, :8].abs().sum(2) > 1e-9).all()
        assert bool(grad[:, 8:].abs().max() > 1e-9) == bidirectional
    with pytest.raises(ValueError, match=r"ssm\.bidirectional is True"):
        layer(kind, bidirectional=True).step(x[:, 0], layer(kind).initial_state(1))


@pytest.mark.parametrize("kind", KINDS)
def test_length_may_change(kind: Literal["s4d", "s4"]) -> None:
    s4 = layer(kind)
    x = torch.randn(2, 50, 6, dtype=torch.float64)
    torch.testing.assert_close(s4(x[:, :17]), s4(x)[:, :17])


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind: Literal["s4d", "s4"]) -> None:
    s4 = layer(kind, bidirectional=True)
    s4(torch.randn(2, 33, 6, dtype=torch.float64)).square().sum().backward()
    for name, parameter in s4.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_keeps_the_state_space_exact(kind: Literal["s4d", "s4"]) -> None:
    torch.manual_seed(0)
    s4 = build_ssm(SSMConfig(kind=kind), 16)
    x = torch.randn(2, 200, 16)
    exact = s4(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(s4.convolve(x), s4.ssm.convolve(x))
        assert s4.convolve(x).dtype == torch.float32
        rounded = s4(x)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    rounded.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in s4.parameters() if p.grad is not None)
    assert s4.convolve(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_optimiser_hints(kind: Literal["s4d", "s4"]) -> None:
    ssm = build_ssm(SSMConfig(kind=kind, lr=0.5), 4).ssm
    hints = {name: getattr(parameter, "optim_hints", None) for name, parameter in ssm.named_parameters()}
    plain = {"weight_decay": 0.0}
    own = {"lr": 0.5} | plain
    expected = {"log_dt": own, "log_A_real": own, "A_imag": own, "B": own, "C": plain, "skip": plain}
    assert hints == (expected if kind == "s4d" else {**expected, "P": own})


def test_copies_keep_their_hints() -> None:
    layer = copy.deepcopy(build_ssm(SSMConfig(lr=0.5), 4).double())
    assert layer.ssm.log_dt.optim_hints == {"lr": 0.5, "weight_decay": 0.0}
    assert layer.ssm.log_dt.dtype == torch.float64


def test_initial_values() -> None:
    torch.manual_seed(0)
    ssm = build_ssm(SSMConfig(state=8, dt_min=0.01, dt_max=0.1, init="lin"), 500).ssm
    dt = ssm.log_dt.exp()
    assert 0.01 <= dt.min() < 0.011
    assert 0.09 < dt.max() <= 0.1
    torch.testing.assert_close(ssm.eigenvalues[3], diagonal_eigenvalues("lin", 8).to(torch.complex64))
    assert abs(float(ssm.C.detach().square().sum(3).mean()) - 1) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(kind: Literal["s4d", "s4"]) -> None:
    torch.manual_seed(0)
    s4 = build_ssm(SSMConfig(kind=kind, state=8), 8)
    x = torch.randn(2, 33, 8, requires_grad=True)
    compiled = torch.compile(s4, fullgraph=True, backend="aot_eager")
    assert_same_gradients(lambda: compiled(x), lambda: s4(x), [x, *s4.parameters()], tolerance=1e-4)


def test_build_refuses_no_width() -> None:
    with pytest.raises(ValueError, match="width is 0"):
        build_ssm(SSMConfig(), 0)
