"""A checkpoint in host memory, laid out as its safetensors files: one copy takes it, and no other is made to write it.

The data types and the reading are safetensors'. The header is written here (8 bytes of its length, little-endian, and
JSON; github.com/huggingface/safetensors, "Format"), since safetensors 0.8 has no writer to a stream. Its `save` copies
the whole file once more and holds Python's lock (GIL) meanwhile, which stops training. Its `save_file` needs a local
disk, also for an object store; it reports no progress, which distinguishes a slow disk from one that hangs; and its
errors have no errno, which identifies a full disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError, TensorSpec
from torch import Tensor

BLOCK = 4 << 20
"""Bytes that are hashed and written at a time."""
Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]


class FileBuffer:
    """Host memory for one file of tensors, reused for every save."""

    def __init__(self) -> None:
        self._layout: Layout = []
        self._header = b""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._views: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._header) + self._buffer.numel()

    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors here; from a GPU in the order of its stream, without waiting for it.

        Raises:
            ValueError: a tensor has a type that safetensors does not know.
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
        header: dict[str, dict[str, object]] = {}
        places: list[slice] = []
        end = 0
        for name, dtype, shape in layout:
            spec = _spec(name, dtype, shape)
            places.append(slice(end, end + spec.data_len))
            end += spec.data_len
            header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [places[-1].start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._layout, self._header = layout, len(text).to_bytes(8, "little") + text
        # The old memory is freed before the new is allocated.
        self._views, self._buffer = {}, torch.empty(0, dtype=torch.uint8)
        self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        for (name, dtype, shape), place in zip(layout, places, strict=True):
            self._views[name] = self._buffer[place].view(dtype).view(shape)

    def blocks(self) -> Iterator[memoryview]:
        """Yield the bytes of the file; on a GPU after `HostBuffer.wait`."""
        yield memoryview(self._header)
        content = self._buffer.numpy().data
        for first in range(0, len(content), BLOCK):
            yield content[first : first + BLOCK]


def _spec(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
    size = dtype.itemsize * torch.Size(shape).numel()
    try:
        return TensorSpec(dtype=str(dtype).removeprefix("torch."), shape=shape, data_ptr=0, data_len=size)
    except SafetensorError as error:
        raise ValueError(f"{name} cannot be saved in a checkpoint: {error}") from None


class HostBuffer:
    """Host memory for all files of one checkpoint."""

    def __init__(self) -> None:
        self.files: dict[str, FileBuffer] = {}
        self._copied: torch.cuda.Event | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def copy_from(self, contents: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the tensors of all files, by the files' names; on a GPU they are complete after `wait`."""
        for name, tensors in contents.items():
            self.files.setdefault(name, FileBuffer()).copy_from(tensors)
        devices = {value.device for tensors in contents.values() for value in tensors.values() if value.is_cuda}
        self._copied = None
        if devices:
            # All tensors of a task are on one device, and its later kernels run after these copies.
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(devices.pop()))

    def wait(self) -> None:
        """Return once the copies are complete; called in another thread than `copy_from`."""
        if self._copied is not None:
            self._copied.synchronize()
