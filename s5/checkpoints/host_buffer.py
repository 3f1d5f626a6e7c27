"""Tensors in host memory as a safetensors file holds them: taking them is one copy, writing them copies no more.

The format (github.com/huggingface/safetensors, "Format"): 8 bytes of the header's length, little-endian; a JSON header
with every tensor's type, shape and place; the tensors, row-major, one after another. safetensors' own writer would
first turn every tensor into Python bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BLOCK = 4 << 20
"""Bytes that are hashed and written at once."""
Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]


class Image:
    """Host memory for one file of tensors, used again for every save."""

    def __init__(self) -> None:
        self._layout: Layout = []
        self._header = b""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._views: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._header) + self._buffer.numel()

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors here; from a GPU in the order of its stream, without waiting for it.

        Raises:
            ValueError: a tensor has a type that the format, or this code, does not know.
        """
        # The widest first, so that each begins at a multiple of its items' width.
        layout = sorted(
            ((name, value.dtype, tuple(value.shape)) for name, value in tensors.items()),
            key=lambda entry: (-entry[1].itemsize, entry[0]),
        )
        pinned = any(value.is_cuda for value in tensors.values())
        if layout != self._layout or not self._header or pinned != self._buffer.is_pinned():
            self._allocate(layout, pinned)
        for name, view in self._views.items():
            view.copy_(tensors[name], non_blocking=True)

    def _allocate(self, layout: Layout, pinned: bool) -> None:
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, dtype, shape in layout:
            if dtype not in DTYPES:
                raise ValueError(f"{name} is of type {dtype}: a checkpoint holds {', '.join(map(str, DTYPES))}")
            places[name] = (end, end + dtype.itemsize * torch.Size(shape).numel())
            end = places[name][1]
        header = {
            name: {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": places[name]}
            for name, dtype, shape in layout
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._layout, self._header = layout, len(text).to_bytes(8, "little") + text
        # The old memory is given back before the new is asked for.
        self._views, self._buffer = {}, torch.empty(0, dtype=torch.uint8)
        self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        for name, dtype, shape in layout:
            first, last = places[name]
            self._views[name] = self._buffer[first:last].view(dtype).view(shape)

    def blocks(self) -> Iterator[memoryview]:
        """Yield the bytes of the file; on a GPU after waiting for `Snapshot.wait`."""
        yield memoryview(self._header)
        content = self._buffer.numpy().data
        for first in range(0, len(content), BLOCK):
            yield content[first : first + BLOCK]


class Snapshot:
    """Host memory for all files of one checkpoint."""

    def __init__(self) -> None:
        self.images: dict[str, Image] = {}
        self._taken: torch.cuda.Event | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(image.size for image in self.images.values())

    def take(self, contents: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the tensors of all files, by the files' names; on a GPU they are there after `wait`."""
        for name, tensors in contents.items():
            self.images.setdefault(name, Image()).take(tensors)
        devices = {value.device for tensors in contents.values() for value in tensors.values() if value.is_cuda}
        self._taken = None
        if devices:
            # All tensors of a task lie on one device, and its later kernels run after these copies.
            self._taken = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._taken.record(torch.cuda.current_stream(devices.pop()))

    def wait(self) -> None:
        """Return once the tensors are here; called in another thread than `take`."""
        if self._taken is not None:
            self._taken.synchronize()
