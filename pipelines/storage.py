"""Files on local disks and object stores under one kind of name: a path or a URI (`s3://`, `gs://`, `file://`).

Every write is atomic: readers see the old file or the new one.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.config import UserError


def is_uri(path: str) -> bool:
    """Return whether a name has a scheme, such as `s3://`."""
    return "://" in path


def absolute(path: str) -> str:
    """Return a URI as it is (`file://` as a path) and a local path made absolute, so that every process finds it."""
    if path.startswith("file://"):
        return path.removeprefix("file://")
    return path if is_uri(path) else os.path.abspath(os.path.expanduser(path))


def join(base: str, *parts: str) -> str:
    """Return a name below another."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(path: str) -> tuple[Any, str]:
    """Return pyarrow's file system for a name, and the name within it.

    Raises:
        UserError: the scheme is unknown.
    """
    if not is_uri(path):
        return fs.LocalFileSystem(), absolute(path)
    try:
        found: tuple[Any, str] = fs.FileSystem.from_uri(path)
        return found
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path!r} cannot be reached: {error}") from None


def exists(path: str) -> bool:
    """Return whether a file or folder is there."""
    system, inner = filesystem(path)
    return bool(system.get_file_info(inner).type != fs.FileType.NotFound)


def is_folder(path: str) -> bool:
    """Return whether there is a folder of that name."""
    system, inner = filesystem(path)
    return bool(system.get_file_info(inner).type == fs.FileType.Directory)


def read_bytes(path: str) -> bytes:
    """Return a file's content."""
    system, inner = filesystem(path)
    with system.open_input_stream(inner) as stream:
        return bytes(stream.readall())


def write_bytes(path: str, content: bytes) -> None:
    """Write a whole file, making its folders."""
    system, inner = filesystem(path)
    folder = inner.rpartition("/")[0]
    if not isinstance(system, fs.LocalFileSystem):
        system.create_dir(folder, recursive=True)
        with system.open_output_stream(inner) as stream:
            stream.write(content)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    part = Path(folder) / f".{uuid.uuid4().hex}.part"
    try:
        part.write_bytes(content)
        part.replace(inner)
    finally:
        part.unlink(missing_ok=True)


def remove(path: str) -> None:
    """Delete a file if it is there."""
    system, inner = filesystem(path)
    if system.get_file_info(inner).type == fs.FileType.File:
        system.delete_file(inner)


def read_json(path: str) -> Any:
    """Return the value of a JSON file."""
    return json.loads(read_bytes(path))


def write_json(path: str, value: Any) -> None:
    """Write a value as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """Return a parquet file as a table."""
    system, inner = filesystem(path)
    return pq.read_table(inner, columns=columns, filesystem=system)


def write_table(path: str, table: pa.Table) -> None:
    """Write a table as one parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def check_writable(out: str, option: str = "--out") -> None:
    """Make a folder and try to write there, so that a run fails before its work rather than after.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    probe = join(out, f".{uuid.uuid4().hex}.part")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{option} is {out!r}: it cannot be written to ({reason}); give a folder that can") from None


def download(path: str, folder: Path) -> None:
    """Copy a folder's files into a local folder."""
    system, inner = filesystem(path)
    fs.copy_files(inner, str(folder), source_filesystem=system, destination_filesystem=fs.LocalFileSystem())
