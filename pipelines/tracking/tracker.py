"""The Tracker: an MLflow run that a stage logs to, without ever waiting for MLflow.

What is logged goes to a `SendQueue`, whose thread sends it and waits for a server that is down. What is still unsent at
the end is saved beside the results of the stage, and sent by the next start with the same --out.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import storage
from pipelines.config import TrackingConfig
from pipelines.errors import UserError
from pipelines.storage import provenance
from pipelines.tracking.client import connect, set_environment, translated_errors
from pipelines.tracking.runs import (
    LONG_PARAMS,
    MAX_VALUE_CHARACTERS,
    PARENT_TAG,
    RAY_TAG,
    DataSet,
    allowed_key,
    dataset_input,
    find_or_create,
    linked_runs,
    log_params,
    param_texts,
    set_tags,
)
from pipelines.tracking.send_queue import (
    MetricRow,
    RefusedError,
    Request,
    SendQueue,
    UnavailableError,
    print_message,
    read_rows,
    write_rows,
)
from pipelines.tracking.uri import OFF, database, database_lock, resolve_uri, run_link

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

COMMIT_TAG = "mlflow.source.git.commit"
"""Where MLflow's pages look for a commit."""
ENVIRONMENT = "environment.json"
"""File of a run that says where it runs."""
UNSENT_FILE = "metrics_unsent.jsonl"
FLUSH_S = 30.0
"""Seconds that the end of a stage waits for MLflow at most."""
START_S = 15.0
"""Seconds that the start of a stage waits for a server at most."""


def start(
    config: TrackingConfig,
    *,
    stage: str,
    out: str,
    params: Mapping[str, Any],
    parent_run: str = "",
    inputs: Mapping[str, str] | None = None,
    datasets: Sequence[DataSet] = (),
    ray_job: Mapping[str, str] | None = None,
) -> Tracker:
    """Create the MLflow run of a stage, or resume the one that an earlier start with the same `out` created.

    Args:
        config: where to log.
        stage: name of the stage.
        out: where the stage writes.
        params: its settings under dotted keys; a resumed run retains the first value of a changed one.
        parent_run: id of the run to nest this one under.
        inputs: paths that the stage reads, by setting: the runs that made them are linked.
        datasets: videos that it reads.
        ray_job: by which names Ray knows the process; of a resumed run those of the last start.

    Raises:
        UserError: MLflow refuses the run, or a local database cannot be opened. A server that does not answer raises
            nothing: the run is created once it does.
    """
    uri = resolve_uri(config, out)
    out = storage.absolute(out)
    commit = provenance.commit()
    tags = {"stage": stage, "out": out, "commit": commit, COMMIT_TAG: commit.partition("+")[0]}
    if inputs and uri != OFF:
        tags |= linked_runs(uri, inputs)
    if parent_run:
        tags[PARENT_TAG] = parent_run

    place = {f"{RAY_TAG}{key}": value for key, value in (ray_job or {}).items()}

    def open_run(client: MlflowClient) -> MlflowRun:
        run = find_or_create(client, uri, config.experiment, out, tags, config.run_name or stage)
        set_tags(client, run, place)
        log_params(client, run, params)
        if datasets:
            client.log_inputs(run.info.run_id, [dataset_input(each) for each in datasets])
        return run

    tracker = Tracker(uri, out, open_run)
    tracker.wait_for_run()
    settings = storage.join(out, "run.json")
    if storage.exists(settings):
        tracker.artifact(settings)
        tracker.text(ENVIRONMENT, json.dumps(provenance.environment(), indent=1))
    if long := {key: text for key, text in param_texts(params).items() if len(text) > MAX_VALUE_CHARACTERS}:
        tracker.text(LONG_PARAMS, json.dumps(long))
    return tracker


class Tracker:
    """An MLflow run that is being logged to; `start` makes one. All methods but `finish` return at once.

    Args:
        uri: where to log; with `off` no method does anything.
        out: where the stage writes, and what could not be sent is saved.
        open_run: creates the run or finds it; called in the queue's thread.
    """

    def __init__(self, uri: str, out: str, open_run: Callable[[MlflowClient], MlflowRun]) -> None:
        self.uri = uri
        self.run_id: str | None = None
        """The run's id; None until MLflow has answered."""
        self.started: float | None = None
        """When the run was created, in seconds since 1970; None until MLflow has answered."""
        self.link = ""
        """Address of the run's page; empty until a server has answered."""
        self._out = out
        self._open_run = open_run
        self._client: MlflowClient | None = None
        self._send_queue = None if uri == OFF else SendQueue(f"MLflow at {uri}", self._send_rows)
        if self._send_queue:
            set_environment(uri)
            self._send_queue.put(Request("the run", self._open, required=True))

    def wait_for_run(self) -> None:
        """Wait for the first attempt to open the run: START_S for a server, until its end for a local database.

        Raises:
            UserError: the run was refused, or a local database cannot be opened. That a server does not answer is no
                error.
        """
        queue, is_local = self._send_queue, bool(database(self.uri))
        if queue is None:
            return
        queue.attempted.wait(None if is_local else START_S)
        failure = queue.failure
        if isinstance(failure, RefusedError) or (failure and is_local):
            queue.flush(0)
            if isinstance(failure.__cause__, UserError):
                raise failure.__cause__
            raise UserError(
                f"--tracking.uri is {self.uri!r}: {failure}; give another one, or --tracking.uri off"
            ) from failure

    def log(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Queue values of metrics; characters that MLflow forbids in names become `_`.

        Args:
            metrics: values by name.
            step: the step of the values; None for a final result, which replaces the last value at its step.
        """
        if self._send_queue:
            now = int(time.time() * 1000)
            self._send_queue.put(
                *(MetricRow(allowed_key(key), float(value), now, step) for key, value in metrics.items())
            )

    def artifact(self, path: str) -> None:
        """Queue a file, given as a path or URI; it is read when it is sent."""
        self._request(path, lambda client, run_id: _send_artifact(client, run_id, path))

    def text(self, name: str, content: str) -> None:
        """Queue a file of that content."""
        self._request(name, lambda client, run_id: _send_file(client, run_id, name, content.encode()))

    def tag(self, key: str, value: str) -> None:
        """Queue a tag, which replaces one of the same key."""

        def send(client: MlflowClient, run_id: str) -> None:
            client.set_tag(run_id, key, value)

        self._request(f"tag {key}", send)

    def finish(self, status: str) -> None:
        """Send what is queued and what an earlier process could not send, waiting up to FLUSH_S, and end the run.

        Args:
            status: `FINISHED`, `FAILED` or `KILLED`.
        """
        if self._send_queue is None:
            return
        ended = int(time.time() * 1000)
        self._send_queue.put(*read_rows(storage.join(self._out, UNSENT_FILE)))
        self._request("the end", lambda client, run_id: client.set_terminated(run_id, status, ended))
        queue, self._send_queue = self._send_queue, None
        unsent = queue.flush(FLUSH_S)
        self._save_unsent([item for item in unsent if isinstance(item, MetricRow)], bool(unsent))
        if queue.refused:
            print_message(
                f"MLflow at {self.uri} refused {queue.refused} entries of this run; the last: {queue.failure}"
            )

    def _request(self, what: str, send: Callable[[MlflowClient, str], None]) -> None:
        def translated() -> None:
            with translated_errors():
                send(*self._opened())

        if self._send_queue:
            self._send_queue.put(Request(what, translated))

    def _opened(self) -> tuple[MlflowClient, str]:
        assert self._client is not None  # `_open` comes first, and is required
        assert self.run_id is not None
        return self._client, self.run_id

    def _open(self) -> None:
        with translated_errors(), database_lock(self.uri):
            self._client = self._client or connect(self.uri)
            info = self._open_run(self._client).info
            self.run_id, self.started = str(info.run_id), info.start_time / 1000
            self.link = run_link(self.uri, info.experiment_id, info.run_id)

    def _send_rows(self, rows: list[MetricRow]) -> None:
        from mlflow.entities import Metric

        client, run_id = self._opened()
        with translated_errors():
            rows = _with_steps(client, run_id, rows)
            metrics = [Metric(row.key, row.value, row.timestamp, row.step or 0) for row in rows]
            client.log_batch(run_id, metrics)

    def _save_unsent(self, rows: list[MetricRow], is_incomplete: bool) -> None:
        """Save unsent rows beside the results, or delete those of earlier processes once they are sent."""
        path = storage.join(self._out, UNSENT_FILE)
        if is_incomplete:
            write_rows(path, rows)
            print_message(
                f"MLflow at {self.uri} did not receive all that was logged: {len(rows)} values are saved in {path}"
            )
        else:
            storage.remove(path)


def _with_steps(client: MlflowClient, run_id: str, rows: list[MetricRow]) -> list[MetricRow]:
    """Give final results the step of their metric's last value, and a later time: step 0 would bend its curve."""
    if rows[0].step is not None:  # a request has rows of one kind only
        return rows
    known = client.get_run(run_id).data.metrics
    with_steps = []
    for row in rows:
        history = client.get_metric_history(run_id, row.key) if row.key in known else []
        step, last = max(((old.step, old.timestamp) for old in history), default=(0, 0))
        with_steps.append(MetricRow(row.key, row.value, max(row.timestamp, last + 1), step))
    return with_steps


def _send_artifact(client: MlflowClient, run_id: str, path: str) -> None:
    if storage.is_uri(path):
        with translated_errors():
            content = storage.read_bytes(path)
        _send_file(client, run_id, path.rpartition("/")[2], content)
    else:
        _sent(client, run_id, path)


def _send_file(client: MlflowClient, run_id: str, name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / name
        local.write_bytes(content)
        _sent(client, run_id, str(local))


def _sent(client: MlflowClient, run_id: str, path: str) -> None:
    """Send a file; a failing artifact store must not hold up the metrics behind it while MLflow answers."""
    try:
        with translated_errors():
            client.log_artifact(run_id, path)
    except UnavailableError as error:
        client.get_run(run_id)
        raise RefusedError(str(error)) from error
