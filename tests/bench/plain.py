"""State-space layers against their textbook forms, for the benchmark of the model library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from s5.config import SSMConfig
from s5.ssm.kernels import s4_kernel_reference, s4d_kernel_reference, truncated_output
from s5.ssm.layers import DPLRSSM, LinearSSM, SSMLayer, build_ssm
from tests.bench.record import alternate

WIDTH = 1024


def kept_storages(forward: Callable[[], object]) -> dict[int, int]:
    """Return the bytes of every storage that autograd keeps of a forward pass, by the storage's address."""
    storages: dict[int, int] = {}
    alive = []  # An address may be used again once its storage is gone.

    def pack(value: Tensor) -> Tensor:
        storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        alive.append(value)
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        forward()
    return storages


def call(run: Callable[..., None], *arguments: object) -> Callable[[], None]:
    return lambda: run(*arguments)


class PlainSSM(nn.Module):
    """The textbook form of a layer: whole Vandermonde or Cauchy matrix, FFT of twice the length."""

    def __init__(self, layer: SSMLayer) -> None:
        super().__init__()
        self.layer = layer

    def _kernel(self, ssm: LinearSSM, length: int) -> Tensor:
        dt, A, B = ssm.log_dt.exp(), ssm.eigenvalues, torch.view_as_complex(ssm.B)
        C = torch.view_as_complex(ssm.C)[0]
        if isinstance(ssm, DPLRSSM):
            P = torch.view_as_complex(ssm.P)
            return s4_kernel_reference(dt, A, P, B, truncated_output(dt, A, P, C, length), length)
        return s4d_kernel_reference(dt, A, B, C, length)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        length, ssm = x_BLD.shape[1], self.layer.ssm
        x_BDL = x_BLD.transpose(1, 2)
        spectrum = torch.fft.rfft(x_BDL, n=2 * length) * torch.fft.rfft(self._kernel(ssm, length), n=2 * length)
        y_BDL = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + ssm.skip[:, None] * x_BDL
        mixed: Tensor = self.layer.output(nn.functional.gelu(y_BDL.transpose(1, 2)))
        return mixed


def layers(rounds: int, device: torch.device) -> dict[str, Any]:
    """Time a training step of each kind of layer against its plain form, L = 2,048."""
    x_BLD = torch.randn(1, 2_048, WIDTH, device=device)
    found: dict[str, Any] = {}
    for kind in ("s4d", "s4"):
        torch.manual_seed(0)
        layer = build_ssm(SSMConfig(kind=kind), WIDTH).to(device)
        plain = PlainSSM(layer)
        with torch.no_grad():
            difference = (layer(x_BLD) - plain(x_BLD)).abs().max() / plain(x_BLD).abs().max()

        def step(module: nn.Module) -> None:
            module.zero_grad()
            module(x_BLD).square().sum().backward()

        cases = {"ours": call(step, layer), "plain": call(step, plain)}
        found[kind] = {"seconds": alternate(cases, rounds, device), "largest_relative_difference": float(difference)}
    found["s4_saved_bytes"] = {state: s4_saved_bytes(state, 2_048) for state in (32, 64, 128)}
    return found


def s4_saved_bytes(state: int, length: int) -> int:
    """Return the bytes that an S4 layer keeps for backward, its tokens and parameters apart."""
    layer = build_ssm(SSMConfig(kind="s4", state=state), WIDTH)
    x_BLD = torch.randn(1, length, WIDTH)
    storages = kept_storages(lambda: layer(x_BLD))
    own = {value.untyped_storage()._cdata for value in (*layer.parameters(), x_BLD)}
    return sum(size for key, size in storages.items() if key not in own)
