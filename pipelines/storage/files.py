"""Files on local disks and object stores under one kind of name: a path or a URI (`s3://`, `gs://`, `file://`), and, to
be read alone, `http(s)://`.

A name is taken as it is: `%20` in it is no space. It holds no credentials, since names end up in manifests, logs and
tracking: these come from the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS), as does the
address of another service (AWS_ENDPOINT_URL, STORAGE_EMULATOR_HOST for gs://). What object stores answer for a while is
tried again: by pyarrow's clients, or here. Every write is atomic: readers see the old file or the new one.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.errors import UserError

RAW_SCHEMES = ("s3", "gs", "gcs")
"""Object stores, whose names are a bucket and a key that may hold any character."""
WEB_SCHEMES = ("http", "https")
WHOLE_BYTES = 8 << 20
"""Videos up to this size are fetched at once; of longer ones only the ranges that are decoded."""
GCS_RETRY = timedelta(seconds=30)
"""How long Google's client tries again, also where there are no credentials; its own limit is 15 minutes."""
WEB_TRIES, WEB_TIMEOUT_S = 3, 60.0
"""Attempts at a web address, and seconds that a server may be silent."""


def is_uri(path: str) -> bool:
    """Return whether a name has a scheme, such as `s3://`."""
    return "://" in path


def absolute(path: str) -> str:
    """Return a URI as it is (`file://` as a path) and a local path made absolute, so that every process finds it."""
    if path.startswith("file://"):
        return path.removeprefix("file://")
    return path if is_uri(path) else os.path.abspath(os.path.expanduser(path))


def redacted(text: str) -> str:
    """Return a text without the users, passwords and query strings of the URIs in it."""
    text = re.sub(r"(\w://)[^/\s]*@", r"\1***@", text)
    return re.sub(r"(\w://[^?\s'\"]*\?)[^\s'\"]+", r"\1***", text)


def check_plain(path: str) -> None:
    """Raise `UserError` where a URI holds a user, a password or a query string, which may be a signature."""
    if is_uri(path) and redacted(path) != path:
        raise UserError(
            f"{redacted(path)!r} holds credentials or a query: give the name alone, and credentials, endpoint and "
            "region by the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION)"
        )


def join(base: str, *parts: str) -> str:
    """Return a name below another."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(path: str) -> tuple[Any, str]:
    """Return pyarrow's file system for a name, and the name within it.

    Raises:
        UserError: the scheme is unknown, or one that cannot be listed and written, or the name holds credentials.
    """
    path = absolute(path)
    if not is_uri(path):
        return fs.LocalFileSystem(), path
    check_plain(path)
    scheme, _, inner = path.partition("://")
    if scheme in WEB_SCHEMES:
        raise UserError(
            f"{path!r}: files can be read over {scheme}, not folders or written; give s3://, gs:// or a path"
        )
    try:
        if scheme in RAW_SCHEMES:
            return _bucket(scheme, inner.partition("/")[0]), inner
        found: tuple[Any, str] = fs.FileSystem.from_uri(path)
        return found
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path!r} cannot be reached: {error}") from None


@lru_cache(maxsize=16)
def _bucket(scheme: str, name: str) -> Any:
    # Finding a bucket's region takes a request, and each client a pool of threads.
    if scheme == "s3":
        return fs.FileSystem.from_uri(f"s3://{name}")[0]
    if not (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
        return fs.GcsFileSystem(retry_time_limit=GCS_RETRY)
    host = urlsplit(emulator if is_uri(emulator) else f"http://{emulator}")
    return fs.GcsFileSystem(
        anonymous=True, scheme=host.scheme, endpoint_override=host.netloc, retry_time_limit=GCS_RETRY
    )


def make_folder(system: Any, folder: str) -> None:
    """Make a folder of a file system where it has such a thing: object stores have none."""
    # For Google's, pyarrow would make the bucket.
    if not isinstance(system, (fs.S3FileSystem, fs.GcsFileSystem)):
        system.create_dir(folder, recursive=True)


def exists(path: str) -> bool:
    """Return whether a file or folder is there; raise `UserError` where that cannot be found out."""
    return bool(_kind(path) != fs.FileType.NotFound)


def is_folder(path: str) -> bool:
    """Return whether there is a folder of that name; raise `UserError` where that cannot be found out."""
    return bool(_kind(path) == fs.FileType.Directory)


def _kind(path: str) -> Any:
    try:
        if _is_web(path):
            _web(path, "HEAD").close()
            return fs.FileType.File
        system, inner = filesystem(path)
        return system.get_file_info(inner).type
    except FileNotFoundError:
        return fs.FileType.NotFound
    except OSError as error:
        raise UserError(f"{path!r} cannot be reached: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    # Google's client says all of it twice.
    return error.strerror or str(error).partition(" error_info=")[0]


def read_bytes(path: str) -> bytes:
    """Return a file's content."""
    if _is_web(path):
        _fetch(path, content := io.BytesIO())
        return content.getvalue()
    system, inner = filesystem(path)
    with system.open_input_stream(inner) as stream:
        return bytes(stream.readall())


@contextmanager
def opened(path: str, whole: bool = False) -> Iterator[str | IO[bytes]]:
    """Give what a decoder can read: a local path, or an open file.

    Of a long video in an object store, the file fetches the ranges that are read of it or, where it will be read as a
    `whole`, is a temporary copy. A file on the web is copied always, whether or not the server knows ranges.

    Raises:
        OSError: it is not there or cannot be fetched.
        UserError: see `filesystem`.
    """
    path = absolute(path)
    if not is_uri(path):
        yield path
    elif _is_web(path):
        with tempfile.NamedTemporaryFile(prefix="video-") as copy:
            _fetch(path, copy)
            copy.flush()
            yield copy.name
    else:
        system, inner = filesystem(path)
        with system.open_input_file(inner) as file:
            if file.size() <= WHOLE_BYTES:
                yield io.BytesIO(file.read())
            elif not whole:
                yield file
            else:
                with tempfile.TemporaryFile(prefix="video-") as copy:
                    # One request: reading packet by packet would take hundreds.
                    with system.open_input_stream(inner) as stream:
                        shutil.copyfileobj(stream, copy, 1 << 20)
                    yield copy


def _is_web(path: str) -> bool:
    return path.partition("://")[0] in WEB_SCHEMES and is_uri(path)


def _web(path: str, method: str = "GET") -> Any:
    """Return a server's answer, trying again what may pass: lost connections, and its own or passing errors.

    Raises:
        FileNotFoundError: the server says that there is no such file.
        OSError: it does not answer, or refuses.
    """
    check_plain(path)
    parts = urlsplit(path)
    address = parts._replace(path=quote(parts.path, safe="/%")).geturl()
    for attempt in range(WEB_TRIES):
        try:
            return urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=WEB_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(f"the server has no such file ({error.code})") from None
            if attempt == WEB_TRIES - 1 or (error.code < 500 and error.code not in (408, 429)):
                raise OSError(f"the server answers {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            if attempt == WEB_TRIES - 1:
                raise OSError(f"the server cannot be reached ({error.reason})") from None
        time.sleep(0.5 * 2**attempt)
    raise AssertionError


def _fetch(path: str, sink: IO[bytes]) -> None:
    """Copy a file on the web, from the start again where the connection breaks off; see `_web` for the errors."""
    for attempt in range(WEB_TRIES):
        sink.seek(0)
        sink.truncate()
        with _web(path) as answer:
            stated = answer.headers.get("Content-Length")
            try:
                shutil.copyfileobj(answer, sink, 1 << 20)
            except OSError as error:
                if attempt == WEB_TRIES - 1:
                    raise OSError(f"the server's answer breaks off ({error})") from None
                continue
        # Python ends a body that is too short without an error.
        if stated is None or sink.tell() == int(stated):
            return
    raise OSError(f"the server's answer breaks off after {sink.tell()} of {stated} bytes")


def write_bytes(path: str, content: bytes) -> None:
    """Write a whole file, making its folders."""
    system, inner = filesystem(path)
    folder = inner.rpartition("/")[0]
    if not isinstance(system, fs.LocalFileSystem):
        make_folder(system, folder)
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


@contextmanager
def written(path: str) -> Iterator[str]:
    """Give the name of a local file to write, which becomes the file of that name unless an error is raised."""
    system, inner = filesystem(path)
    folder = inner.rpartition("/")[0]
    if isinstance(system, fs.LocalFileSystem):
        part = Path(folder) / f".{uuid.uuid4().hex}.part"
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
        make_folder(system, folder)
        with part.open("rb") as source, system.open_output_stream(inner) as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def size(path: str) -> int:
    """Return a file's bytes; 0 where a web server does not say."""
    if _is_web(path):
        with _web(path, "HEAD") as answer:
            return int(answer.headers.get("Content-Length") or 0)
    system, inner = filesystem(path)
    return int(system.get_file_info(inner).size or 0)


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
    if _is_web(path):
        return pq.read_table(io.BytesIO(read_bytes(path)), columns=columns)
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
        raise UserError(
            f"{option} is {out!r}: it cannot be written to ({_reason(error)}); give a folder that can"
        ) from None


def download(path: str, folder: Path) -> None:
    """Copy a folder's files into a local folder."""
    system, inner = filesystem(path)
    for info in system.get_file_info(fs.FileSelector(inner, recursive=True)):
        # Object stores may list the files alone.
        (folder / info.path.removeprefix(inner.rstrip("/") + "/")).parent.mkdir(parents=True, exist_ok=True)
    fs.copy_files(inner, str(folder), source_filesystem=system, destination_filesystem=fs.LocalFileSystem())
