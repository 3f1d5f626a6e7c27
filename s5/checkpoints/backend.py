"""Where the checkpoints of a run are stored, one folder each: the protocol of such a place, and a local folder."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from s5.checkpoints.checkpoint import META


class CheckpointBackend(Protocol):
    """A place that stores checkpoints. Whatever fails there raises `OSError`."""

    location: str
    """Path or URI of the folder that holds the checkpoints' folders."""

    def listing(self) -> dict[str, set[str]]:
        """Return the folders and the names of their files; empty where nothing has been stored."""

    def put(self, name: str, file: str, blocks: Iterable[memoryview]) -> None:
        """Write a file of a checkpoint: it is durable on return, and no file of that name is visible before."""

    def read(self, name: str, file: str) -> bytes:
        """Return a small file of a checkpoint."""

    def local(self, name: str) -> AbstractContextManager[Path]:
        """Yield a checkpoint as a local folder: itself, or a copy that is deleted afterwards."""

    def remove(self, name: str) -> None:
        """Delete a checkpoint, meta.json first, so that one that is half deleted is no checkpoint."""

    def check_free_space(self, size: int) -> None:
        """Raise `OSError` where so many bytes are known not to fit."""

    def path(self, name: str) -> str:
        """Return a checkpoint's path or URI."""


class LocalBackend:
    """A folder on this machine's disk, or one shared over the network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def listing(self) -> dict[str, set[str]]:
        """Return the folders and the names of their files."""
        found: dict[str, set[str]] = {}
        with suppress(FileNotFoundError):
            for path in list(self.folder.iterdir()):
                # Another process may delete one meanwhile.
                with suppress(FileNotFoundError, NotADirectoryError):
                    found[path.name] = set(os.listdir(path))
        return found

    def put(self, name: str, file: str, blocks: Iterable[memoryview]) -> None:
        """Write a file under a temporary name, flush it to the disk, then rename it."""
        target = self.folder / name / file
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{file}.part")
        try:
            # Unbuffered: a block goes to the system as it is, while Python's lock (GIL) is free.
            with part.open("wb", buffering=0) as sink:
                for block in blocks:
                    _write(sink.fileno(), block)
                os.fsync(sink.fileno())
            part.replace(target)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        for folder in (target.parent, self.folder):
            _sync(folder)

    def read(self, name: str, file: str) -> bytes:
        """Return a small file of a checkpoint."""
        return (self.folder / name / file).read_bytes()

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Yield the checkpoint's folder itself."""
        yield self.folder / name

    def remove(self, name: str) -> None:
        """Delete a checkpoint, meta.json first."""
        (self.folder / name / META).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder / name)

    def check_free_space(self, size: int) -> None:
        """Raise `OSError` where the disk has fewer bytes free."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < size:
            text = f"{os.strerror(errno.ENOSPC)}: {free / 1e6:,.1f} MB are free, {size / 1e6:,.1f} MB needed"
            raise OSError(errno.ENOSPC, text)

    def path(self, name: str) -> str:
        """Return a checkpoint's path."""
        return str(self.folder / name)


def _write(descriptor: int, block: memoryview) -> None:
    while block:
        block = block[os.write(descriptor, block) :]


def _sync(folder: Path) -> None:
    """Flush the names in a folder to the disk, where its file system supports that; some on networks do not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
