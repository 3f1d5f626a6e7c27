"""MLflow: logging runs and reading them back; the only room that imports mlflow.

A stage calls `start` and gets a `Tracker`, which never waits for MLflow; `create_database` may do the slow part of
`start` ahead of time. Read in this order:

    uri         which MLflow a stage logs to: a database beside its results, a server, or none (`off`)
    tracker     start a run; log metrics and files; finish
    send_queue  the thread behind it: sends in order, retries a server that is down
    machine     what this machine does meanwhile
    runs        a run in MLflow: created, found again by a resumed stage, ended
    client      connecting, and what MLflow's errors mean
    history     runs and curves read back as plain values, for `report` and the sweep
    registry    fine-tuned models, registered and read back; `served_model` is what MLflow runs of one

    stage -> Tracker.log -> SendQueue -> thread -> MLflow;  MLflow -> history -> report

mlflow itself is imported by the functions that need it: it takes seconds.
"""

from pipelines.tracking.client import create_database, reading
from pipelines.tracking.machine import machine_logged
from pipelines.tracking.runs import PARENT_TAG, DataSet, end_open_runs
from pipelines.tracking.tracker import UNSENT_FILE, Tracker, start
from pipelines.tracking.uri import VARIABLE, check_without_credentials, database, resolve_uri

__all__ = [
    "PARENT_TAG",
    "UNSENT_FILE",
    "VARIABLE",
    "DataSet",
    "Tracker",
    "check_without_credentials",
    "create_database",
    "database",
    "end_open_runs",
    "machine_logged",
    "reading",
    "resolve_uri",
    "start",
]
