"""MLflow: logging a run, and reading runs back; the only room that imports mlflow."""

from pipelines.tracking.tracker import PARENT_TAG as PARENT_TAG
from pipelines.tracking.tracker import UNSENT_FILE as UNSENT_FILE
from pipelines.tracking.tracker import Tracker as Tracker
from pipelines.tracking.tracker import create_database as create_database
from pipelines.tracking.tracker import end_open_runs as end_open_runs
from pipelines.tracking.tracker import reading as reading
from pipelines.tracking.tracker import start as start
from pipelines.tracking.uri import resolve_uri as resolve_uri
