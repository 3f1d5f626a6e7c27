"""Runs of a made-up study, as they are read back from MLflow: recipes over seeds, a sweep over masking, bad names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from pipelines.plots import curves
from pipelines.reporting.beside import published_tables
from pipelines.reporting.by_sweep import sweep_tables
from pipelines.reporting.table import Figure, Table
from pipelines.reporting.tradeoffs import cost_tables
from pipelines.tracking.history import Run

BAD = '<script>alert("x")</script><img src="https://example.invalid/x.png"> $a$b_{c'
"""What a name may hold that would break a page or a figure."""
SEEDS = range(3)
RATIOS, FRAMES = ("0", "0.25", "0.5", "0.75"), ("60", "80", "100", "120")


def a_run(stage: str, out: str, **given: object) -> Run:
    """Return a run with a result; parameters and metrics have dots and slashes."""
    values: dict[str, object] = {
        "run_id": out,
        "stage": stage,
        "experiment_id": "1",
        "name": stage,
        "out": f"/study/{out}",
        "status": "FINISHED",
        "parent_run": "",
        "params": {},
        "metrics": {},
        "start": 0.0,
        "seconds": 200.0,
    }
    return Run(**(values | given))  # type: ignore[arg-type]


def recipe_runs() -> list[Run]:
    """A decoder from one pretraining, fine-tuned and evaluated on LVU's directors with three seeds, and another."""
    runs = []
    for name, decoder, base in (("a", "s5", 0.64), ("b", "vis4mer", 0.60)):
        for seed in SEEDS:
            params = {"loop.seed": str(seed), "model.decoder.name": decoder, "checkpoint": "/study/pretrain"}
            metrics = {
                "best/val/accuracy": base + 0.01 * seed,
                "train/clips_per_second": 20.0 + 5 * (decoder == "s5"),
                "train/memory_gib": 5.15 - (decoder == "s5"),
                "train/keep_ratio": 0.5 if decoder == "s5" else 1.0,
            }
            tuned = a_run("finetune", f"{name}/finetune/seed_{seed}", params=params, metrics=metrics)
            found = {"test/accuracy": base + 0.02 * seed, "test/videos": 105.0, "test/listed": 107.0}
            runs += [
                tuned,
                a_run(
                    "evaluate",
                    f"{name}/evaluate/seed_{seed}",
                    params={"checkpoint": f"finetune/seed_{seed}", "split": "test"},
                    metrics=found,
                    links={"checkpoint": tuned.run_id},
                    benchmark=("lvu", "director"),
                ),
            ]
    return runs


def masking_sweep(metric: str = "val/accuracy", mode: str = "max") -> list[Run]:
    """A sweep of masking ratio x frames x seed in which masking helps at many frames and hurts at few."""
    params = {
        "objective.metric": metric,
        "objective.mode": mode,
        "space": '["lsmcl.mask_ratio=0,0.25", "clips.frames=60,80", "loop.seed=0,1,2"]',
    }
    runs = [a_run("sweep", "sweep", params=params)]
    sign = 1 if mode == "max" else -1
    for ratio, frames, seed in itertools.product(RATIOS, FRAMES, SEEDS):
        values = {"lsmcl.mask_ratio": ratio, "clips.frames": frames, "loop.seed": str(seed)}
        noise = 0.002 * (seed - 1) * float(ratio)
        result = 0.5 + 0.02 * seed + sign * (gain_of(ratio, frames) + noise)
        trial = ",".join(values.values())
        runs.append(
            a_run(
                "trial",
                f"sweep/{trial}",
                name=trial,
                parent_run="sweep",
                params={f"trial.{key}": value for key, value in values.items()},
                metrics={metric: result},
            )
        )
    return runs


def gain_of(ratio: str, frames: str) -> float:
    """Return what masking gains in the study, on average over seeds."""
    return float(ratio) * (float(frames) - 85) / 400


def tables() -> list[Table]:
    """All kinds of tables and figures, with bad names in them."""
    runs = [*recipe_runs(), *masking_sweep()]
    points: Mapping[str, Mapping[str, curves.Points]] = {
        f"{BAD} {i}": {"train/loss": [(step, 3 * math.exp(-step / 99) + i) for step in range(200)]} for i in (0, 1)
    }
    drawing = curves.learning_curves(curves.PANELS["pretrain"][0], points)
    assert drawing is not None
    long = {f"model.decoder.setting_{i}": "a/long/path/to/a/manifest.parquet" for i in range(12)}
    wide = Table(
        "pretrain: settings that differ", ("run", *long), ((BAD, *long.values()),), (Figure("curves", BAD, drawing),)
    )
    return [wide, *sweep_tables(runs), *published_tables(runs), *cost_tables(runs)]


def picture() -> bytes:
    """Return a PNG."""
    from pipelines.plots.neighbours import Neighbours, draw_neighbours

    frames = np.zeros((4, 8, 8, 3), np.uint8)
    return draw_neighbours(Neighbours(frames, list("abcd"), [0], [[1, 2, 3]] * 4, [[0.9, 0.8, 0.7]] * 4))
