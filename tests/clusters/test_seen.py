"""What can be seen of a cluster and of its runs, on a real one of several nodes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.storage import provenance
from pipelines.training.exported import EXPORTED, STEP, TAGS
from tests.clusters.drill import ROOT, SETTINGS, Drill
from tests.clusters.files import FILES
from tests.clusters.local_cluster import LocalCluster, client_environment, local_cluster

NAMES = {f"ray_{name}" for name in (STEP, *(name for name, _ in EXPORTED.values()))}
WAIT_S = 300


def queries() -> list[str]:
    """Return the Prometheus queries of the dashboard."""
    dashboard = json.loads(FILES["grafana.json"].read_text())
    variables = [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    return variables + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_draws_what_a_run_exports() -> None:
    text = "\n".join(queries())
    assert set(re.findall(r"ray_\w+", text)) == NAMES
    assert set(re.findall(r"(\w+)=~", text)) | set(re.findall(r", (\w+)\)$", text, re.MULTILINE)) == set(TAGS)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        # Ray's own is ten times as long.
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with local_cluster(workers=1, worker_cpus=2, head_cpus=0) as running:
            yield running


@pytest.mark.slow
@pytest.mark.cluster
def test_a_doctor_finds_what_nodes_cannot_reach(cluster: LocalCluster) -> None:
    # Processes of each node run in a folder of its own: this is one that nodes do not share.
    asked = ["--store", "/proc/self/cwd/store", "--tracking-uri", "http://127.0.0.1:9", "--json"]
    command = [sys.executable, "-m", "clusters.doctor", "--address", cluster.address, *asked]
    done = subprocess.run(command, cwd=ROOT, env=client_environment(cluster), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    wrong = sorted(each["text"] for each in answer["findings"] if each["fix"])
    assert len(wrong) == 2
    assert "--store '/proc/self/cwd/store' is not shared" in wrong[0]
    assert "cannot reach MLflow (Connection refused)" in wrong[1]
    nodes = answer["nodes"]
    assert sorted(node["resources"].get("CPU", 0) for node in nodes) == [0, 2]
    assert {tuple(node["errors"]) for node in nodes} == {("mlflow",)}
    for node in nodes:
        assert node["versions"] == answer["here"] == provenance.versions()
        assert node["write_mb_s"] > 0
        assert abs(node["clock_offset_s"]) <= node["clock_error_s"] < WAIT_S


def exported(cluster: LocalCluster) -> dict[str, dict[str, str]]:
    """Return what Prometheus would find of a run on all nodes: the labels by the metric's name."""
    (targets,) = (
        json.loads(path.read_text()) for path in cluster.folder.glob("n0/prom_metrics_service_discovery.json")
    )
    text = ""
    for address in (address for target in targets for address in target["targets"]):
        # Ray also lists ports of processes that are starting, or are not there.
        with suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text += answer.read().decode()
    lines = re.findall(r"^(ray_s5_\w+)\{(.*)\} \S+$", text, re.MULTILINE)
    return {name: dict(re.findall(r'(\w+)="([^"]*)"', labels)) for name, labels in lines}


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.cluster
def test_a_job_its_run_and_its_metrics_point_at_each_other(cluster: LocalCluster, tmp_path: Path) -> None:
    # So long that it runs until it is seen; it ends with the cluster.
    drill = Drill(tmp_path, cluster, {"scale.num_workers": 0, "loop.epochs": 10_000, "loop.checkpoint_every": 100_000})
    drill.write_inputs()
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    settings = SETTINGS | drill.changes | {"tracking.uri": tracking, "tracking.experiment": "seen"}
    places = {"manifest": drill.config.manifest, "out": drill.config.out}
    options = [f"--{key}={value}" for key, value in (settings | places).items()]
    command = [sys.executable, "-m", "clusters.submit", "--address", cluster.address, "--no-wait", "pretrain", *options]
    environment = client_environment(cluster)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    job = re.findall(r"job (\S+) at", done.stdout)[0]

    found: dict[str, dict[str, str]] = {}
    end = time.monotonic() + WAIT_S
    while found.keys() != NAMES:
        assert time.monotonic() < end, cluster.get(f"/api/jobs/{job}/logs")
        time.sleep(1)
        found |= exported(cluster)
    client = MlflowClient(tracking)
    experiment = client.get_experiment_by_name("seen")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    for labels in found.values():
        assert [labels[tag] for tag in TAGS] == ["pretrain", "seen", run.info.run_id]
    assert run.data.tags["ray.submission_id"] == job
    assert run.data.tags["ray.dashboard"] == cluster.address
    details: Any = cluster.get(f"/api/jobs/{job}")
    assert run.data.tags["ray.job_id"] == details["job_id"]
    assert run.data.tags["commit"] == details["metadata"]["commit"]
