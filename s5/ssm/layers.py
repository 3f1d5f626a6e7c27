"""State-space layers: S4D (diagonal) and S4 (diagonal plus low rank), one system per channel.

The parameters, the kernels and the FFT stay in fp32 (or in the parameters' type) under autocast.

Shapes: B batch, L sequence, D width (= H channels of a kernel), S state, N = S / 2 conjugate pairs, R directions.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s5.config import SSMConfig
from s5.ssm.convolution import check_width, circular_kernel, convolve
from s5.ssm.hippo import diagonal_eigenvalues, hippo_legs, nplr_legs
from s5.ssm.kernels import discretize_diagonal, discretize_dplr, dplr_kernel, real_output, s4_kernel, s4d_kernel

__all__ = [
    "DPLRSSM",
    "S4",
    "S4D",
    "DiagonalSSM",
    "HintedParameter",
    "LinearSSM",
    "OptimHints",
    "SSMLayer",
    "StreamState",
    "build_ssm",
    "hippo_legs",
    "nplr_legs",
    "register_hint",
    "s4_kernel",
    "s4d_kernel",
]


class OptimHints(TypedDict, total=False):
    """Settings of the optimiser that a parameter brings along."""

    lr: float
    weight_decay: float


class HintedParameter(nn.Parameter):
    """Parameter whose attribute `optim_hints` says what it asks of the optimiser, in copies too."""

    optim_hints: OptimHints

    def __deepcopy__(self, memo: dict[int, Any]) -> HintedParameter:
        copied: HintedParameter = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        copied.optim_hints = copy.copy(self.optim_hints)
        return copied


def register_hint(
    parameter: nn.Parameter, *, lr: float | None = None, weight_decay: float | None = None
) -> HintedParameter:
    """Return the parameter with optimiser settings attached: an upper bound of its learning rate, its weight decay."""
    hinted = HintedParameter(parameter.data, parameter.requires_grad)
    hinted.optim_hints = {}
    if lr is not None:
        hinted.optim_hints["lr"] = lr
    if weight_decay is not None:
        hinted.optim_hints["weight_decay"] = weight_decay
    return hinted


class StreamState(NamedTuple):
    """State of a recurrence: the hidden state, and the discretised system that drives it."""

    hidden: Tensor
    A_bar: Tensor
    B_bar: Tensor


def _real_view(values: Tensor) -> Tensor:
    """Complex numbers as a last axis of two, in the default type: optimisers and DDP see real parameters."""
    return torch.view_as_real(values.resolve_conj()).to(torch.get_default_dtype()).contiguous()


class LinearSSM(nn.Module, ABC):
    """Linear part of a state-space layer: y = C x + skip u with x' = A x + B u, sampled at learned time steps.

    Time steps, A and B have the learning rate of `config.lr` and no weight decay; the skip has no weight decay.

    Args:
        config: settings.
        width: channels D, each with a system of its own.
        eigenvalues: (N,) complex, the initial diagonal A = -exp(log_A_real) + i A_imag of every channel.
        B: (N,) complex, the initial input weights of every channel.
    """

    def __init__(self, config: SSMConfig, width: int, eigenvalues: Tensor, B: Tensor) -> None:
        super().__init__()
        self.config = config
        self.width = width
        pairs = config.state // 2
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        self.log_dt = self._system_parameter(low + (high - low) * torch.rand(width))
        dtype = torch.get_default_dtype()
        self.log_A_real = self._system_parameter(torch.log(-eigenvalues.real).to(dtype).repeat(width, 1))
        self.A_imag = self._system_parameter(eigenvalues.imag.to(dtype).repeat(width, 1))
        self.B = self._system_parameter(_real_view(B).repeat(width, 1, 1))
        directions = 2 if config.bidirectional else 1
        drawn = torch.randn(directions, width, pairs, 2) * math.sqrt(0.5)
        self.C = register_hint(nn.Parameter(drawn), weight_decay=0.0)
        self.skip = register_hint(nn.Parameter(torch.randn(width)), weight_decay=0.0)

    def _system_parameter(self, values: Tensor) -> nn.Parameter:
        """A parameter of the optimiser group of A, B and dt."""
        return register_hint(nn.Parameter(values), lr=self.config.lr, weight_decay=0.0)

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues (H, N), complex, with negative real parts."""
        return torch.complex(-torch.exp(self.log_A_real), self.A_imag)

    @abstractmethod
    def kernel(self, C: Tensor, length: int) -> Tensor:
        """Convolution kernel (H, L), without skip, for output weights C (H, N) complex."""

    @abstractmethod
    def discretize(self) -> tuple[Tensor, Tensor]:
        """Abar and Bbar of the recurrence."""

    @abstractmethod
    def initial_state(self, batch: int) -> StreamState:
        """State of `step` before the first token."""

    @abstractmethod
    def _advance(self, x_BD: Tensor, state: StreamState) -> tuple[Tensor, Tensor]:
        """Output without skip and the next hidden state."""

    def taps(self, length: int) -> tuple[Tensor, int]:
        """Kernel and FFT size, as `s5.ssm.convolution.convolve` wants them; the skip is part of the first tap."""
        with torch.autocast(self.skip.device.type, enabled=False):
            C = torch.view_as_complex(self.C)
            causal = self.kernel(C[0], length)
            # In place where there is no graph; otherwise one copy, and none on the way back.
            add = causal.index_add if causal.requires_grad else causal.index_add_
            causal = add(1, torch.zeros(1, dtype=torch.int64, device=causal.device), self.skip[:, None])
            return circular_kernel(length, causal, self.kernel(C[1], length) if self.config.bidirectional else None)

    def convolve(self, x_BLD: Tensor) -> Tensor:
        """Convolution with the kernel plus skip: (B, L, D) -> (B, L, D), any length, in the type of x.

        Raises:
            ValueError: x does not have the layer's width, or is empty.
        """
        check_width(x_BLD, self.width)
        y_BLD: Tensor = convolve(x_BLD, *self.taps(x_BLD.shape[1]))
        return y_BLD

    def step(self, x_BD: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """One step of the recurrence that equals `convolve`: (B, D) and a state -> (B, D) and the next state.

        Raises:
            ValueError: the layer is bidirectional.
        """
        if self.config.bidirectional:
            raise ValueError("ssm.bidirectional is True: a step knows no future; use a causal layer to stream")
        with torch.autocast(x_BD.device.type, enabled=False):
            u_BD = x_BD.to(self.skip.dtype)
            y_BD, hidden = self._advance(u_BD, state)
            return (y_BD + self.skip * u_BD).to(x_BD.dtype), state._replace(hidden=hidden)


class DiagonalSSM(LinearSSM):
    """S4D (arXiv 2206.11893): diagonal A; B starts from ones, C from a complex normal."""

    def __init__(self, config: SSMConfig, width: int) -> None:
        eigenvalues = diagonal_eigenvalues(config.init, config.state)
        super().__init__(config, width, eigenvalues, torch.ones_like(eigenvalues))

    def kernel(self, C: Tensor, length: int) -> Tensor:
        """Convolution kernel (H, L), without skip, for output weights C (H, N) complex."""
        B = torch.view_as_complex(self.B)
        return s4d_kernel(self.log_dt.exp(), self.eigenvalues, B, C, length, discretization=self.config.discretization)

    def discretize(self) -> tuple[Tensor, Tensor]:
        """Abar and Bbar, each (H, N) complex."""
        B = torch.view_as_complex(self.B)
        log_A, B_bar = discretize_diagonal(self.log_dt.exp(), self.eigenvalues, B, self.config.discretization)
        return log_A.exp(), B_bar

    def initial_state(self, batch: int) -> StreamState:
        """State of `step` before the first token; `hidden` is (B, H, N) complex."""
        A_bar, B_bar = self.discretize()
        return StreamState(A_bar.new_zeros(batch, *A_bar.shape), A_bar, B_bar)

    def _advance(self, x_BD: Tensor, state: StreamState) -> tuple[Tensor, Tensor]:
        hidden = state.A_bar * state.hidden + state.B_bar * x_BD[..., None]
        return 2 * (torch.view_as_complex(self.C)[0] * hidden).real.sum(2), hidden


class DPLRSSM(LinearSSM):
    """S4 (arXiv 2111.00396): A - P P* with diagonal A, from HiPPO-LegS; bilinear discretisation."""

    def __init__(self, config: SSMConfig, width: int) -> None:
        eigenvalues, P, B, _ = nplr_legs(config.state)
        super().__init__(config, width, eigenvalues, B)
        self.P = self._system_parameter(_real_view(P).repeat(width, 1, 1))

    def _system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt, A, P and B."""
        return self.log_dt.exp(), self.eigenvalues, torch.view_as_complex(self.P), torch.view_as_complex(self.B)

    def kernel(self, C: Tensor, length: int) -> Tensor:
        """Convolution kernel (H, L), without skip, for output weights C (H, N) complex."""
        return dplr_kernel(*self._system(), C, length)

    def discretize(self) -> tuple[Tensor, Tensor]:
        """Abar (H, S, S) and Bbar (H, S), real."""
        return discretize_dplr(*self._system())

    def initial_state(self, batch: int) -> StreamState:
        """State of `step` before the first token; `hidden` is (B, H, S) real."""
        A_bar, B_bar = self.discretize()
        return StreamState(B_bar.new_zeros(batch, *B_bar.shape), A_bar, B_bar)

    def _advance(self, x_BD: Tensor, state: StreamState) -> tuple[Tensor, Tensor]:
        hidden = torch.einsum("hst,bht->bhs", state.A_bar, state.hidden) + state.B_bar * x_BD[..., None]
        return (real_output(torch.view_as_complex(self.C)[0]) * hidden).sum(2), hidden


class SSMLayer(nn.Module):
    """State-space layer of ViS4mer (arXiv 2204.01692): linear state space, GELU, linear mix of the channels."""

    def __init__(self, ssm: LinearSSM) -> None:
        super().__init__()
        self.ssm = ssm
        self.output = nn.Linear(ssm.width, ssm.width)

    def mix(self, y: Tensor) -> Tensor:
        """GELU and linear. Of both, only y is saved for the backward pass, under autocast in the smaller type."""
        kind = y.device.type
        if torch.is_autocast_enabled(kind):
            y = y.to(torch.get_autocast_dtype(kind))
        if not torch.is_grad_enabled():
            return self._activate_and_mix(y)
        mixed: Tensor = checkpoint(self._activate_and_mix, y, use_reentrant=False, preserve_rng_state=False)
        return mixed

    def _activate_and_mix(self, y: Tensor) -> Tensor:
        mixed: Tensor = self.output(nn.functional.gelu(y))
        return mixed

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), any length.

        Raises:
            ValueError: x does not have the layer's width, or is empty.
        """
        return self.mix(self.ssm.convolve(x_BLD))

    def convolve(self, x_BLD: Tensor) -> Tensor:
        """The linear part alone, before GELU and channel mix: (B, L, D) -> (B, L, D)."""
        return self.ssm.convolve(x_BLD)

    def initial_state(self, batch: int) -> StreamState:
        """State of `step` before the first token."""
        return self.ssm.initial_state(batch)

    def step(self, x_BD: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """One token of the stream, equal to `forward` on the tokens so far: (B, D), state -> (B, D), next state.

        Raises:
            ValueError: the layer is bidirectional.
        """
        y_BD, state = self.ssm.step(x_BD, state)
        return self.mix(y_BD), state


class S4D(SSMLayer):
    """Layer with a diagonal state space."""

    def __init__(self, config: SSMConfig, width: int) -> None:
        super().__init__(DiagonalSSM(config, width))


class S4(SSMLayer):
    """Layer with a diagonal plus low rank state space, as ViS4mer uses."""

    def __init__(self, config: SSMConfig, width: int) -> None:
        super().__init__(DPLRSSM(config, width))


def build_ssm(config: SSMConfig, width: int) -> SSMLayer:
    """Build the layer that `config.kind` names, for tokens of `width` channels.

    Raises:
        ValueError: `width` is not positive.
    """
    if width < 1:
        raise ValueError(f"width is {width}: give a positive number of channels")
    return S4D(config, width) if config.kind == "s4d" else S4(config, width)
