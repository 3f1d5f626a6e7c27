"""Names of files and folders: a local path, or a URI such as `s3://bucket/key`. No storage is accessed here.

A name is taken literally: `%20` in it does not mean a space. It never holds credentials, since names end up in
manifests, logs and MLflow.
"""

from __future__ import annotations

import os
import re

from pipelines.errors import UserError


def is_uri(path: str) -> bool:
    """Return whether a name has a scheme, such as `s3://`."""
    return "://" in path


def absolute(path: str) -> str:
    """Return a local path or `file://` URI as an absolute path, valid in every process; other URIs unchanged."""
    if path.startswith("file://"):
        return path.removeprefix("file://")
    return path if is_uri(path) else os.path.abspath(os.path.expanduser(path))


def join(base: str, *parts: str) -> str:
    """Return a name below another."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def redacted(text: str) -> str:
    """Return a text with the users, passwords and query strings of its URIs replaced by `***`."""
    text = re.sub(r"(\w://)[^/\s]*@", r"\1***@", text)
    # A secret may contain a slash; a port, which also follows a colon, is a number.
    text = re.sub(r"(\w://)[^/\s:@]+:(?!\d+(?:/|\s|$))[^\s'\"]*@", r"\1***@", text)
    return re.sub(r"(\w://[^?\s'\"]*\?)[^\s'\"]+", r"\1***", text)


def check_no_credentials(path: str) -> None:
    """Check that a URI holds no user, password or query string (which may be a signature).

    Raises:
        UserError: it holds one; the message shows it redacted.
    """
    if is_uri(path) and redacted(path) != path:
        raise UserError(
            f"{redacted(path)!r} holds credentials or a query: give the name alone, and credentials, endpoint and "
            "region by the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION)"
        )
