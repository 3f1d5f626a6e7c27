"""What hundreds of runs cost in MLflow: reading them, one search, and a report of them all.

    make bench-runs ARGS="--runs 300"

A sweep in a database file: each trial is a run, and its fine-tuning another with all its settings and a curve.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from zlib import crc32

import torch

from pipelines import tracking
from pipelines.config import FinetuneConfig, ReportConfig, TrackingConfig, flatten
from pipelines.stages import report
from pipelines.tracking.history import read_runs
from tests.bench.record import Row, write

STEPS = 50


def log(root: Path, stage: str, out: str, parent: str, params: dict[str, object], steps: int) -> str:
    """Log a run with a curve and a result, and return its id."""
    config = TrackingConfig(uri=f"sqlite:///{root}/mlflow.db")
    tracker = tracking.start(config, stage=stage, out=str(root / out), params=params, parent_run=parent)
    for step in range(steps):
        tracker.log({"train/loss": 1 / (1 + step), "train/clips_per_second": 20.0}, step)
    tracker.log({"val/accuracy": 0.5 + crc32(out.encode()) % 100 / 400}, None)
    tracker.finish("FINISHED")
    assert tracker.run_id is not None
    return tracker.run_id


def fill(root: Path, runs: int) -> None:
    """Log a sweep of half as many trials."""
    sweep = log(root, "sweep", "sweep", "", {"objective.metric": "val/accuracy", "objective.mode": "max"}, 0)
    for number in range(runs // 2):
        values: dict[str, object] = {"trial.lsmcl.mask_ratio": number % 5 / 5, "trial.loop.seed": number // 5}
        trial = log(root, "trial", f"sweep/{number}", sweep, values, 0)
        log(root, "finetune", f"sweep/{number}/finetune", trial, flatten(FinetuneConfig()), STEPS)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory(prefix="runs-") as name:
        root, seconds = Path(name), {}
        uri = f"sqlite:///{root}/mlflow.db"
        began = time.perf_counter()
        fill(root, runs)
        seconds["log"] = time.perf_counter() - began
        began = time.perf_counter()
        found = read_runs(uri, "s5")
        seconds["read"] = time.perf_counter() - began
        began = time.perf_counter()
        with tracking.reading(uri) as client:
            best = client.search_runs(
                [found[0].experiment_id], "metrics.`val/accuracy` > 0.6", order_by=["metrics.`val/accuracy` DESC"]
            )
        seconds["search"] = time.perf_counter() - began
        assert best
        began = time.perf_counter()
        report.run(ReportConfig(out=str(root / "report"), tracking=TrackingConfig(uri=uri)))
        seconds["report"] = time.perf_counter() - began
        size = (root / "report" / report.PAGE).stat().st_size
    figures = [
        Row("seconds to log a run", seconds["log"] / len(found), None, "lower"),
        Row(f"seconds to read {len(found)} runs with all settings", seconds["read"], None, "lower"),
        Row("seconds of a search for the best", seconds["search"], None, "lower"),
        Row("seconds of a report of them", seconds["report"], None, "lower"),
        Row("KiB of its page", size / 1024, None, "lower"),
    ]
    write("runs", torch.device("cpu"), figures, {key: [value] for key, value in seconds.items()})


if __name__ == "__main__":
    main()
