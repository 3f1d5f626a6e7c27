"""HiPPO-LegS: the state matrix that S4 starts from, and its diagonal forms.

Shapes: S state (real numbers), N = S / 2 conjugate pairs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def hippo_legs(state: int) -> tuple[Tensor, Tensor]:
    """State matrix and input vector of HiPPO-LegS, x' = A x + B u (S4, arXiv 2111.00396, equation 2).

    A[n, k] is -sqrt((2n + 1)(2k + 1)) below the diagonal, -(n + 1) on it and 0 above; B[n] = sqrt(2n + 1).

    Returns:
        A (S, S) and B (S,), float64.

    Raises:
        ValueError: `state` is not positive.
    """
    if state < 1:
        raise ValueError(f"state is {state}: give a positive number")
    orders = torch.arange(state, dtype=torch.float64)
    roots = torch.sqrt(2 * orders + 1)
    A = -torch.tril(torch.outer(roots, roots), diagonal=-1) - torch.diag(orders + 1)
    return A, roots


def nplr_legs(state: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Diagonal plus low rank form of HiPPO-LegS (S4, arXiv 2111.00396, theorem 1 and appendix C.1).

    With the unitary matrix whose columns are V and its conjugate, `A_legs = V (diag(A) - P P*) V*`, `B_legs = V B`.
    Of each conjugate pair, only the member with positive imaginary part is returned, so that a real vector is
    `x = 2 Re(V z)` with `z = V* x`.

    Returns:
        A (N,), P (N,), B (N,) and V (S, N), all complex128, by ascending imaginary part of A. Real parts of A are -1/2.

    Raises:
        ValueError: `state` is not an even positive number.
    """
    if state < 2 or state % 2:
        raise ValueError(f"state is {state}: give an even number of at least 2")
    A, B = hippo_legs(state)
    P = torch.sqrt(torch.arange(state, dtype=torch.float64) + 0.5)
    # A + P P^T is -1/2 plus a skew-symmetric matrix; -i times the latter is Hermitian, hence eigh.
    skew = A + torch.outer(P, P) + 0.5 * torch.eye(state, dtype=torch.float64)
    frequencies, vectors = torch.linalg.eigh(skew * -1j)
    pairs = state // 2
    V = vectors[:, pairs:]
    eigenvalues = torch.complex(torch.full((pairs,), -0.5, dtype=torch.float64), frequencies[pairs:])
    return eigenvalues, V.mH @ P.to(V.dtype), V.mH @ B.to(V.dtype), V


def diagonal_eigenvalues(init: Literal["legs", "lin", "inv"], state: int) -> Tensor:
    """Initial eigenvalues of S4D (arXiv 2206.11893, section 4): S4D-LegS, S4D-Lin and S4D-Inv.

    Returns:
        (N,) complex128, one of each conjugate pair.

    Raises:
        ValueError: `state` is not an even positive number.
    """
    if state < 2 or state % 2:
        raise ValueError(f"state is {state}: give an even number of at least 2")
    if init == "legs":
        return nplr_legs(state)[0]
    orders = torch.arange(state // 2, dtype=torch.float64)
    frequencies = math.pi * orders if init == "lin" else state / math.pi * (state / (2 * orders + 1) - 1)
    return torch.complex(torch.full_like(orders, -0.5), frequencies)
