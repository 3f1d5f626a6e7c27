"""Arrays of features in files that other programs wrote, read in parts: a video is never in memory as a whole.

Formats: npy, npz, pt (a tensor, or a dict that holds it), safetensors, h5. A file has one array, or one that is named
`features`: (T, N, D), or (T, D) for one token a frame.

Shapes: T frames, N tokens a frame, D width.
"""

from __future__ import annotations

import importlib
import lzma
import pickle
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pipelines import storage
from pipelines.data.features.cache import TokenArray
from pipelines.errors import UserError
from s5.errors import VideoError

FORMATS = ("npy", "npz", "pt", "safetensors", "h5")
NAMED = "features"
"""Name of the array that is taken where a file has several."""
FLOATS = ("float16", "float32", "float64", "bfloat16")


@dataclass(frozen=True)
class StoredArray:
    """An array in an open file."""

    shape: tuple[int, int, int]
    """T, N, D."""
    read: Callable[[int, int], Any]
    """Returns frames from the first number up to the second, as NumPy or torch has them; called in ascending order."""

    def tokens(self, first: int, stop: int) -> TokenArray:
        """Return the tokens (T, N, D) of some frames in fp16.

        Raises:
            VideoError: they are not finite, or too large for fp16.
        """
        with _failures_told():
            part = self.read(first, stop)
            part = part.detach().half().numpy() if isinstance(part, torch.Tensor) else part
        with np.errstate(over="ignore"):
            array: TokenArray = np.ascontiguousarray(part, np.float16).reshape(stop - first, *self.shape[1:])
        # A sum is not finite where a number is not, and is found without an array of answers.
        if not np.isfinite(array.sum(dtype=np.float64)):
            raise VideoError("its features are not finite in fp16")
        return array


def check_formats(formats: set[str]) -> None:
    """Raise `UserError` where files of these formats need a package that is not installed."""
    if "h5" in formats and importlib.util.find_spec("h5py") is None:
        raise UserError(
            "format is 'h5': the package h5py is missing; install it (the extra `h5`) or give another format"
        )


@contextmanager
def open_array(path: str, file_format: str) -> Iterator[StoredArray]:
    """Yield the array of features in a file.

    Raises:
        VideoError: the file cannot be read, or has no array of features.
    """
    # What fails while it is copied or the array is used, as a full disk or a network, is no fault of the file.
    with ExitStack() as stack:
        name = stack.enter_context(_local(path))
        with _failures_told():
            shape, dtype, read = stack.enter_context(_OPENERS[file_format](name))
        yield StoredArray(_checked(tuple(shape), dtype), read)


@contextmanager
def _failures_told() -> Iterator[None]:
    """Turn what libraries raise at files that they cannot read into `VideoError`."""
    try:
        yield
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        raise VideoError(f"its file cannot be read ({_reason(error)})") from None
    except (pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, zlib.error, lzma.LZMAError) as error:
        raise VideoError(f"its file is damaged or of another format ({_reason(error)})") from None
    # What they stumble over where they do not check; its message says nothing of the file.
    except (LookupError, AttributeError, TypeError, AssertionError, struct.error, tokenize.TokenError):
        raise VideoError("its file is damaged or of another format") from None


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _checked(shape: tuple[int, ...], dtype: Any) -> tuple[int, int, int]:
    # The name of a type of NumPy says nothing of the order of its bytes, which is converted.
    kind = dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")
    if kind not in FLOATS:
        raise VideoError(f"its features are {kind} numbers, not {', '.join(FLOATS)}")
    if len(shape) not in (2, 3) or 0 in shape:
        raise VideoError(f"its features have the shape {shape}, not (T, N, D) or (T, D)")
    return (shape[0], 1, shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])


def _one(names: list[str]) -> str:
    """The name of a file's array of features."""
    if len(names) == 1:
        return names[0]
    if not names:
        raise VideoError("its file has no array")
    if NAMED not in names:
        raise VideoError(f"its file has {len(names)} arrays ({', '.join(names[:3])}) and none is named {NAMED!r}")
    return NAMED


@contextmanager
def _local(path: str) -> Iterator[str]:
    """Yield a local file: itself, or a temporary copy of one in an object store."""
    if not storage.is_uri(path):
        yield path
        return
    system, inner = storage.filesystem(path)
    with tempfile.NamedTemporaryFile(prefix="features-") as copy:
        try:
            source = system.open_input_stream(inner)
        except FileNotFoundError:
            raise VideoError("its file cannot be read (it is not there)") from None
        with source as stream:
            shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
        yield copy.name


Opened = tuple[Any, Any, Callable[[int, int], Any]]


@contextmanager
def _npy(path: str) -> Iterator[Opened]:
    array = np.lib.format.open_memmap(path, mode="r")
    yield array.shape, array.dtype, lambda first, stop: array[first:stop]


@contextmanager
def _npz(path: str) -> Iterator[Opened]:
    with zipfile.ZipFile(path) as archive:
        name = _one([name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")])
        with archive.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = header(member)
            if by_column or dtype.hasobject:
                raise ValueError("its array is stored by columns or holds objects; save it again row by row")
            yield shape, dtype, _Rows(member, shape, dtype).read


class _Rows:
    """Rows of an array in a stream, which may be compressed and is read once."""

    def __init__(self, stream: IO[bytes], shape: tuple[int, ...], dtype: Any) -> None:
        self._stream, self._shape, self._dtype, self._next = stream, shape[1:], dtype, 0

    def read(self, first: int, stop: int) -> Any:
        row_bytes = int(np.prod(self._shape)) * self._dtype.itemsize
        while self._next < first:
            self._stream.read(row_bytes)
            self._next += 1
        self._next = stop
        return np.frombuffer(self._stream.read((stop - first) * row_bytes), self._dtype).reshape(-1, *self._shape)


@contextmanager
def _pt(path: str) -> Iterator[Opened]:
    # Files of PyTorch before 1.6 cannot be mapped; they are read whole.
    archive = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        if not archive and file.read(1) != pickle.PROTO:
            raise ValueError("it is not one that torch.save wrote")
    value = torch.load(path, "cpu", weights_only=True, mmap=archive)
    if isinstance(value, Mapping):
        tensors = {str(key): item for key, item in value.items() if isinstance(item, torch.Tensor)}
        value = tensors[_one(list(tensors))] if tensors else None
    if not isinstance(value, torch.Tensor):
        raise ValueError("it holds no tensor")
    if value.layout != torch.strided:
        raise ValueError("its tensor is sparse")
    tensor = value
    yield tensor.shape, tensor.dtype, lambda first, stop: tensor[first:stop]


@contextmanager
def _safetensors(path: str) -> Iterator[Opened]:
    with safe_open(path, "pt") as file:
        name = _one(list(file.keys()))
        stored = file.get_slice(name)
        shape = stored.get_shape()
        yield shape, (stored[0:0] if shape else file.get_tensor(name)).dtype, lambda first, stop: stored[first:stop]


@contextmanager
def _h5(path: str) -> Iterator[Opened]:
    h5py = importlib.import_module("h5py")
    with h5py.File(path, "r") as file:
        stored = file[_one([name for name in file if isinstance(file[name], h5py.Dataset)])]
        # An empty one has None.
        yield stored.shape or (), stored.dtype, lambda first, stop: stored[first:stop]


_OPENERS = {"npy": _npy, "npz": _npz, "pt": _pt, "safetensors": _safetensors, "h5": _h5}
