"""Runs read back from MLflow, as plain values."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipelines import storage
from pipelines.config import unknown
from pipelines.errors import UserError
from pipelines.tracking.client import reading
from pipelines.tracking.runs import PARENT_TAG

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


def read_runs(uri: str, experiment: str, below: str = "") -> list[Run]:
    """Return an experiment's runs, the earliest first; with `below`, only those whose `out` lies in that folder.

    Raises:
        UserError: there is no such experiment (names the closest), or MLflow does not answer.
    """
    runs: list[Run] = []
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
            for run in page:
                tags, info = run.data.tags, run.info
                end = time.time() * 1000 if info.status == "RUNNING" or not info.end_time else info.end_time
                runs.append(
                    Run(
                        run_id=info.run_id,
                        stage=tags.get("stage", ""),
                        experiment_id=info.experiment_id,
                        name=info.run_name or "",
                        out=tags.get("out", ""),
                        status=info.status,
                        parent_run=tags.get(PARENT_TAG, ""),
                        params=dict(run.data.params),
                        metrics=dict(run.data.metrics),
                        start=info.start_time / 1000,
                        seconds=(end - info.start_time) / 1000,
                    )
                )
            token = page.token or None
    folder = storage.absolute(below).rstrip("/") if below else ""
    return [run for run in runs if not folder or f"{run.out}/".startswith(f"{folder}/")]


def metric_history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of a run's metric in order of the step; of a step logged twice, the later value."""
    with reading(uri) as client:
        rows = sorted(client.get_metric_history(run_id, key), key=lambda row: (row.step, row.timestamp))
        return list({row.step: row.value for row in rows}.items())
