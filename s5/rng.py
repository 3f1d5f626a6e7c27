"""Random numbers of a sample: each is a hash of (seed of the sample, name of the stream, position).

They do not depend on the number of workers, the order of calls or the device: it is 64-bit integer arithmetic.
The hash is the finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).

Shapes: B batch.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_WORD = 1 << 64


def _signed(value: int) -> int:
    """The 64-bit two's complement reading of `value`, as torch's int64 holds it."""
    value %= _WORD
    return value - _WORD if value >= _WORD >> 1 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 words. The masks make torch's arithmetic shifts logical."""
    words = (words ^ ((words >> 30) & ((1 << 34) - 1))) * _FIRST
    words = (words ^ ((words >> 27) & ((1 << 37) - 1))) * _SECOND
    return words ^ ((words >> 31) & ((1 << 33) - 1))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _stream_key(stream: str | int) -> int:
    """A 64-bit word for a stream, the same in every process and version of Python."""
    digest = hashlib.blake2b(repr(stream).encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest, "little"))


def fold(seeds_B: Tensor, stream: str | int) -> Tensor:
    """Derive new seeds, one for each of `seeds_B`, that are independent of them and of those of other streams.

    Args:
        seeds_B: (B,) int64.
        stream: name or number of the stream; `"1"` and `1` differ.

    Returns:
        (B,) int64.

    Raises:
        ValueError: `seeds_B` is not int64.
    """
    if seeds_B.dtype != torch.int64:
        raise ValueError(f"seeds are {seeds_B.dtype}: give int64")
    return _mix(_mix(seeds_B + _GOLDEN) ^ _stream_key(stream))


def uniform(seeds_B: Tensor, stream: str, *shape: int) -> Tensor:
    """Draw numbers uniformly from [0, 1), each a multiple of 2**-24.

    Args:
        seeds_B: (B,) int64, one seed a sample.
        stream: what the numbers are for; every use in a model needs a name of its own.
        shape: shape of one sample's numbers.

    Returns:
        (B, *shape) float32 on the device of the seeds. The first numbers do not depend on how many are drawn.

    Raises:
        ValueError: `seeds_B` is not int64.
    """
    keys_B = fold(seeds_B, stream)
    counters = torch.arange(1, math.prod(shape) + 1, dtype=torch.int64, device=seeds_B.device)
    # Not multiplied first: torch's compiler turns a multiple of a range into an index, which overflows (torch 2.15).
    words = _mix(keys_B[:, None] ^ _mix(counters))
    top_bits = (words >> 40) & ((1 << 24) - 1)
    return (top_bits.to(torch.float32) * 2.0**-24).reshape(-1, *shape)


def fresh_seeds(batch: int, device: torch.device | str | None = None) -> Tensor:
    """Draw (batch,) int64 seeds from torch's global generator of `device`, for callers whose samples have none."""
    return torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64, device=device)
