"""Files on web servers (`http`, `https`), which can only be read, each as a whole. Passing failures are retried."""

from __future__ import annotations

import shutil
import time
import urllib.error
import urllib.request
from typing import IO, Any
from urllib.parse import quote, urlsplit

from pipelines.storage.names import check_no_credentials

SCHEMES = ("http", "https")
ATTEMPTS, TIMEOUT_S = 3, 60.0
"""Attempts at an address, and seconds that a server may be silent."""


def is_web(path: str) -> bool:
    """Return whether a name is a web address."""
    scheme, separator, _ = path.partition("://")
    return bool(separator) and scheme in SCHEMES


def check_exists(path: str) -> None:
    """Ask the server for a file without its content; raises as `download_to` does."""
    _request(path, "HEAD").close()


def size(path: str) -> int:
    """Return a file's size in bytes, 0 where the server does not state it; raises as `download_to` does."""
    with _request(path, "HEAD") as response:
        return int(response.headers.get("Content-Length") or 0)


def download_to(path: str, sink: IO[bytes]) -> None:
    """Copy a file into `sink`, starting again where the connection breaks off.

    Raises:
        FileNotFoundError: the server has no such file.
        OSError: the server does not answer, refuses, or breaks off every time.
        UserError: the address holds credentials.
    """
    for attempt in range(ATTEMPTS):
        sink.seek(0)
        sink.truncate()
        with _request(path) as response:
            stated = response.headers.get("Content-Length")
            try:
                shutil.copyfileobj(response, sink, 1 << 20)
            except OSError as error:
                if attempt == ATTEMPTS - 1:
                    raise OSError(f"the server's response breaks off ({error})") from None
                continue
        # Python ends a body that is too short without an error.
        if stated is None or sink.tell() == int(stated):
            return
    raise OSError(f"the server's response breaks off after {sink.tell()} of {stated} bytes")


def _request(path: str, method: str = "GET") -> Any:
    """Return a server's response, after retrying lost connections, the server's own errors and passing refusals."""
    check_no_credentials(path)
    parts = urlsplit(path)
    address = parts._replace(path=quote(parts.path, safe="/%")).geturl()
    for attempt in range(ATTEMPTS):
        try:
            return urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(f"the server has no such file ({error.code})") from None
            if attempt == ATTEMPTS - 1 or (error.code < 500 and error.code not in (408, 429)):
                raise OSError(f"the server answers {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            if attempt == ATTEMPTS - 1:
                raise OSError(f"the server cannot be reached ({error.reason})") from None
        time.sleep(0.5 * 2**attempt)
    raise AssertionError
