"""A stage's run in MLflow: created, or found again by a later start with the same --out, and ended for stopped trials.

A run records its stage and --out as tags; the file RUN_FILE in --out records the run. All functions but
`end_open_runs` raise what MLflow's client raises.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines import storage
from pipelines.config import RUN
from pipelines.errors import UserError
from pipelines.tracking.client import reading
from pipelines.tracking.send_queue import print_message
from pipelines.tracking.uri import OFF, database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput
    from mlflow.entities import Run as MlflowRun

RUN_FILE = "mlflow_run.json"
PARENT_TAG = "mlflow.parentRunId"
LINK_TAG = "link."
"""What tags begin with that hold the run whose results this one reads, by the setting that names them."""
RAY_TAG = "ray."
"""What tags begin with that hold Ray's names of the job."""
MANIFEST_SOURCE = "manifest"
"""Kind of source of the data sets that stages read."""
LONG_PARAMS = "long_params.json"
"""File of a run with the whole values of parameters that are longer than MLflow's limit."""
MAX_VALUE_CHARACTERS = 6000
"""MLflow's limit for the value of a parameter."""
PARAMS_A_REQUEST = 100
"""MLflow's limit for the parameters of a request."""
MAX_CHILD_RUNS = 10_000


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Videos that a stage reads, as MLflow lists them with a run."""

    name: str
    digest: str
    """At most 36 characters."""
    source: str
    """Path or URI of the manifest."""
    context: str
    """What they are read for, such as `train`."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Numbers that describe it."""


def find_or_create(
    client: MlflowClient, uri: str, experiment: str, out: str, tags: dict[str, str], name: str
) -> MlflowRun:
    """Return the run of a stage that writes to `out`, resumed or new, and record it there.

    Args:
        client: of `uri`.
        uri: where the run is logged.
        experiment: name of the experiment, which is created where there is none.
        out: absolute path or URI.
        tags: of a new run.
        name: of a new run.

    Raises:
        UserError: the experiment was deleted.
    """
    experiment_id = _experiment_id(client, uri, experiment)
    run = _earlier_run(client, uri, experiment_id, out)
    if run is None:
        run = client.create_run(experiment_id, tags=tags, run_name=name)
    else:
        client.update_run(run.info.run_id, status="RUNNING")
    # Before anything else, so that the next attempt finds the run.
    storage.write_json(storage.join(out, RUN_FILE), {"uri": uri, "run_id": run.info.run_id})
    return run


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


def _earlier_run(client: MlflowClient, uri: str, experiment_id: str, out: str) -> MlflowRun | None:
    """Return the run that RUN_FILE in `out` records, unless it was deleted or is of another URI or experiment."""
    from mlflow.exceptions import MlflowException

    path = storage.join(out, RUN_FILE)
    recorded = storage.read_json(path) if storage.exists(path) else {}
    if recorded.get("uri") != uri:
        return None
    try:
        run = client.get_run(recorded["run_id"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    is_ours = run.info.lifecycle_stage == "active" and run.info.experiment_id == experiment_id
    return run if is_ours else None


def linked_runs(uri: str, inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the runs of the same MLflow that made what a stage reads, as tags.

    Args:
        uri: where the stage is logged.
        inputs: paths by the settings that name them: the --out of a stage, or something at most two folders below it.
    """
    tags: dict[str, str] = {}
    for name, path in inputs.items():
        place = storage.absolute(path).rstrip("/")
        for folder in (place, *(place.rsplit("/", levels)[0] for levels in (1, 2))):
            if storage.exists(record := storage.join(folder, RUN_FILE)):
                made_by = storage.read_json(record)
                tags |= {f"{LINK_TAG}{name}": made_by["run_id"]} if made_by["uri"] == uri else {}
                break
            if storage.exists(storage.join(folder, RUN)):
                # A stage made it that was not logged; the run above is another one's.
                break
    return tags


def set_tags(client: MlflowClient, run: MlflowRun, tags: Mapping[str, str]) -> None:
    """Set tags of a run that it does not have with these values, in one request."""
    from mlflow.entities import RunTag

    if new := [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]:
        client.log_batch(run.info.run_id, tags=new)


def dataset_input(videos: DataSet) -> DatasetInput:
    """Return videos as MLflow takes them."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=videos.name,
        digest=videos.digest,
        source_type=MANIFEST_SOURCE,
        source=json.dumps({"uri": videos.source}),
        profile=json.dumps(dict(videos.about)),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", videos.context)])


def log_params(client: MlflowClient, run: MlflowRun, params: Mapping[str, Any]) -> None:
    """Log the settings that the run does not have yet, cut to MLflow's limit: MLflow refuses to change a parameter."""
    from mlflow.entities import Param

    new = [
        Param(key, text[:MAX_VALUE_CHARACTERS])
        for key, text in param_texts(params).items()
        if key not in run.data.params
    ]
    for first in range(0, len(new), PARAMS_A_REQUEST):
        client.log_batch(run.info.run_id, params=new[first : first + PARAMS_A_REQUEST])


def param_texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as texts, lists as JSON, under names that MLflow allows."""
    return {
        allowed_key(key): json.dumps(value) if isinstance(value, tuple | list) else str(value)
        for key, value in params.items()
    }


def allowed_key(key: str) -> str:
    """Return the name of a metric or parameter with `_` for the characters that MLflow forbids."""
    return re.sub(r"[^\w\-./ :]", "_", key, flags=re.ASCII)


def end_open_runs(uri: str, experiment: str, parent_run: str) -> None:
    """End the open runs below a run as KILLED; where MLflow does not answer, print so and leave them open.

    Args:
        uri: where they are logged; `off` does nothing.
        experiment: name of their experiment.
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
                for run in client.search_runs([found.experiment_id], below, max_results=MAX_CHILD_RUNS):
                    parents.append(run.info.run_id)
                    if run.info.status == "RUNNING":
                        client.set_terminated(run.info.run_id, "KILLED")
    except UserError as error:
        print_message(f"runs of stopped trials may still be open: {error}")
