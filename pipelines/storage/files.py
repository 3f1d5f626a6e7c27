"""Read and write files by name, alike on local disks and object stores; files on web servers can be read only.

Every write is atomic: readers see the old file or the new one, never a part.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.errors import UserError
from pipelines.storage import web
from pipelines.storage.filesystems import filesystem, make_folder
from pipelines.storage.names import absolute, is_uri, join

WHOLE_BYTES = 8 << 20
"""Videos up to this size are fetched at once; of longer ones only the ranges that are decoded."""


# --- what is there --------------------------------------------------------------------------------------------------


def exists(path: str) -> bool:
    """Return whether there is a file or folder of that name; raise `UserError` where it cannot be reached."""
    return bool(_type(path) != fs.FileType.NotFound)


def is_folder(path: str) -> bool:
    """Return whether there is a folder of that name; raise `UserError` where it cannot be reached."""
    return bool(_type(path) == fs.FileType.Directory)


def _type(path: str) -> Any:
    try:
        if web.is_web(path):
            web.check_exists(path)
            return fs.FileType.File
        system, inner = filesystem(path)
        return system.get_file_info(inner).type
    except FileNotFoundError:
        return fs.FileType.NotFound
    except OSError as error:
        raise UserError(f"{path!r} cannot be reached: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    # Google's client repeats its message after this mark.
    return error.strerror or str(error).partition(" error_info=")[0]


def size(path: str) -> int:
    """Return a file's size in bytes; 0 where a web server does not state it."""
    if web.is_web(path):
        return web.size(path)
    system, inner = filesystem(path)
    return int(system.get_file_info(inner).size or 0)


def entries(path: str) -> list[str]:
    """Return the names in a folder, sorted, those of folders with a slash behind; none where there is none."""
    system, inner = filesystem(path)
    infos = system.get_file_info(fs.FileSelector(inner, allow_not_found=True))
    return sorted(info.base_name + "/" * (info.type == fs.FileType.Directory) for info in infos)


def files_below(path: str) -> list[str]:
    """Return the names of the files in a folder, sorted; none where there is no such folder."""
    return [join(path, name) for name in entries(path) if not name.endswith("/") and not name.startswith(".")]


def check_writable(out: str, option: str = "--out") -> None:
    """Create a folder and write to it, so that a run fails before its work rather than after.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    probe = join(out, f".{uuid.uuid4().hex}.part")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except OSError as error:
        raise UserError(
            f"{option} is {out!r}: it cannot be written to ({_reason(error)}); give a folder that can"
        ) from None


# --- reading --------------------------------------------------------------------------------------------------------


def read_bytes(path: str) -> bytes:
    """Return a file's content."""
    if web.is_web(path):
        web.download_to(path, content := io.BytesIO())
        return content.getvalue()
    system, inner = filesystem(path)
    with system.open_input_stream(inner) as stream:
        return bytes(stream.readall())


def read_json(path: str) -> Any:
    """Return the value of a JSON file."""
    return json.loads(read_bytes(path))


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """Return a Parquet file as a table."""
    if web.is_web(path):
        return pq.read_table(io.BytesIO(read_bytes(path)), columns=columns)
    system, inner = filesystem(path)
    return pq.read_table(inner, columns=columns, filesystem=system)


@contextmanager
def open_video(path: str, whole: bool | Callable[[IO[bytes]], bool] = False) -> Iterator[str | IO[bytes]]:
    """Yield what a decoder can read: a local path, or an open file.

    A long video in an object store is an open file that fetches only the ranges that are read, or a temporary copy
    where all of it will be read (`whole`, or what it says of the open file). A video on a web server is always copied:
    not every server serves ranges.

    Raises:
        OSError: it is not there or cannot be fetched.
        UserError: see `filesystem`.
    """
    path = absolute(path)
    if not is_uri(path):
        yield path
    elif web.is_web(path):
        with tempfile.NamedTemporaryFile(prefix="video-") as copy:
            web.download_to(path, copy)
            copy.flush()
            yield copy.name
    else:
        system, inner = filesystem(path)
        with system.open_input_file(inner) as file:
            if file.size() <= WHOLE_BYTES:
                yield io.BytesIO(file.read())
            elif not (whole(file) if callable(whole) else whole):
                yield file
            else:
                with tempfile.TemporaryFile(prefix="video-") as copy:
                    # One request: reading packet by packet would take hundreds.
                    with system.open_input_stream(inner) as stream:
                        shutil.copyfileobj(stream, copy, 1 << 20)
                    yield copy


def download(path: str, folder: Path) -> None:
    """Copy a folder's files into a local folder."""
    system, inner = filesystem(path)
    for info in system.get_file_info(fs.FileSelector(inner, recursive=True)):
        # Object stores may list the files alone.
        (folder / info.path.removeprefix(inner.rstrip("/") + "/")).parent.mkdir(parents=True, exist_ok=True)
    fs.copy_files(inner, str(folder), source_filesystem=system, destination_filesystem=fs.LocalFileSystem())


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str) -> Iterator[str]:
    """Yield the name of a local file to write, which becomes the file `path` unless an error is raised."""
    system, inner = filesystem(path)
    if isinstance(system, fs.LocalFileSystem):
        part = Path(inner.rpartition("/")[0]) / f".{uuid.uuid4().hex}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield str(part)
            part.replace(inner)
        finally:
            part.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="video-") as temporary:
        part = Path(temporary) / "part"
        yield str(part)
        make_folder(system, inner.rpartition("/")[0])
        with part.open("rb") as source, system.open_output_stream(inner) as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def write_bytes(path: str, content: bytes) -> None:
    """Write a whole file, creating its folders."""
    system, inner = filesystem(path)
    if isinstance(system, fs.LocalFileSystem):
        with atomic_write(path) as part:
            Path(part).write_bytes(content)
        return
    make_folder(system, inner.rpartition("/")[0])
    with system.open_output_stream(inner) as stream:
        stream.write(content)


def create_bytes(path: str, content: bytes) -> bool:
    """Write a whole file unless there is one of that name, and return whether it was written.

    On a local disk, one of several callers at most is told so. Of an object store pyarrow cannot ask for that: there
    several may be that come at the same moment, and the file is the last one's.
    """
    system, inner = filesystem(path)
    if not isinstance(system, fs.LocalFileSystem):
        if exists(path):
            return False
        write_bytes(path, content)
        return True
    try:
        with open(inner, "xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def write_json(path: str, value: Any) -> None:
    """Write a value as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def write_table(path: str, table: pa.Table) -> None:
    """Write a table as one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(path, sink.getvalue().to_pybytes())


@contextmanager
def table_writer(path: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Yield a writer for one Parquet file that is written in parts; it appears when the block ends without an error."""
    with atomic_write(path) as part, pq.ParquetWriter(part, schema) as writer:
        yield writer


def remove(path: str) -> None:
    """Delete a file if it is there."""
    system, inner = filesystem(path)
    if system.get_file_info(inner).type == fs.FileType.File:
        system.delete_file(inner)


def remove_folder(path: str) -> None:
    """Delete a folder and all in it, if it is there."""
    system, inner = filesystem(path)
    if system.get_file_info(inner).type == fs.FileType.Directory:
        system.delete_dir(inner)
