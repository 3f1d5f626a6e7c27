"""Convolution kernels of state-space models: S4D (diagonal) and S4 (diagonal plus low rank).

Complex arguments hold one of each conjugate pair, and kernels are K[l] = 2 Re(C Abar^l Bbar). Matrix products here must
run in full precision: with TF32 the repeated squaring of S4 loses the slow modes.

Shapes: H channels, L length, S state (real numbers), N = S / 2 conjugate pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Discretization = Literal["zoh", "bilinear"]


def discretize_diagonal(dt: Tensor, A: Tensor, B: Tensor, discretization: Discretization) -> tuple[Tensor, Tensor]:
    """Discretise x' = A x + B u with diagonal A (S4D, arXiv 2206.11893, section 3.1).

    Zero-order hold: Abar = exp(dt A), Bbar = (Abar - 1) / A B. Bilinear: Abar = (1 + dt A / 2) / (1 - dt A / 2),
    Bbar = dt B / (1 - dt A / 2).

    Args:
        dt: (H,) time steps.
        A: (H, N) complex.
        B: (H, N) complex.
        discretization: `zoh` or `bilinear`.

    Returns:
        log(Abar) (H, N) and Bbar (H, N), complex.
    """
    step = dt[:, None] * A
    if discretization == "zoh":
        return step, torch.expm1(step) / A * B
    denominator = 1 - step / 2
    return torch.log1p(step / 2) - torch.log(denominator), dt[:, None] * B / denominator


def _powers(log_A: Tensor, count: int, stride: int) -> Tensor:
    """exp(log_A stride l) for l < count, (H, count, N): doubling costs a tenth of as many exponentials.

    Modes that have all but died are cut to 0: subnormal numbers would slow the matrix products down several times.
    """
    powers = log_A.new_empty(log_A.shape[0], count, log_A.shape[1])
    powers[:, 0] = 1
    decay = torch.exp(stride * log_A.real)
    factor = torch.polar(decay, stride * log_A.imag)
    dead = torch.finfo(decay.dtype).tiny ** 0.25
    done = 1
    while done < count:
        factor = torch.where(decay < dead, 0, factor)
        more = min(done, count - done)
        torch.mul(powers[:, :more], factor[:, None], out=powers[:, done : done + more])
        factor, decay = factor * factor, decay * decay
        done += more
    return powers


def _real_pairs(values: Tensor) -> Tensor:
    """(..., N) complex -> (..., 2 N) real, a view."""
    return torch.view_as_real(values).flatten(-2)


def _complex_pairs(values: Tensor) -> Tensor:
    """(..., 2 N) real -> (..., N) complex, a view."""
    return torch.view_as_complex(values.view(*values.shape[:-1], -1, 2))


def _split(length: int) -> tuple[int, int]:
    """Numbers of coarse and fine steps, each about sqrt(L), whose product is at least L."""
    fine = math.isqrt(length - 1) + 1
    return -(-length // fine), fine


def _channel_tiles(log_A: Tensor) -> Iterator[slice]:
    """Slices of the channels whose powers stay in a CPU's cache; everything at once elsewhere."""
    channels = log_A.shape[0]
    step = 128 if log_A.device.type == "cpu" else max(channels, 1)
    return (slice(start, start + step) for start in range(0, channels, step))


@torch.library.custom_op("s5::vandermonde", mutates_args=())
def _vandermonde(log_A: Tensor, weights: Tensor, length: int) -> Tensor:
    """2 Re sum_n weights[n] exp(log_A[n] l) for l < length, as one real matrix product a channel."""
    coarse, fine = _split(length)
    kernel = log_A.real.new_empty(log_A.shape[0], coarse, fine)
    for tile in _channel_tiles(log_A):
        left = _powers(log_A[tile], coarse, fine).mul_(2 * weights[tile, None]).conj_physical_()
        right = _powers(log_A[tile], fine, 1)
        torch.bmm(_real_pairs(left), _real_pairs(right).mT, out=kernel[tile])
    return kernel.flatten(1)[:, :length]


@torch.library.custom_op("s5::vandermonde_backward", mutates_args=())
def _vandermonde_backward(grad: Tensor, log_A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of log_A and weights: with g the gradient, sums over l of g[l] exp(log_A l), times l for log_A."""
    length = grad.shape[1]
    coarse, fine = _split(length)
    grad_HCF = nn.functional.pad(grad, (0, coarse * fine - length)).view(-1, coarse, fine)
    fine_steps = torch.arange(fine, dtype=grad.dtype, device=grad.device)[:, None]
    coarse_steps = torch.arange(0, coarse * fine, fine, dtype=grad.dtype, device=grad.device)[:, None]
    grad_log_A, grad_weights = torch.empty_like(log_A), torch.empty_like(weights)
    for tile in _channel_tiles(log_A):
        left, right = _powers(log_A[tile], coarse, fine), _powers(log_A[tile], fine, 1)
        plain = _complex_pairs(torch.bmm(grad_HCF[tile], _real_pairs(right))).mul_(left)
        grad_weights[tile] = 2 * plain.sum(1).conj()
        by_fine = _complex_pairs(torch.bmm(grad_HCF[tile], _real_pairs(right.mul_(fine_steps)))).mul_(left)
        grad_log_A[tile] = 2 * (weights[tile] * by_fine.add_(plain.mul_(coarse_steps)).sum(1)).conj()
    return grad_log_A, grad_weights


@_vandermonde.register_fake
def _(log_A: Tensor, weights: Tensor, length: int) -> Tensor:
    coarse, fine = _split(length)
    return log_A.real.new_empty(log_A.shape[0], coarse * fine)[:, :length]


@_vandermonde_backward.register_fake
def _(grad: Tensor, log_A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(log_A), torch.empty_like(weights)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _vandermonde_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_vandermonde_backward(grad.contiguous(), *ctx.saved_tensors), None


_vandermonde.register_autograd(_vandermonde_gradient, setup_context=_keep)


def s4d_kernel(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, length: int, *, discretization: Discretization = "zoh"
) -> Tensor:
    """Kernel of S4D (arXiv 2206.11893, equation 3), by splitting the Vandermonde product.

    With l = coarse l1 + l2, `C Bbar Abar^l` is a product of a factor of (n, l1) and one of (n, l2): a matrix product.
    Memory is O(H N sqrt(L)) instead of O(H N L), and is only held while the kernel or its gradient is computed.

    Args:
        dt: (H,) time steps.
        A: (H, N) complex, real parts negative.
        B: (H, N) complex.
        C: (H, N) complex.
        length: L.
        discretization: `zoh` or `bilinear`.

    Returns:
        (H, L) real.

    Raises:
        ValueError: `length` is not positive.
    """
    _check_length(length)
    log_A, B_bar = discretize_diagonal(dt, A, B, discretization)
    kernel: Tensor = _vandermonde(log_A, C * B_bar, length)
    return kernel


def s4d_kernel_reference(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, length: int, *, discretization: Discretization = "zoh"
) -> Tensor:
    """Reference of `s4d_kernel`: the whole Vandermonde matrix (H, N, L)."""
    log_A, B_bar = discretize_diagonal(dt, A, B, discretization)
    steps = torch.arange(length, device=A.device)
    return 2 * torch.einsum("hn,hnl->hl", C * B_bar, torch.exp(log_A[..., None] * steps)).real


def discretize_dplr(dt: Tensor, A: Tensor, P: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear discretisation of x' = (diag(A) - P P*) x + B u as a dense real system (S4, arXiv 2111.00396, C.2).

    The state is (Re x, Im x) of one of each conjugate pair. There the state matrix is real, with 2 x 2 blocks on the
    diagonal minus 2 p p^T, p = (Re P, Im P), so that (I - dt/2 A)^-1 follows from the Woodbury identity.

    Args:
        dt: (H,) time steps.
        A: (H, N) complex, real parts negative.
        P: (H, N) complex.
        B: (H, N) complex.

    Returns:
        Abar (H, S, S) and Bbar (H, S), real. The output of a state z is `real_output(C) @ z`.
    """
    half = dt[:, None] / 2
    inverse = 1 / (1 - half * A)
    weighted = inverse * P
    column = torch.cat([weighted.real, weighted.imag], dim=1)
    # P^T M for M with rotation-scaling blocks is the conjugate product.
    turned = inverse.conj() * P
    row = torch.cat([turned.real, turned.imag], dim=1)
    gain = 2 * half / (1 + 2 * half * (weighted * P.conj()).real.sum(1, keepdim=True))
    top = torch.cat([torch.diag_embed(inverse.real), torch.diag_embed(-inverse.imag)], dim=2)
    bottom = torch.cat([torch.diag_embed(inverse.imag), torch.diag_embed(inverse.real)], dim=2)
    resolvent = torch.cat([top, bottom], dim=1) - (gain * column)[:, :, None] * row[:, None, :]
    identity = torch.eye(resolvent.shape[1], dtype=resolvent.dtype, device=resolvent.device)
    B_real = torch.cat([B.real, B.imag], dim=1)
    B_bar = dt[:, None] * torch.bmm(resolvent, B_real[..., None])[..., 0]
    return 2 * resolvent - identity, B_bar


def real_output(C: Tensor) -> Tensor:
    """Output row (H, S) of the real system of `discretize_dplr` for the complex C (H, N): 2 Re(C x)."""
    return torch.cat([2 * C.real, -2 * C.imag], dim=1)


def _krylov(A_bar: Tensor, B_bar: Tensor, C_real: Tensor, length: int) -> Tensor:
    """C Abar^l Bbar for l < length = (C Abar^(s l1)) (Abar^l2 Bbar): both factors double as Abar is squared."""
    doublings = (length - 1).bit_length()
    columns, rows, power = B_bar[:, :, None], C_real[:, None, :], A_bar
    for doubling in range(doublings):
        if doubling < doublings // 2:
            columns = torch.cat([columns, torch.bmm(power, columns)], dim=2)
        else:
            rows = torch.cat([rows, torch.bmm(rows, power)], dim=1)
        if doubling + 1 < doublings:
            power = torch.bmm(power, power)
    return torch.bmm(rows, columns).flatten(1)[:, :length]


def dplr_kernel(dt: Tensor, A: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Kernel of S4 with state matrix diag(A) - P P*, bilinear discretisation, for any length.

    The paper (S4, arXiv 2111.00396, section 3) evaluates a Cauchy matrix (see `s4_kernel_reference`) with
    C~ = C (I - Abar^L) as parameter, which ties it to one length. C~ costs log2(L) squarings of a dense (S, S) matrix,
    and for the small S in use these squarings alone already give the kernel, without the Cauchy matrix. Memory is
    O(H S (S log L + sqrt(L))), only held while the kernel or its gradient is computed.

    Args:
        dt: (H,) time steps.
        A: (H, N) complex, real parts negative.
        P: (H, N) complex.
        B: (H, N) complex.
        C: (H, N) complex.
        length: L.

    Returns:
        (H, L) real.

    Raises:
        ValueError: `length` is not positive.
    """
    _check_length(length)

    def kernel(dt: Tensor, A: Tensor, P: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return _krylov(*discretize_dplr(dt, A, P, B), real_output(C), length)

    return _made_again(kernel, dt, A, P, B, C)


def _made_again(kernel: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """`kernel(*parameters)`, of which only the parameters are saved for the backward pass."""
    if not torch.is_grad_enabled():
        return kernel(*parameters)
    made: Tensor = checkpoint(kernel, *parameters, use_reentrant=False, preserve_rng_state=False)
    return made


def s4_kernel(dt: Tensor, A: Tensor, P: Tensor, B: Tensor, C_tilde: Tensor, length: int) -> Tensor:
    """Kernel of S4 in the paper's own parameters (arXiv 2111.00396, algorithm 1): `dplr_kernel` for C~ in place of C.

    C = C~ (I - Abar^L)^-1 is solved for. Where all modes are slow against the length, that is as ill-conditioned as
    the paper's own formula is: use float64.

    Args:
        dt: (H,) time steps.
        A: (H, N) complex, real parts negative.
        P: (H, N) complex.
        B: (H, N) complex.
        C_tilde: (H, N) complex, C (I - Abar^L); see `truncated_output`.
        length: L.

    Returns:
        (H, L) real.

    Raises:
        ValueError: `length` is not positive.
    """
    _check_length(length)

    def kernel(dt: Tensor, A: Tensor, P: Tensor, B: Tensor, C_tilde: Tensor) -> Tensor:
        A_bar, B_bar = discretize_dplr(dt, A, P, B)
        identity = torch.eye(A_bar.shape[1], dtype=A_bar.dtype, device=A_bar.device)
        remaining = identity - torch.linalg.matrix_power(A_bar, length)
        return _krylov(A_bar, B_bar, torch.linalg.solve(remaining.mT, real_output(C_tilde)), length)

    return _made_again(kernel, dt, A, P, B, C_tilde)


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length is {length}: give a positive number")


def truncated_output(dt: Tensor, A: Tensor, P: Tensor, C: Tensor, length: int) -> Tensor:
    """C~ = C (I - Abar^L), (H, N) complex, of which S4's generating function is made (arXiv 2111.00396, lemma C.3)."""
    A_bar, _ = discretize_dplr(dt, A, P, torch.zeros_like(P))
    C_real = real_output(C)
    rest = C_real - (C_real[:, None] @ torch.linalg.matrix_power(A_bar, length))[:, 0]
    real, imag = rest.chunk(2, dim=1)
    return torch.complex(real, -imag) / 2


def s4_kernel_reference(dt: Tensor, A: Tensor, P: Tensor, B: Tensor, C_tilde: Tensor, length: int) -> Tensor:
    """Reference of `s4_kernel`: S4's own algorithm (arXiv 2111.00396, algorithm 1) with a full Cauchy matrix (H, L, S).

    The generating function at the roots of unity w is 2 / (1 + w) (k_CB - k_CP k_PB / (1 + k_PP)), with
    k_xy = sum_n x[n] y[n] / (g - A[n]) and g = 2 / dt (1 - w) / (1 + w). Here all is multiplied by (1 + w) dt / 2,
    which has no pole at w = -1.
    """
    A, P, B = (torch.cat([half, half.conj()], dim=1) for half in (A, P, B))
    C_tilde = torch.cat([C_tilde, C_tilde.conj()], dim=1)
    angles = -2 * math.pi / length * torch.arange(length, dtype=dt.dtype, device=dt.device)
    roots = torch.polar(torch.ones_like(angles), angles)
    scale = dt[:, None] / 2 * (1 + roots)
    cauchy = 1 / ((1 - roots)[:, None] - scale[..., None] * A[:, None])
    pairs = {"CB": C_tilde * B, "CP": C_tilde * P, "PB": P.conj() * B, "PP": P.conj() * P}
    k = {name: torch.einsum("hn,hln->hl", weights, cauchy) for name, weights in pairs.items()}
    spectrum = k["CB"] - scale * k["CP"] * k["PB"] / (1 + scale * k["PP"])
    kernel: Tensor = dt[:, None] * torch.fft.ifft(spectrum).real
    return kernel
