"""MLflow's client: how a process connects to a tracking URI, and what the errors of its requests mean."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import TrackingConfig
from pipelines.errors import UserError
from pipelines.tracking.send_queue import RefusedError, UnavailableError
from pipelines.tracking.uri import OFF, database, database_lock, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
WRONG_HOST = "Invalid Host header"
"""What a server answers, with 403, to a host name that it does not know."""
HTTP_ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""One short attempt a request: the send queue retries. MLflow's own retries would take minutes without a word."""


def set_environment(uri: str) -> None:
    """Set what MLflow takes from environment variables alone, unless the user has; call it before importing mlflow."""
    for name, value in (ENVIRONMENT | (HTTP_ENVIRONMENT if uri.startswith("http") else {})).items():
        os.environ.setdefault(name, value)


def connect(uri: str) -> MlflowClient:
    """Return a client; call it while holding `database_lock`, since it may create the tables of a database.

    A new database gets its name once it has all tables: MLflow never opens one again whose creation was killed.
    """
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    path = database(uri)
    if path and not os.path.exists(path):
        part = f"{path}.new"
        for left in (part, f"{part}-journal"):
            Path(left).unlink(missing_ok=True)
        MlflowClient(tracking_uri=f"sqlite:///{part}")
        os.replace(part, path)
    return MlflowClient(tracking_uri=uri)


def create_database(config: TrackingConfig, out: str) -> None:
    """Import MLflow and create a new tracking database on this machine, so that `start` does not wait for either.

    Raises:
        UserError: the tracking URI makes no sense.
        OSError, MlflowException: the database cannot be created.
    """
    uri = resolve_uri(config, out)
    if uri == OFF:
        return
    set_environment(uri)
    if database(uri):
        with database_lock(uri):
            connect(uri)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise RefusedError or UnavailableError for what MLflow's requests raise.

    Exceptions of `requests` are OSErrors. A file or setting that is wrong here is as final as a refusal there.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
        is_refusal = 400 <= status < 500 and status not in (408, 429)
        raise (RefusedError if is_refusal else UnavailableError)(short_reason(error)) from error
    except (UserError, FileNotFoundError) as error:
        raise RefusedError(short_reason(error)) from error
    except OSError as error:
        raise UnavailableError(short_reason(error)) from error


def short_reason(error: Exception) -> str:
    """Return the cause of a failed request in a few words; `requests` nests it in long messages."""
    text = str(error)
    if WRONG_HOST in text:
        return (
            "it answers 403 to this host name: start it with `mlflow server --allowed-hosts HOST:PORT,localhost:PORT`, "
            "with this host and port in the list, which replaces MLflow's own"
        )
    system = re.search(r"\[Errno -?\d+\] ([\w ]+)|(?:[Rr]ead|[Cc]onnection to \S+) timed out", text)
    return (system[1] or "timed out") if system else (text.splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def reading(uri: str) -> Iterator[MlflowClient]:
    """Yield a client that reads what was logged.

    Raises:
        UserError: there is nothing to read at the URI, or MLflow does not answer.
    """
    if uri == OFF:
        raise UserError("--tracking.uri is 'off': give the one that the runs were logged to")
    file = database(uri)
    if file and not os.path.exists(file):
        raise UserError(f"--tracking.uri is {uri!r}: there is no such database; run a stage first, or give another one")
    set_environment(uri)
    try:
        with translated_errors():
            with database_lock(uri):
                client = connect(uri)
            yield client
    except (UnavailableError, RefusedError) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"--tracking.uri is {uri!r}: MLflow cannot be read there ({error})") from error
