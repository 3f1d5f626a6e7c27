"""Long convolutions by FFT along the sequence, in tiles of channels and samples.

A tile's spectra stay in cache on a CPU and bound the memory on a GPU. The spectra are not saved for the backward pass
but recomputed from `x`, which is alive anyway. The operators are opaque to torch.compile, which leaves complex
numbers alone.

Shapes: B batch, L sequence, D width, M taps of a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Numbers in a tile: what a CPU's cache holds; what fills a GPU without adding much to its peak memory.
_CPU_TILE = 1 << 19
_GPU_TILE = 1 << 24


def good_fft_size(at_least: int) -> int:
    """Return the smallest product of 8 and primes up to 7 that is at least `at_least`, a size of fast FFTs.

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


class _Tiles:
    """Spectra of a batch (B, L, D), a tile of channels and samples at a time, computed in `dtype`.

    Tiles and their spectra have the channels first: (C, b, length or size / 2 + 1).
    """

    def __init__(self, x_BLD: Tensor, size: int, dtype: torch.dtype) -> None:
        batch, self.length, width = x_BLD.shape
        self.size, self.dtype = size, dtype
        self.on_cpu = x_BLD.device.type == "cpu"
        if self.on_cpu:
            # Both make whole cache lines; measured: the wider tile is faster until its padded form is 8 MiB.
            channels = 128 if 128 * size <= 1 << 21 else 64
            samples = max(1, _CPU_TILE // (size * channels))
        else:
            channels = max(64, _GPU_TILE // (size * max(batch, 1)))
            samples = max(1, _GPU_TILE // (size * channels))
        self.channels = [slice(start, min(start + channels, width)) for start in range(0, width, channels)]
        self.samples = [slice(start, min(start + samples, batch)) for start in range(0, batch, samples)]
        self.padded = x_BLD.new_zeros(min(channels, width), min(samples, batch), size, dtype=dtype)
        self.padded_kernel = x_BLD.new_zeros(min(channels, width), size, dtype=dtype)

    def spectrum(self, x_BLD: Tensor, samples: slice, channels: slice) -> Tensor:
        """Spectrum of a tile of x, zero-padded."""
        tile = x_BLD[samples, :, channels]
        if self.on_cpu:
            # torch transposes a whole contiguous matrix many times faster than a strided one.
            rows = tile.to(self.dtype, memory_format=torch.contiguous_format, copy=True).flatten(0, 1)
            turned = rows.t().contiguous().view(-1, *tile.shape[:2])
        else:
            turned = tile.permute(2, 0, 1)
        padded = self.padded[: tile.shape[2], : tile.shape[0]]
        padded[..., : self.length] = turned
        spectrum: Tensor = torch.fft.rfft(padded)
        return spectrum

    def response(self, kernel_DM: Tensor, channels: slice) -> Tensor:
        """Spectrum (C, size / 2 + 1) of a kernel, always the same one."""
        padded = self.padded_kernel[: channels.stop - channels.start]
        padded[:, : kernel_DM.shape[1]] = kernel_DM[channels]
        spectrum: Tensor = torch.fft.rfft(padded)
        return spectrum

    def put_back(self, spectrum: Tensor, y_BLD: Tensor, samples: slice, channels: slice) -> None:
        """Transform a tile back into its place in y."""
        y_BLD[samples, :, channels] = torch.fft.irfft(spectrum, n=self.size)[..., : self.length].permute(1, 2, 0)


@torch.library.custom_op("s5::convolve", mutates_args=())
def convolve(x_BLD: Tensor, kernel_DM: Tensor, size: int) -> Tensor:
    """Convolve each channel with its kernel, laid out by `circular_kernel`: (B, L, D) -> same, in the type of x."""
    y_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
    tiles = _Tiles(x_BLD, size, kernel_DM.dtype)
    for channels in tiles.channels:
        response = tiles.response(kernel_DM, channels)[:, None]
        for samples in tiles.samples:
            tiles.put_back(tiles.spectrum(x_BLD, samples, channels).mul_(response), y_BLD, samples, channels)
    return y_BLD


@torch.library.custom_op("s5::convolve_backward", mutates_args=())
def convolve_backward(
    grad_BLD: Tensor, x_BLD: Tensor, kernel_DM: Tensor, size: int, needs_x: bool, needs_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `convolve` for x and the kernel; empty where they are not needed."""
    taps = kernel_DM.shape[1]
    grad_x_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format) if needs_x else x_BLD.new_empty(0)
    grad_kernel_DM = torch.empty_like(kernel_DM) if needs_kernel else kernel_DM.new_empty(0)
    tiles = _Tiles(x_BLD, size, kernel_DM.dtype)
    for channels in tiles.channels:
        response = tiles.response(kernel_DM, channels).conj_physical_()[:, None]
        correlation = torch.zeros_like(response[:, 0])
        for samples in tiles.samples:
            grad_spectrum = tiles.spectrum(grad_BLD, samples, channels)
            if needs_kernel:
                spectrum = tiles.spectrum(x_BLD, samples, channels)
                for of_x, of_grad in zip(spectrum.conj_physical_().unbind(1), grad_spectrum.unbind(1), strict=True):
                    correlation.addcmul_(of_x, of_grad)
            if needs_x:
                tiles.put_back(grad_spectrum.mul_(response), grad_x_BLD, samples, channels)
        if needs_kernel:
            grad_kernel_DM[channels] = torch.fft.irfft(correlation, n=size)[:, :taps]
    return grad_x_BLD, grad_kernel_DM


@convolve.register_fake
def _(x_BLD: Tensor, kernel_DM: Tensor, size: int) -> Tensor:
    return torch.empty_like(x_BLD, memory_format=torch.contiguous_format)


@convolve_backward.register_fake
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
    grad_x_BLD, grad_kernel_DM = convolve_backward(grad_BLD, x_BLD, kernel_DM, ctx.size, needs_x, needs_kernel)
    return grad_x_BLD if needs_x else None, grad_kernel_DM if needs_kernel else None, None


convolve.register_autograd(_convolve_gradient, setup_context=_keep)


@torch.library.custom_op("s5::convolve_score", mutates_args=())
def convolve_score(x_BLD: Tensor, kernel_DM: Tensor, size: int, weight_D: Tensor) -> Tensor:
    """Sum over the channels of weight times convolution: (B, L, D) -> (B, L), in the type of the kernel.

    Channels are summed up as spectra, so that one sequence a sample is transformed back instead of D. There is a
    gradient for the weights only.
    """
    tiles = _Tiles(x_BLD, size, kernel_DM.dtype)
    total_BF = torch.zeros(x_BLD.shape[0], size // 2 + 1, dtype=kernel_DM.dtype.to_complex(), device=x_BLD.device)
    for channels in tiles.channels:
        response = tiles.response(kernel_DM, channels).mul_(weight_D[channels, None])[:, None]
        for samples in tiles.samples:
            total_BF[samples] += tiles.spectrum(x_BLD, samples, channels).mul_(response).sum(0)
    logits_BL: Tensor = torch.fft.irfft(total_BF, n=size)[:, : x_BLD.shape[1]].contiguous()
    return logits_BL


@torch.library.custom_op("s5::convolve_score_backward", mutates_args=())
def convolve_score_backward(grad_BL: Tensor, x_BLD: Tensor, kernel_DM: Tensor, size: int) -> Tensor:
    """Gradient (D,) of `convolve_score` for its weights."""
    tiles = _Tiles(x_BLD, size, kernel_DM.dtype)
    # The inner product of two real sequences is that of their spectra, each frequency but 0 and the last twice.
    grad_BF = torch.fft.rfft(grad_BL.to(kernel_DM.dtype), n=size).conj_physical_().mul_(2 / size)
    grad_BF[:, [0, -1]] *= 0.5
    grad_D = kernel_DM.new_empty(x_BLD.shape[2])
    for channels in tiles.channels:
        response = tiles.response(kernel_DM, channels)
        correlation = torch.zeros_like(response)
        for samples in tiles.samples:
            for spectrum, grad_F in zip(
                tiles.spectrum(x_BLD, samples, channels).unbind(1), grad_BF[samples], strict=True
            ):
                correlation.addcmul_(spectrum, grad_F)
        grad_D[channels] = response.mul_(correlation).real.sum(1)
    return grad_D


@convolve_score.register_fake
def _(x_BLD: Tensor, kernel_DM: Tensor, size: int, weight_D: Tensor) -> Tensor:
    return kernel_DM.new_empty(x_BLD.shape[:2])


@convolve_score_backward.register_fake
def _(grad_BL: Tensor, x_BLD: Tensor, kernel_DM: Tensor, size: int) -> Tensor:
    return kernel_DM.new_empty(x_BLD.shape[2])


def _convolve_score_gradient(ctx: Any, grad_BL: Tensor) -> tuple[None, None, None, Tensor]:
    return None, None, None, convolve_score_backward(grad_BL, *ctx.saved_tensors, ctx.size)


def _keep_for_score(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.size = inputs[2]


convolve_score.register_autograd(_convolve_score_gradient, setup_context=_keep_for_score)


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


def check_width(x_BLD: Tensor, width: int) -> None:
    """Raise `ValueError` unless x is (B, L, D) with at least one token and D the width."""
    if x_BLD.dim() != 3 or x_BLD.shape[2] != width or x_BLD.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x_BLD.shape)}: give (batch, length >= 1, {width}), the layer's width")


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
    check_width(x_BLD, causal_DM.shape[0])
    kernel_DM, size = circular_kernel(x_BLD.shape[1], causal_DM, anticausal_DM)
    y_BLD: Tensor = convolve(x_BLD, kernel_DM, size)
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
