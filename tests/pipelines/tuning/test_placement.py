"""How trials share the nodes of a cluster."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pipelines.config import (
    SweepConfig,
    override,
)
from pipelines.errors import UserError
from pipelines.running import resources
from pipelines.tuning import placement, trials, tuner
from tests.pipelines.tuning.planned import trials_of


def fitted(
    monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float], **changes: Any
) -> tuple[list[trials.TrialSettings], int]:
    """Return what `fit_cluster` makes of three trials, where the first of the nodes is the sweep's."""
    has = [node | {f"node:10.0.0.{number}": 1.0} for number, node in enumerate(nodes)]
    monkeypatch.setattr(resources, "nodes", lambda: has)
    monkeypatch.setattr(resources, "own_node", lambda: "node:10.0.0.0")
    monkeypatch.setattr(resources, "ensure_ray", lambda: None)
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    config = override(SweepConfig(space=("lsmcl.mask_ratio=0.25,0.5,0.75",), stages="pretrain+finetune"), dotted)
    found = trials_of(config)
    fitted = placement.fit_cluster(config, found, len(found))
    return [fitted.placed(trial) for trial in found], fitted.concurrent


def workers_of(found: list[trials.TrialSettings]) -> set[tuple[int, int]]:
    """Return the workers and decode tasks of all stages."""
    return {(s.scale.num_workers, s.data.decode_tasks) for trial in found for s in trial.stages.values()}


def test_trials_of_one_worker_run_in_processes_that_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, concurrent = fitted(monkeypatch, {"CPU": 5})
    assert (workers_of(found), concurrent) == ({(0, 1)}, 2)
    more = {"pretrain__scale__min_workers": 1, "concurrent_trials": 1}
    found, concurrent = fitted(monkeypatch, {"CPU": 5}, **more)
    assert (workers_of(found), concurrent) == ({(0, 4)}, 1)
    several = {f"{stage}__scale__num_workers": 2 for stage in ("pretrain", "finetune")}
    found, concurrent = fitted(monkeypatch, {"CPU": 5}, **several)
    assert (workers_of(found), concurrent) == ({(2, 3)}, 1)


def test_a_database_in_a_file_does_not_keep_trials_from_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster: list[dict[str, float]] = [{"CPU": 0}, {"CPU": 4}, {"CPU": 4}]
    found, concurrent = fitted(monkeypatch, *cluster)
    assert (workers_of(found), concurrent) == ({(1, 1)}, 3)
    found, concurrent = fitted(monkeypatch, *cluster, tracking__uri="http://mlflow:5000")
    assert (workers_of(found), concurrent) == ({(0, 1)}, 3)
    with pytest.raises(UserError, match=r"scale.num_workers is 0: .* does not fit the node of the sweep; give 1"):
        fitted(monkeypatch, *cluster, pretrain__scale__num_workers=0)


@pytest.mark.parametrize(
    ("changes", "memory", "spread"),
    [
        ({}, 8e9, True),
        ({}, 5e8, False),
        ({"out": "out/sweep"}, 8e9, False),
        ({"finetune.manifest": "out/index"}, 8e9, False),
        ({"finetune.model.backbone.weights": "weights.pt"}, 8e9, False),
        ({"finetune.tracking.uri": "sqlite:////tmp/mlflow.db"}, 8e9, False),
    ],
)
def test_drivers_of_workers_spread_where_all_nodes_see_the_same(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], memory: float, spread: bool
) -> None:
    monkeypatch.setattr(tuner, "own_node", lambda: "node:here")
    base = {"out": "s3://bucket/sweep", "finetune.manifest": "s3://bucket/index", "stages": "finetune"}
    base |= {"space": ("optim.lr=0.1,0.2",), "finetune.scale.num_workers": 2, "tracking.uri": "http://mlflow:5000"}
    trial = trials_of(override(SweepConfig(), base | {key: v for key, v in changes.items() if "tracking" not in key}))[
        0
    ]
    tracked = {key.removeprefix("finetune."): value for key, value in changes.items() if "tracking" in key}
    trial = dataclasses.replace(trial, stages={"finetune": override(trial.stages["finetune"], tracked)})
    assert tuner.held(trial, [{"memory": memory}]) == ({"memory": 2**30} if spread else {"node:here": 0.001})


def test_a_process_holds_what_the_neediest_of_its_stages_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"pretrain__scale__cpus_per_worker": 3, "finetune__scale__gpus_per_worker": 1}
    # No node has both; Ray Train places each stage's worker for itself.
    found, concurrent = fitted(monkeypatch, {"CPU": 4}, {"CPU": 2, "GPU": 1}, **needs)
    assert (workers_of(found), concurrent) == ({(1, 3), (1, 5)}, 1)
    found, concurrent = fitted(monkeypatch, {"CPU": 4, "GPU": 1}, **needs)
    assert all(trial.here and (trial.held.cpus_per_worker, trial.held.gpus_per_worker) == (3, 1) for trial in found)


def test_pieces_of_nodes_are_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """4.5 CPUs in all are enough for two trials, but not in pieces of 1.5."""
    assert fitted(monkeypatch, {"CPU": 1.5}, {"CPU": 1.5}, {"CPU": 1.5})[1] == 1
    with pytest.raises(UserError, match=r"data.cpus_per_decode is 1: 1 workers leave 0.5 CPUs for decoding"):
        fitted(monkeypatch, {"CPU": 1.5})
