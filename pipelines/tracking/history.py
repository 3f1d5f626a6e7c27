"""Runs read back from MLflow, as plain values."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import storage
from pipelines.config import unknown
from pipelines.errors import UserError
from pipelines.tracking.client import reading
from pipelines.tracking.runs import LINK_TAG, LONG_PARAMS, MANIFEST_SOURCE, MAX_VALUE_CHARACTERS, PARENT_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

RUNS_A_PAGE = 1000


@dataclass(frozen=True)
class Run:
    """A run that was logged."""

    run_id: str
    stage: str
    experiment_id: str
    name: str
    out: str
    status: str
    parent_run: str
    """Id of the run that it is nested under, if any."""
    params: dict[str, str]
    metrics: dict[str, float]
    """The last value of each."""
    start: float
    """Seconds since 1970."""
    seconds: float
    """From the start to the end, or until now."""
    links: dict[str, str] = field(default_factory=dict)
    """Ids of the runs whose results it reads, by the setting that names them, such as `checkpoint`."""
    benchmark: tuple[str, str] = ("", "")
    """Benchmark and task of the videos that it reads; empty for own videos."""

    @property
    def is_finished(self) -> bool:
        """Whether it ran to its end: the last values of others say nothing of what they would have reached."""
        return self.status == "FINISHED"


def read_runs(uri: str, experiment: str, below: Sequence[str] = ()) -> list[Run]:
    """Return an experiment's runs, the earliest first; with `below`, only those whose `out` lies in one of the folders.

    Raises:
        UserError: there is no such experiment (names the closest), or MLflow does not answer.
    """
    runs: list[Run] = []
    folders = tuple(f"{storage.absolute(folder).rstrip('/')}/" for folder in below)
    with reading(uri) as client:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            names = tuple(other.name for other in client.search_experiments() if other.name != "Default")
            hint = unknown("experiment", experiment, names) if names else f"unknown experiment {experiment!r}"
            raise UserError(f"{hint} (--tracking.experiment, in MLflow at {uri})")
        token: str | None = ""
        while token is not None:
            page = client.search_runs(
                [found.experiment_id], max_results=RUNS_A_PAGE, order_by=["start_time ASC"], page_token=token or None
            )
            runs += [_run(client, run) for run in page if _lies_in(run, folders)]
            token = page.token or None
    return runs


def _lies_in(run: MlflowRun, folders: tuple[str, ...]) -> bool:
    return not folders or f"{run.data.tags.get('out', '')}/".startswith(folders)


def _run(client: MlflowClient, run: MlflowRun) -> Run:
    tags, info = run.data.tags, run.info
    end = time.time() * 1000 if info.status == "RUNNING" or not info.end_time else info.end_time
    return Run(
        run_id=info.run_id,
        stage=tags.get("stage", ""),
        experiment_id=info.experiment_id,
        name=info.run_name or "",
        out=tags.get("out", ""),
        status=info.status,
        parent_run=tags.get(PARENT_TAG, ""),
        params=dict(run.data.params) | _long_params(client, run),
        metrics=dict(run.data.metrics),
        start=info.start_time / 1000,
        seconds=(end - info.start_time) / 1000,
        links={key.removeprefix(LINK_TAG): value for key, value in tags.items() if key.startswith(LINK_TAG)},
        benchmark=_benchmark(run),
    )


def _benchmark(run: MlflowRun) -> tuple[str, str]:
    for item in run.inputs.dataset_inputs if run.inputs else ():
        if item.dataset.source_type == MANIFEST_SOURCE:
            about = json.loads(item.dataset.profile or "{}")
            return about.get("benchmark", ""), about.get("task", "")
    return "", ""


def _long_params(client: MlflowClient, run: MlflowRun) -> dict[str, str]:
    """Return the parameters that MLflow's limit cut off, whole; none where their file is not there."""
    if all(len(value) < MAX_VALUE_CHARACTERS for value in run.data.params.values()):
        return {}
    content = _artifact(client, run.info.run_id, LONG_PARAMS)
    return dict(json.loads(content)) if content else {}


def _artifact(client: MlflowClient, run_id: str, name: str) -> bytes | None:
    """Return a file of a run; None where it has none of that name."""
    if name not in (file.path for file in client.list_artifacts(run_id)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()


def metric_history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of a run's metric in order of the step; of a step logged twice, the later value."""
    with reading(uri) as client:
        rows = sorted(client.get_metric_history(run_id, key), key=lambda row: (row.step, row.timestamp))
        return list({row.step: row.value for row in rows}.items())
