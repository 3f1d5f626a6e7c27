"""MLflow: where runs are logged and read back. The only file that imports mlflow.

Nothing here slows training down or stops it: what is logged goes to a `SendQueue`, whose thread sends it and waits for
a server that is away. What is still unsent at the end is stored beside the results of the stage.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import storage
from pipelines.config import TrackingConfig
from pipelines.errors import UserError
from pipelines.storage import provenance
from pipelines.tracking.send_queue import (
    AwayError,
    Call,
    RefusedError,
    Row,
    SendQueue,
    read_rows,
    reason,
    say,
    write_rows,
)
from pipelines.tracking.uri import OFF, alone, database, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

RUN_FILE = "mlflow_run.json"
UNSENT_FILE = "metrics_unsent.jsonl"
PARENT_TAG = "mlflow.parentRunId"
VALUE_CHARACTERS = 6000  # MLflow's limits
PARAMS_A_REQUEST = 100
RUNS_BELOW = 10_000
FLUSH_S = 30.0
START_S = 15.0
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true"}
# One short try a request: the send queue repeats it. MLflow's own repeats would take minutes in silence.
HTTP_ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


# --- the store ------------------------------------------------------------------------------------------------------


def _set_environment(uri: str) -> None:
    """Set what MLflow takes from the environment alone, where the user has not; before mlflow is imported."""
    for name, value in (ENVIRONMENT | (HTTP_ENVIRONMENT if uri.startswith("http") else {})).items():
        os.environ.setdefault(name, value)


def _connect(uri: str) -> MlflowClient:
    """Return a client; to be called within `alone`."""
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
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
    _set_environment(uri)
    if database(uri):
        with alone(uri):
            _connect(uri)


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what a request raises into RefusedError or AwayError (the exceptions of `requests` are OSErrors)."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
        refused = 400 <= status < 500 and status not in (408, 429)
        raise (RefusedError if refused else AwayError)(reason(error)) from error
    except (UserError, FileNotFoundError) as error:
        raise RefusedError(reason(error)) from error
    except OSError as error:
        raise AwayError(reason(error)) from error


# --- a run that is being logged -------------------------------------------------------------------------------------


class Tracker:
    """An MLflow run that is being logged. All methods but `finish` return at once; with `off` none acts.

    Made by `start`. `find` makes or finds the run and returns its id.
    """

    def __init__(self, uri: str, out: str, find: Callable[[MlflowClient], str]) -> None:
        self.uri = uri
        self.run_id: str | None = None
        """The run's id; None until MLflow has answered."""
        self._out = out
        self._find = find
        self._client: MlflowClient | None = None
        self._send_queue = None if uri == OFF else SendQueue(f"MLflow at {uri}", self._send_rows)
        if self._send_queue:
            _set_environment(uri)
            self._send_queue.put(Call("the run", self._open, vital=True))

    def log(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Queue values of metrics; characters that MLflow forbids in names become `_`.

        Args:
            metrics: values by name.
            step: where they belong; None for a final result, which takes the place of the last value at its step.
        """
        if self._send_queue:
            now = int(time.time() * 1000)
            self._send_queue.put(*(Row(_allowed(key), float(value), now, step) for key, value in metrics.items()))

    def artifact(self, path: str) -> None:
        """Queue a file, a path or URI; it is read when it is sent."""
        self._call(path, lambda client, run_id: _send_artifact(client, run_id, path))

    def finish(self, status: str) -> None:
        """Send what is queued or was left unsent, waiting up to `FLUSH_S`, and end the run.

        Args:
            status: `FINISHED`, `FAILED` or `KILLED`.
        """
        if self._send_queue is None:
            return
        ended = int(time.time() * 1000)
        self._send_queue.put(*read_rows(storage.join(self._out, UNSENT_FILE)))
        self._call("the end", lambda client, run_id: client.set_terminated(run_id, status, ended))
        send_queue, self._send_queue = self._send_queue, None
        unsent = send_queue.flush(FLUSH_S)
        self._keep([item for item in unsent if isinstance(item, Row)], bool(unsent))
        if send_queue.refused:
            say(
                f"MLflow at {self.uri} refused {send_queue.refused} entries of this run; the last: {send_queue.failure}"
            )

    def _call(self, what: str, send: Callable[[MlflowClient, str], None]) -> None:
        def translated() -> None:
            with _translated():
                send(*self._opened())

        if self._send_queue:
            self._send_queue.put(Call(what, translated))

    def _opened(self) -> tuple[MlflowClient, str]:
        assert self._client is not None  # `_open` is vital and comes first
        assert self.run_id is not None
        return self._client, self.run_id

    def _open(self) -> None:
        with _translated(), alone(self.uri):
            self._client = self._client or _connect(self.uri)
            self.run_id = self._find(self._client)

    def _send_rows(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        client, run_id = self._opened()
        with _translated():
            placed = _placed(client, run_id, rows)
            metrics = [Metric(row.key, row.value, row.timestamp, row.step or 0) for row in placed]
            client.log_batch(run_id, metrics)

    def _keep(self, rows: list[Row], is_incomplete: bool) -> None:
        """Write unsent rows beside the results, or delete those of earlier processes once they are sent."""
        path = storage.join(self._out, UNSENT_FILE)
        if is_incomplete:
            write_rows(path, rows)
            say(f"MLflow at {self.uri} did not take all that was logged: {len(rows)} values are kept in {path}")
        else:
            storage.remove(path)


def _allowed(key: str) -> str:
    return re.sub(r"[^\w\-./ :]", "_", key, flags=re.ASCII)


def _placed(client: MlflowClient, run_id: str, rows: list[Row]) -> list[Row]:
    """Give final results the step of their metric's last value, and a later time: step 0 would bend its curve."""
    if rows[0].step is not None:  # the send queue does not mix the two
        return rows
    known = client.get_run(run_id).data.metrics
    placed = []
    for row in rows:
        history = client.get_metric_history(run_id, row.key) if row.key in known else []
        step, last = max(((old.step, old.timestamp) for old in history), default=(0, 0))
        placed.append(Row(row.key, row.value, max(row.timestamp, last + 1), step))
    return placed


def _send_artifact(client: MlflowClient, run_id: str, path: str) -> None:
    """Send a file; a failing artifact store must not hold up the metrics behind it while MLflow answers."""
    try:
        with _translated():
            if storage.is_uri(path):
                with tempfile.TemporaryDirectory() as scratch:
                    local = Path(scratch) / path.rpartition("/")[2]
                    local.write_bytes(storage.read_bytes(path))
                    client.log_artifact(run_id, str(local))
            else:
                client.log_artifact(run_id, path)
    except AwayError as error:
        client.get_run(run_id)
        raise RefusedError(str(error)) from error


# --- starting one ---------------------------------------------------------------------------------------------------


def start(config: TrackingConfig, *, stage: str, out: str, params: Mapping[str, Any], parent_run: str = "") -> Tracker:
    """Make the MLflow run of a stage, or go on with the one that an earlier start with the same `out` made.

    Args:
        config: where to log.
        stage: name of the stage.
        out: where the stage writes.
        params: its settings under dotted keys; changed ones of a resumed run keep their first value.
        parent_run: id of the run to nest this one under.

    Raises:
        UserError: MLflow refuses the run, or a local database cannot be opened. A server that does not answer raises
            nothing: the run is made when it does.
    """
    uri = resolve_uri(config, out)
    out = storage.absolute(out)
    tags = {"stage": stage, "out": out, "commit": provenance.commit()}
    if parent_run:
        tags[PARENT_TAG] = parent_run

    def find(client: MlflowClient) -> str:
        experiment = _experiment_id(client, uri, config.experiment)
        run = _earlier_run(client, uri, experiment, out)
        if run is None:
            run = client.create_run(experiment, tags=tags, run_name=config.run_name or stage)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
        # First of all, so that a next try finds the run.
        storage.write_json(storage.join(out, RUN_FILE), {"uri": uri, "run_id": run.info.run_id})
        _log_params(client, run, params)
        return str(run.info.run_id)

    tracker = Tracker(uri, out, find)
    if tracker._send_queue:
        _check_first_try(tracker._send_queue, uri)
    settings = storage.join(out, "run.json")
    if storage.exists(settings):
        tracker.artifact(settings)
    return tracker


def _check_first_try(send_queue: SendQueue, uri: str) -> None:
    """Wait for the run, and raise where it cannot come to be; a server may be away, a local database may not."""
    local = bool(database(uri))
    send_queue.tried.wait(None if local else START_S)
    failure = send_queue.failure
    if isinstance(failure, RefusedError) or (failure and local):
        send_queue.flush(0)
        if isinstance(failure.__cause__, UserError):
            raise failure.__cause__
        raise UserError(f"--tracking.uri is {uri!r}: {failure}; give another one, or --tracking.uri off") from failure


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Without this, the files of a database's runs would land in the working directory.
        file = database(uri)
        folder = f"{os.path.dirname(file)}/mlartifacts" if file else None
        try:
            return str(client.create_experiment(name, artifact_location=folder))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        remedy = "restore it with `mlflow experiments restore`, or give another name"
        raise UserError(f"--tracking.experiment {name!r} was deleted in MLflow at {uri}: {remedy}")
    return str(experiment.experiment_id)


def _earlier_run(client: MlflowClient, uri: str, experiment: str, out: str) -> MlflowRun | None:
    """Return the run that the file in `out` tells of, unless it was deleted or belongs elsewhere."""
    from mlflow.exceptions import MlflowException

    path = storage.join(out, RUN_FILE)
    known = storage.read_json(path) if storage.exists(path) else {}
    if known.get("uri") != uri:
        return None
    try:
        run = client.get_run(known["run_id"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    is_ours = run.info.lifecycle_stage == "active" and run.info.experiment_id == experiment
    return run if is_ours else None


def _log_params(client: MlflowClient, run: MlflowRun, params: Mapping[str, Any]) -> None:
    """Log the settings that the run does not have yet: MLflow refuses to change one."""
    from mlflow.entities import Param

    new = [Param(_allowed(key), _text(value)) for key, value in params.items() if key not in run.data.params]
    for first in range(0, len(new), PARAMS_A_REQUEST):
        client.log_batch(run.info.run_id, params=new[first : first + PARAMS_A_REQUEST])


def _text(value: Any) -> str:
    """Return a setting as text, lists as JSON."""
    return (json.dumps(value) if isinstance(value, tuple | list) else str(value))[:VALUE_CHARACTERS]


# --- reading --------------------------------------------------------------------------------------------------------


@contextmanager
def reading(uri: str) -> Iterator[MlflowClient]:
    """Give a client that reads what was logged; for `pipelines.tracking.history`.

    Raises:
        UserError: there is nothing to read at the URI, or MLflow does not answer.
    """
    if uri == OFF:
        raise UserError("--tracking.uri is 'off': give the one that the runs were logged to")
    file = database(uri)
    if file and not os.path.exists(file):
        raise UserError(f"--tracking.uri is {uri!r}: there is no such database; run a stage first, or give another one")
    _set_environment(uri)
    try:
        with _translated():
            with alone(uri):
                client = _connect(uri)
            yield client
    except (AwayError, RefusedError) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"--tracking.uri is {uri!r}: MLflow cannot be read there ({error})") from error


# --- ending what others left open -----------------------------------------------------------------------------------


def end_open_runs(uri: str, experiment: str, parent_run: str) -> None:
    """End the open runs below a run as KILLED; where MLflow does not answer, say so and leave them.

    Args:
        uri: where they are logged; `off` does nothing.
        experiment: its name.
        parent_run: id of the run that they are nested under, at any depth; no process logs to them any more.
    """
    if uri == OFF or not parent_run:
        return
    try:
        with reading(uri) as client:
            found = client.get_experiment_by_name(experiment)
            parents = [parent_run]
            while found and parents:
                below = f"tags.`{PARENT_TAG}` = '{parents.pop()}'"
                for run in client.search_runs([found.experiment_id], below, max_results=RUNS_BELOW):
                    parents.append(run.info.run_id)
                    if run.info.status == "RUNNING":
                        client.set_terminated(run.info.run_id, "KILLED")
    except UserError as error:
        say(f"runs of stopped trials may still be open: {error}")
