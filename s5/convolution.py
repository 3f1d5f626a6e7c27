"""Long convolutions by FFT along the sequence, in tiles of channels and samples.

A tile's spectra stay in cache on a CPU and bound the memory on a GPU. The spectra are not kept for the backward pass
but computed again from `x`, which is alive anyway. The operators are opaque to torch.compile, which leaves complex
numbers alone.

Shapes: B batch, L sequence, D width, M taps of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Numbers in a tile: what a CPU's cache holds; what fills a GPU without adding much to its peak memory.
_CPU_TILE = 1 << 19
_GPU_TILE = 1 << 24


def good_fft_size(at_least: int) -> int:
    """Smallest product of 8 and of primes up to 7 that is not below `at_least`: a size that FFT libraries are fast at.

    Raises:
        ValueError: `at_least` is not positive.
    """
    if at_least < 1:
        raise ValueError(f"at_least is {at_least}: give a positive size")
    best = 8
    while best < at_least:
        best *= 2
    sevens = 8
    while sevens < best:
        fives = sevens
        while fives < best:
            threes = fives
            while threes < best:
                quotient = -(-at_least // threes)
                best = min(best, threes * (1 << (quotient - 1).bit_length()))
                threes *= 3
            fives *= 5
        sevens *= 7
    return best


def _channel_tiles(x_BLD: Tensor, size: int) -> Iterator[slice]:
    """Slices of the width; 64 channels of a CPU's tile still make whole cache lines."""
    batch, _, width = x_BLD.shape
    step = 64 if x_BLD.device.type == "cpu" else max(64, _GPU_TILE // (size * max(batch, 1)))
    return (slice(start, start + step) for start in range(0, width, step))


def _sample_tiles(x_BLD: Tensor, size: int) -> Iterator[slice]:
    """Slices of the batch."""
    batch = x_BLD.shape[0]
    tile = _CPU_TILE if x_BLD.device.type == "cpu" else _GPU_TILE
    step = max(1, tile // (size * 64))
    return (slice(start, start + step) for start in range(0, batch, step))


def _spectrum(x_BLD: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Spectrum (B, D, size / 2 + 1) of a tile, zero-padded to `size`, computed in `dtype`."""
    spectrum: Tensor = torch.fft.rfft(x_BLD.transpose(1, 2).to(dtype), n=size)
    return spectrum


@torch.library.custom_op("s5::convolve", mutates_args=())
def _convolve(x_BLD: Tensor, kernel_DM: Tensor, size: int) -> Tensor:
    length = x_BLD.shape[1]
    y_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
    for channels in _channel_tiles(x_BLD, size):
        response = torch.fft.rfft(kernel_DM[channels], n=size)
        for samples in _sample_tiles(x_BLD, size):
            product = _spectrum(x_BLD[samples, :, channels], size, kernel_DM.dtype).mul_(response)
            y_BLD[samples, :, channels] = torch.fft.irfft(product, n=size)[..., :length].transpose(1, 2)
    return y_BLD


@torch.library.custom_op("s5::convolve_backward", mutates_args=())
def _convolve_backward(
    grad_BLD: Tensor, x_BLD: Tensor, kernel_DM: Tensor, size: int, needs_x: bool, needs_kernel: bool
) -> tuple[Tensor, Tensor]:
    length, taps = x_BLD.shape[1], kernel_DM.shape[1]
    grad_x_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format) if needs_x else x_BLD.new_empty(0)
    grad_kernel_DM = torch.empty_like(kernel_DM) if needs_kernel else kernel_DM.new_empty(0)
    for channels in _channel_tiles(x_BLD, size):
        response = torch.fft.rfft(kernel_DM[channels], n=size).conj_physical_()
        correlation = torch.zeros_like(response)
        for samples in _sample_tiles(x_BLD, size):
            grad_spectrum = _spectrum(grad_BLD[samples, :, channels], size, kernel_DM.dtype)
            if needs_kernel:
                spectrum = _spectrum(x_BLD[samples, :, channels], size, kernel_DM.dtype)
                correlation += spectrum.conj_physical_().mul_(grad_spectrum).sum(0)
            if needs_x:
                product = torch.fft.irfft(grad_spectrum.mul_(response), n=size)
                grad_x_BLD[samples, :, channels] = product[..., :length].transpose(1, 2)
        if needs_kernel:
            grad_kernel_DM[channels] = torch.fft.irfft(correlation, n=size)[:, :taps]
    return grad_x_BLD, grad_kernel_DM


@_convolve.register_fake
def _(x_BLD: Tensor, kernel_DM: Tensor, size: int) -> Tensor:
    return torch.empty_like(x_BLD, memory_format=torch.contiguous_format)


@_convolve_backward.register_fake
def _(
    grad_BLD: Tensor, x_BLD: Tensor, kernel_DM: Tensor, size: int, needs_x: bool, needs_kernel: bool
) -> tuple[Tensor, Tensor]:
    grad_x_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format) if needs_x else x_BLD.new_empty(0)
    return grad_x_BLD, torch.empty_like(kernel_DM) if needs_kernel else kernel_DM.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.size = inputs[-1]


def _convolve_gradient(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_BLD, kernel_DM = ctx.saved_tensors
    needs_x, needs_kernel = ctx.needs_input_grad[:2]
    grad_x_BLD, grad_kernel_DM = _convolve_backward(grad_BLD, x_BLD, kernel_DM, ctx.size, needs_x, needs_kernel)
    return grad_x_BLD if needs_x else None, grad_kernel_DM if needs_kernel else None, None


_convolve.register_autograd(_convolve_gradient, setup_context=_keep)


def circular_kernel(length: int, causal_DM: Tensor, anticausal_DM: Tensor | None) -> tuple[Tensor, int]:
    """Kernel as the FFT wants it, and the FFT's size, for sequences of `length`.

    The size is at least `length + M - 1`, so that nothing wraps around into the output.

    Returns:
        Kernel (D, M), or (D, size) with the anticausal taps at the end in reversed order; the size.
    """
    taps = causal_DM.shape[1]
    if anticausal_DM is None:
        return causal_DM, good_fft_size(length + taps - 1)
    behind = anticausal_DM.shape[1]
    size = good_fft_size(max(length + taps - 1, length + behind, taps + behind))
    gap = causal_DM.new_zeros(causal_DM.shape[0], size - taps - behind)
    return torch.cat([causal_DM, gap, anticausal_DM.flip(1)], dim=1), size


def fft_conv(x_BLD: Tensor, causal_DM: Tensor, anticausal_DM: Tensor | None = None) -> Tensor:
    """Convolve every channel with its own kernel: y[l] = sum_{m <= l} causal[l - m] x[m].

    The anticausal kernel, if any, adds sum_{m > l} anticausal[m - l - 1] x[m]. Kernels may be longer or shorter than x.

    Args:
        x_BLD: (B, L, D), any floating point type.
        causal_DM: (D, M), float32 or float64, which is also the precision of the transforms.
        anticausal_DM: (D, M') of the same type, or None.

    Returns:
        (B, L, D), in the type of x.

    Raises:
        ValueError: x does not have the kernel's width, or is empty.
    """
    if x_BLD.dim() != 3 or x_BLD.shape[2] != causal_DM.shape[0] or x_BLD.shape[1] < 1:
        raise ValueError(
            f"x has shape {tuple(x_BLD.shape)}: give (batch, length >= 1, {causal_DM.shape[0]}), the kernel's width"
        )
    kernel_DM, size = circular_kernel(x_BLD.shape[1], causal_DM, anticausal_DM)
    y_BLD: Tensor = _convolve(x_BLD, kernel_DM, size)
    return y_BLD


def fft_conv_reference(x_BLD: Tensor, causal_DM: Tensor, anticausal_DM: Tensor | None = None) -> Tensor:
    """Reference of `fft_conv` by a dense (L, L) matrix a channel: O(L^2) time and memory."""
    length = x_BLD.shape[1]
    steps = torch.arange(length, device=x_BLD.device)
    lag = steps[:, None] - steps
    taps = causal_DM.shape[1]
    matrix = causal_DM[:, lag.clamp(0, taps - 1)] * ((lag >= 0) & (lag < taps))
    if anticausal_DM is not None:
        behind = anticausal_DM.shape[1]
        ahead = -lag - 1
        matrix = matrix + anticausal_DM[:, ahead.clamp(0, behind - 1)] * ((ahead >= 0) & (ahead < behind))
    return torch.einsum("dlm,bmd->bld", matrix, x_BLD)
