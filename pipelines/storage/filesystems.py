"""The file system behind a name: the local disk, or an object store by pyarrow's clients.

Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS), as does the
address of another service (AWS_ENDPOINT_URL, STORAGE_EMULATOR_HOST for gs://). The clients retry by themselves.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from pipelines.errors import UserError
from pipelines.storage.names import absolute, check_no_credentials, is_uri
from pipelines.storage.web import SCHEMES as WEB_SCHEMES

OBJECT_STORES = ("s3", "gs", "gcs")
"""Schemes whose names are a bucket and a key that may hold any character."""
GCS_RETRY = timedelta(seconds=30)
"""How long Google's client retries, also without credentials; its own limit is 15 minutes."""


def filesystem(path: str) -> tuple[Any, str]:
    """Return pyarrow's file system for a name, and the name within it.

    Raises:
        UserError: the scheme is unknown or can only be read (`http`), or the name holds credentials.
    """
    path = absolute(path)
    if not is_uri(path):
        return fs.LocalFileSystem(), path
    check_no_credentials(path)
    scheme, _, inner = path.partition("://")
    if scheme in WEB_SCHEMES:
        raise UserError(
            f"{path!r}: {scheme} can only read single files, neither list folders nor write; give s3://, gs:// or a "
            "path"
        )
    try:
        if scheme in OBJECT_STORES:
            return _object_store(scheme, inner.partition("/")[0]), inner
        found: tuple[Any, str] = fs.FileSystem.from_uri(path)
        return found
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path!r} cannot be reached: {error}") from None


@lru_cache(maxsize=16)
def _object_store(scheme: str, bucket: str) -> Any:
    # Cached: finding a bucket's region takes a request, and each client starts a thread pool.
    if scheme == "s3":
        return fs.FileSystem.from_uri(f"s3://{bucket}")[0]
    if not (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
        return fs.GcsFileSystem(retry_time_limit=GCS_RETRY)
    host = urlsplit(emulator if is_uri(emulator) else f"http://{emulator}")
    return fs.GcsFileSystem(
        anonymous=True, scheme=host.scheme, endpoint_override=host.netloc, retry_time_limit=GCS_RETRY
    )


def make_folder(system: Any, folder: str) -> None:
    """Create a folder of a file system; does nothing in object stores, which have no folders."""
    # For Google's, pyarrow would create the bucket.
    if not isinstance(system, (fs.S3FileSystem, fs.GcsFileSystem)):
        system.create_dir(folder, recursive=True)
