"""Convolution kernels of state-space models: S4D (diagonal) and S4 (diagonal plus low rank).

Complex arguments hold one of each conjugate pair, and kernels are K[l] = 2 Re(C Abar^l Bbar). Matrix products here must
run in full precision: with TF32 the repeated squaring of S4 loses the slow modes.

Shapes: H channels, L length, S state (real numbers), N = S / 2 conjugate pairs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
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


def _powers(log_A: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp(log_A l), each (H, len(exponents), N). Real exp, cos, sin are vectorised."""
    magnitude = torch.exp(log_A.real[:, None] * exponents[:, None])
    angle = log_A.imag[:, None] * exponents[:, None]
    return magnitude * torch.cos(angle), magnitude * torch.sin(angle)


def _vandermonde(log_A: Tensor, weights: Tensor, length: int) -> Tensor:
    """2 Re sum_n weights[n] exp(log_A[n] l) for l < length, as one real matrix product a channel."""
    fine = math.isqrt(length - 1) + 1
    coarse = -(-length // fine)
    steps = torch.arange(max(fine, coarse), dtype=log_A.real.dtype, device=log_A.device)
    fine_real, fine_imag = _powers(log_A, steps[:fine])
    coarse_real, coarse_imag = _powers(log_A, steps[:coarse] * fine)
    real, imag = 2 * weights.real[:, None], 2 * weights.imag[:, None]
    left = torch.cat([real * coarse_real - imag * coarse_imag, -(real * coarse_imag + imag * coarse_real)], dim=2)
    right = torch.cat([fine_real, fine_imag], dim=2)
    return torch.bmm(left, right.mT).flatten(1)[:, :length]


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
    if length < 1:
        raise ValueError(f"length is {length}: give a positive number")
    log_A, B_bar = discretize_diagonal(dt, A, B, discretization)
    weights = C * B_bar
    if not torch.is_grad_enabled():
        return _vandermonde(log_A, weights, length)
    kernel: Tensor = checkpoint(_vandermonde, log_A, weights, length, use_reentrant=False, preserve_rng_state=False)
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


def s4_kernel(dt: Tensor, A: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Kernel of S4 with state matrix diag(A) - P P*, bilinear discretisation (arXiv 2111.00396, section 3).

    The paper evaluates a Cauchy matrix (see `s4_kernel_reference`) with C~ = C (I - Abar^L) as parameter, which ties
    it to one length. Here C itself is the parameter and any length will do. C~ would cost log2(L) squarings of a
    dense (S, S) matrix, and for the small S in use these squarings alone already give the kernel, without the Cauchy
    matrix. Memory is O(H S^2 log L), only held while the kernel or its gradient is computed.

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
    if length < 1:
        raise ValueError(f"length is {length}: give a positive number")
    A_bar, B_bar = discretize_dplr(dt, A, P, B)
    C_real = real_output(C)
    if not torch.is_grad_enabled():
        return _krylov(A_bar, B_bar, C_real, length)
    kernel: Tensor = checkpoint(_krylov, A_bar, B_bar, C_real, length, use_reentrant=False, preserve_rng_state=False)
    return kernel


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
