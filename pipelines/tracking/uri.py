"""Tracking URIs: which MLflow store a stage logs to, and the lock of one that is a database file."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines import storage
from pipelines.config import TrackingConfig
from pipelines.errors import UserError

OFF = "off"
VARIABLE = "MLFLOW_TRACKING_URI"
SERVER_REMEDY = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
DATABASE_REMEDY = "the database's own variables or password file (PGUSER and PGPASSWORD for PostgreSQL)"
SECRET_PARAMETER = re.compile(r"[?&;][^=&]*(pass|pwd|secret|token|key|auth|sig|credential)[^=&]*=", re.IGNORECASE)


def resolve_uri(config: TrackingConfig, out: str) -> str:
    """Return the tracking URI of a stage that writes to `out`, valid in any working directory; `off` for none.

    Raises:
        UserError: a URI that holds credentials, a `file:` store, which MLflow no longer supports, or no URI at all
            where `out` is on an object store.
    """
    uri = config.uri or os.environ.get(VARIABLE, "")
    check_without_credentials(uri, "--tracking.uri" if config.uri else VARIABLE)
    out = storage.absolute(out)
    if not uri:
        if storage.is_uri(out):
            remedy = "give --tracking.uri http://... of an MLflow server, or --tracking.uri off"
            raise UserError(f"--tracking.uri is empty and --out is {out!r}, where no database can be: {remedy}")
        return f"sqlite:///{os.path.dirname(out)}/mlflow.db"
    if uri.startswith("sqlite:"):
        path, mark, query = uri.removeprefix("sqlite:///").partition("?")
        if not path or path.startswith(("sqlite:", ":memory:")):
            raise UserError(f"--tracking.uri is {uri!r}: give sqlite:///FOLDER/mlflow.db")
        return f"sqlite:///{storage.absolute(path)}{mark}{query}"
    if uri.startswith("file:"):
        raise UserError(
            f"--tracking.uri is {uri!r}: MLflow no longer supports file stores; give sqlite:///FOLDER/mlflow.db"
        )
    if uri in (OFF, "databricks") or ":" in uri:
        return uri.rstrip("/")
    path = storage.absolute(uri)
    return f"sqlite:///{path}" if path.endswith(".db") else f"sqlite:///{path}/mlflow.db"


def check_without_credentials(uri: str, name: str) -> None:
    """Check that a tracking URI, which ends up in run.json, result.json and MLflow itself, holds no credentials.

    Args:
        uri: the URI.
        name: the setting or variable that it is given by.

    Raises:
        UserError: it holds a user and password, a token or a query; the message shows none of it.
    """
    scheme, mark, rest = uri.partition("://")
    is_server = scheme.lower() in ("http", "https")
    # A password may contain a slash, so all up to the last @ counts; a database's user alone is no secret.
    user, at, _ = rest.rpartition("@")
    holds_user = bool(at) and (is_server or ":" in user)
    if mark and (holds_user or (is_server and "?" in rest) or SECRET_PARAMETER.search(rest)):
        host = rest.rpartition("@")[2].partition("?")[0]
        remedy = SERVER_REMEDY if is_server else DATABASE_REMEDY
        raise UserError(
            f"{name} holds credentials or a query: give {scheme}://{host} alone, and credentials by the environment: "
            f"{remedy}"
        )


def run_link(uri: str, experiment_id: str, run_id: str) -> str:
    """Return the address of a run's page on an MLflow server; empty for other URIs."""
    return f"{uri}/#/experiments/{experiment_id}/runs/{run_id}" if uri.startswith("http") else ""


def database(uri: str) -> str:
    """Return the file of a sqlite URI; empty for other URIs."""
    return uri.removeprefix("sqlite:///").partition("?")[0] if uri.startswith("sqlite:") else ""


@contextmanager
def database_lock(uri: str) -> Iterator[None]:
    """Hold the lock of a database file: processes that create its tables at the same time would corrupt it."""
    path = database(uri)
    if not path:
        yield
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
