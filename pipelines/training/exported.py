"""A training run's figures for Prometheus, by way of the metrics agent of Ray on the driver's node.

The driver sets them with each row of metrics, so that they cost the workers nothing. `clusters/grafana.json` draws them
under the names that Ray gives them, with `ray_` in front.
"""

from __future__ import annotations

from functools import cache

from ray.util.metrics import Gauge

from pipelines.running.stage import Stage

STEP = "s5_step"
EXPORTED = {
    "train/loss": ("s5_loss", "Training loss, mean since the last row."),
    "train/learning_rate": ("s5_learning_rate", "Learning rate, mean since the last row."),
    "train/clips_per_second": ("s5_clips_per_second", "Clips a second of all workers."),
    "train/data_wait_share": ("s5_data_wait_share", "Share of time that workers wait for data, 0 to 1."),
    "data/failures_total": ("s5_decode_failures", "Videos that could not be decoded, since the run began."),
}
"""Name and description by the metric that they show."""
TAGS = ("stage", "experiment", "run_id")


class ExportedMetrics:
    """Sets the gauges of one training run; called with each row of metrics.

    Values are of all workers together, as the rows are: there is no tag for a rank.

    Args:
        stage: the running stage. `run_id` is that of its MLflow run, or its --out where there is none.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._tags: dict[str, str] = {}

    def __call__(self, step: int, row: dict[str, float]) -> None:
        """Set the gauges of what a row holds."""
        if not self._tags:
            # Not before: a server may have been late with the id.
            experiment = self._stage.folder.config.tracking.experiment
            run_id = self._stage.tracker.run_id or self._stage.out
            self._tags = dict(zip(TAGS, (self._stage.name, experiment, run_id), strict=True))
        gauges = _gauges()
        gauges[STEP].set(step, self._tags)
        for key, (name, _) in EXPORTED.items():
            if key in row:
                gauges[name].set(row[key], self._tags)


@cache
def _gauges() -> dict[str, Gauge]:
    """Return the gauges of this process by name: trials of a sweep that share it share them."""
    described = {STEP: "Optimiser steps taken."} | dict(EXPORTED.values())
    return {name: Gauge(name, text, TAGS) for name, text in described.items()}
