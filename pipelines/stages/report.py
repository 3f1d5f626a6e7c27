"""Report: what MLflow holds of chosen runs, as tables and figures: a page of HTML, Markdown and on the terminal."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pipelines import storage
from pipelines.config import ReportConfig
from pipelines.errors import UserError
from pipelines.plots.confusion import CONFUSION
from pipelines.plots.neighbours import NEIGHBOURS
from pipelines.reporting.beside import published_tables
from pipelines.reporting.by_stage import stage_tables
from pipelines.reporting.by_sweep import sweep_tables
from pipelines.reporting.page import page
from pipelines.reporting.table import markdown, plain
from pipelines.reporting.tradeoffs import cost_tables
from pipelines.running.stage import stage_run
from pipelines.storage import provenance
from pipelines.tracking.history import Run, read_runs
from pipelines.tracking.uri import OFF, resolve_uri

REPORT = "report.md"
PAGE = "report.html"
PICTURES = {NEIGHBOURS: "query clips and their nearest clips", CONFUSION: "confusion matrix"}
"""What evaluations leave, and what it shows."""
SHOWN_PICTURES = 8
"""Of them in the page, the latest ones."""


def run(config: ReportConfig) -> dict[str, Any]:
    """Write report.html, report.md and its figures from the runs of an experiment, and print the tables.

    Returns:
        `source` (URI and experiment), `tables` (title, header and rows) and the paths `page`, `report` and `figures`.

    Raises:
        UserError: MLflow holds no such runs, or cannot be read.
    """
    out = storage.absolute(config.out)
    uri = resolve_uri(config.tracking, out)
    runs = read_runs(uri, config.tracking.experiment, config.runs)
    if not runs:
        raise UserError(nothing_to_report(config, uri))
    # A run of its own would stand in the next report.
    unlogged = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, uri=OFF))
    with stage_run("report", unlogged) as stage:
        tables = [*stage_tables(uri, runs), *sweep_tables(runs), *published_tables(runs), *cost_tables(runs)]
        title, sentence = f"Experiment {config.tracking.experiment}", f"{len(runs)} run(s) in MLflow at {uri}."
        figures = [figure for table in tables for figure in table.figures]
        stage.counts["runs"] = len(runs)
        stage.details |= {
            "source": {"uri": uri, "experiment": config.tracking.experiment},
            "tables": [{"title": t.title, "header": t.header, "rows": t.rows} for t in tables],
            "figures": [stage.folder.write(f"{figure.name}.png", figure.drawing.png) for figure in figures],
            "report": stage.folder.write(REPORT, markdown(title, sentence, tables).encode()),
        }
        shown = pictures(runs)
        inline = {path: storage.read_bytes(path) for path in shown[-SHOWN_PICTURES:]}
        stage.details["page"] = stage.folder.write(PAGE, page(title, sentence, tables, inline, made_by()).encode())
        for table in tables:
            if table.on_terminal:
                print(plain(table), flush=True)
        for path in (stage.details["page"], stage.details["report"], *stage.details["figures"]):
            stage.info(f"wrote {path}")
        for picture in shown:
            stage.info(f"{PICTURES[picture.rpartition('/')[2]]}: {picture}")
        below = ", ".join(storage.absolute(folder) for folder in config.runs or (config.out,))
        stage.info(f"results, checkpoints and logs lie below {below}")
        stage.info(f"to open the runs in MLflow: {opening(uri, runs[0].experiment_id)}")
        return dict(stage.details)


def nothing_to_report(config: ReportConfig, uri: str) -> str:
    """Return the sentence for an experiment without such runs."""
    where = f" below {', '.join(map(storage.absolute, config.runs))}" if config.runs else ""
    return (
        f"MLflow at {uri} holds no runs of experiment {config.tracking.experiment!r}{where}: run a stage with the "
        "same --tracking.uri and --tracking.experiment first" + (", or give another --runs" if where else "")
    )


def made_by() -> str:
    """Return when and by which commit a report was made."""
    return f"Made by `report` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {provenance.commit()[:12]}."


def pictures(runs: Sequence[Run]) -> list[str]:
    """Return the pictures that evaluations have left: nearest clips, and confusion matrices."""
    paths = [storage.join(run.out, name) for run in runs if run.stage == "evaluate" for name in PICTURES]
    return [path for path in dict.fromkeys(paths) if storage.exists(path)]


def opening(uri: str, experiment_id: str) -> str:
    """Return how a person opens an experiment: its address, or the command that serves a database and the address."""
    # Without `runs`, MLflow's page opens on traces of language models.
    page = f"#/experiments/{experiment_id}/runs"
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/{page}"
    return f"{os.path.relpath(sys.executable)} -m mlflow ui --backend-store-uri {uri}\n         and open http://127.0.0.1:5000/{page}"
