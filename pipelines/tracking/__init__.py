"""MLflow: logging runs and reading them back; the only room that imports mlflow.

A stage calls `start` and gets a `Tracker`, which never waits for MLflow. Read in this order:

    uri         which MLflow a stage logs to: a database beside its results, a server, or none (`off`)
    tracker     start a run; log metrics and files; finish
    send_queue  the thread behind it: sends in order, retries a server that is down
    history     runs and curves read back as plain values, for `report` and the sweep

mlflow itself is imported by the functions that need it: it takes seconds.
"""

from pipelines.tracking.tracker import PARENT_TAG as PARENT_TAG
from pipelines.tracking.tracker import UNSENT_FILE as UNSENT_FILE
from pipelines.tracking.tracker import Tracker as Tracker
from pipelines.tracking.tracker import create_database as create_database
from pipelines.tracking.tracker import end_open_runs as end_open_runs
from pipelines.tracking.tracker import reading as reading
from pipelines.tracking.tracker import start as start
from pipelines.tracking.uri import resolve_uri as resolve_uri
