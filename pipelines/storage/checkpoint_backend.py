"""Where below --out a run stores its checkpoints: in a local folder, or in an object store."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyarrow import fs

from pipelines import storage
from s5.checkpoints.backend import CheckpointBackend, LocalBackend
from s5.checkpoints.checkpoint import META, verify
from s5.checkpoints.history import CheckpointHistory
from s5.errors import DamagedError

BLOCK_BYTES = 1 << 24


def checkpoint_backend(path: str) -> CheckpointBackend:
    """Return the backend that stores checkpoints below a path or URI.

    Raises:
        UserError: the URI's scheme is unknown, or its object store cannot be reached.
    """
    path = storage.absolute(path)
    return ObjectStoreBackend(path) if storage.is_uri(path) else LocalBackend(Path(path))


def copy_latest(source: str, target: str) -> bool:
    """Copy the latest sound checkpoint below a path or URI to another one, and return whether that has one now.

    One that is there already is left alone.

    Raises:
        OSError: one of the two places fails.
    """
    here, there = checkpoint_backend(source), checkpoint_backend(target)
    if CheckpointHistory(there).metas():
        return True
    for name in reversed(CheckpointHistory(here).metas()):
        with here.local(name) as folder:
            try:
                verify(folder)
            except DamagedError:
                continue
            # The meta data last: with it, the copy is complete.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == META):
                there.put(name, path.name, _blocks(path))
            return True
    return False


def _blocks(path: Path) -> Iterator[memoryview]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield memoryview(block)


class ObjectStoreBackend:
    """A folder in an object store, where a file becomes visible only when its upload is complete.

    pyarrow uploads it as a multipart stream, so that no local disk is needed.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._system, self._inner = storage.filesystem(location)

    def listing(self) -> dict[str, set[str]]:
        """Return the folders and the names of their files."""
        selector = fs.FileSelector(self._inner, recursive=True, allow_not_found=True)
        found: dict[str, set[str]] = {}
        for info in self._system.get_file_info(selector):
            name, _, file = info.path.removeprefix(f"{self._inner}/").partition("/")
            if file and info.is_file:
                found.setdefault(name, set()).add(file)
        return found

    def put(self, name: str, file: str, blocks: Iterable[memoryview]) -> None:
        """Upload a file."""
        folder = storage.join(self._inner, name)
        storage.make_folder(self._system, folder)
        with self._system.open_output_stream(storage.join(folder, file)) as sink:
            for block in blocks:
                sink.write(block)

    def read(self, name: str, file: str) -> bytes:
        """Return a small file of a checkpoint."""
        return storage.read_bytes(storage.join(self.path(name), file))

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Yield a local copy of the checkpoint, which is deleted afterwards."""
        target = Path(tempfile.mkdtemp(prefix="checkpoint_"))
        try:
            storage.download(self.path(name), target)
            yield target
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Delete a checkpoint, meta.json first."""
        folder = storage.join(self._inner, name)
        storage.remove(storage.join(self.path(name), META))
        with suppress(FileNotFoundError):
            self._system.delete_dir(folder)

    def check_free_space(self, size: int) -> None:
        """Do nothing: an object store does not report its free space."""

    def path(self, name: str) -> str:
        """Return a checkpoint's URI."""
        return storage.join(self.location, name)
