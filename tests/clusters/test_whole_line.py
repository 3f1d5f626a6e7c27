"""Pretraining, fine-tuning and a sweep by jobs, on nodes that share an S3 store and an MLflow server and nothing else.

A node is lost in the middle, and another joins. It runs only with `make drills`.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import storage
from pipelines.config import SampleConfig
from pipelines.stages import sample
from pipelines.tracking.history import metric_history, read_runs
from tests.clusters.local_cluster import LocalCluster, client_environment, descendants, local_cluster
from tests.clusters.test_submit import ROOT, SUBMIT
from tests.pipelines.conftest import bucket as bucket
from tests.pipelines.conftest import s3_service as s3_service
from tests.pipelines.tracking.test_server import Server
from tests.tiny import HEADS, TINY

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.drill]

WORKERS, STEPS, CHECKPOINT_EVERY, LOST_AFTER = 3, 48, 10, 25
PRETRAIN = (
    TINY
    | HEADS
    | {
        "scale.num_workers": WORKERS,
        "data.cpus_per_decode": 0.25,
        "probe_videos": 0,
        "loop.batch_size": 2 * WORKERS,
        "loop.steps": STEPS,
        "loop.checkpoint_every": CHECKPOINT_EVERY,
        "loop.evaluate_every": 0,
    }
)
FINETUNE = TINY | {"scale.num_workers": 2, "data.cpus_per_decode": 0.25, "loop.epochs": 2, "loop.batch_size": 4}
RATES = 1e-3, 1e-2
WAIT_S = 300


@pytest.fixture
def tracking_server(tmp_path: Path) -> Iterator[str]:
    """Run an `mlflow server` and give its address."""
    server = Server(tmp_path)
    server.start()
    yield server.uri
    server.kill()


@pytest.fixture
def nodes(bucket: str) -> Iterator[LocalCluster]:
    """Run a cluster of three worker nodes, which know the store."""
    with local_cluster(workers=3, worker_cpus=2, **_of_the_store()) as running:
        yield running


def _of_the_store() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


class Job:
    """A stage that was submitted, and what its command has printed so far."""

    def __init__(self, cluster: LocalCluster, log: Path, stage: str, settings: dict[str, Any]) -> None:
        self.log = log
        options = [f"--{key}={value}" for key, value in settings.items()]
        command = [*SUBMIT, "--address", cluster.address, stage, *options]
        with log.open("wb") as printed:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=client_environment(cluster), stdout=printed, stderr=printed
            )

    def wait(self, condition: Callable[[], bool]) -> None:
        """Return once a condition holds; fail where the command ends before, or after `WAIT_S` seconds."""
        end = time.monotonic() + WAIT_S
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)

    def finish(self) -> str:
        """Wait until the job has succeeded, and return what was printed."""
        try:
            code = self.process.wait(WAIT_S)
        finally:
            self.process.kill()
        assert code == 0, self.log.read_text()
        return self.log.read_text()


def workers(node: subprocess.Popen[bytes]) -> set[int]:
    """Return the training workers on a node."""
    found = set()
    for pid in descendants({node.pid}):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::RayTrainWorker"):
            found.add(pid)
    return found


def test_jobs_on_nodes_that_come_and_go(bucket: str, nodes: LocalCluster, tracking_server: str, tmp_path: Path) -> None:
    shares = {"val_share": 1 / 3, "test_share": 1 / 3}
    for video in sample.draw_videos(
        SampleConfig(videos=36, classes="order-only", seconds=10, fps=4, size=32, **shares)
    ):
        storage.write_bytes(f"{bucket}/videos/{video.path}", sample.render_video(video))
    manifest, pretrained = f"{bucket}/index", f"{bucket}/pretrain"
    tracked = {"tracking.uri": tracking_server}

    def job(stage: str, out: str, settings: dict[str, Any]) -> Job:
        return Job(nodes, tmp_path / f"{Path(out).name}.log", stage, settings | tracked | {"out": out})

    job("index", manifest, {"videos": f"{bucket}/videos", "data.cpus_per_decode": 0.5}).finish()

    # One worker a node. Without the lost one there is no room for three, until another joins.
    alone = {"manifest": manifest, "scale.cpus_per_worker": 1.5}
    training = job("pretrain", pretrained, PRETRAIN | alone)
    training.wait(lambda: f"step {LOST_AFTER}/" in training.log.read_text())
    assert [len(workers(node)) for node in nodes.nodes] == [0, 1, 1, 1]
    nodes.lose_node(2)
    training.wait(lambda: "lost: a node failed" in training.log.read_text())
    nodes.add_node(2)
    printed = training.finish()
    begun = LOST_AFTER // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    assert f"resuming from the checkpoint of step {begun}" in printed
    assert storage.read_json(f"{pretrained}/result.json")["counts"]["steps"] == STEPS

    # On one node, without a loss.
    together = job("pretrain", f"{bucket}/together", PRETRAIN | {"manifest": manifest, "scale.cpus_per_worker": 0.5})
    together.wait(lambda: "step 1/" in together.log.read_text())
    assert sorted(len(workers(node)) for node in nodes.nodes) == [0, 0, 0, WORKERS]
    together.finish()
    runs = {run.out: run.run_id for run in read_runs(tracking_server, "s5")}
    losses = [
        dict(metric_history(tracking_server, runs[out], "train/loss")) for out in (pretrained, f"{bucket}/together")
    ]
    assert sorted(losses[0]) == list(range(1, STEPS + 1))
    # Up to the rounding of other numbers of threads.
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)

    by_hand = {"manifest": manifest, "checkpoint": pretrained, "optim.lr": RATES[0]}
    job("finetune", f"{bucket}/finetune", FINETUNE | by_hand).finish()
    space = {"stages": "finetune", "space": f"optim.lr={','.join(map(str, RATES))}"}
    trials = {f"finetune.{key}": value for key, value in (FINETUNE | by_hand).items() if key != "optim.lr"}
    job("sweep", f"{bucket}/sweep", space | trials).finish()

    ended = {run.out: run for run in read_runs(tracking_server, "s5")}
    assert all(run.status == "FINISHED" for run in ended.values())
    hand, sweep = ended[f"{bucket}/finetune"], ended[f"{bucket}/sweep"]
    found = [run for run in ended.values() if run.parent_run == sweep.run_id]
    trials_by_rate = {float(run.params["trial.optim.lr"]): run for run in found}
    assert sorted(trials_by_rate) == sorted(RATES)
    same = trials_by_rate[RATES[0]]
    assert same.metrics["train/loss"] == pytest.approx(hand.metrics["train/loss"], abs=1e-3)
    # The nodes keep nothing of their own.
    left = [path for path in nodes.folder.rglob("*") if path.suffix in (".mp4", ".safetensors", ".parquet")]
    assert not left
