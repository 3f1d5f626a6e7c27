"""Jobs that are submitted to a real cluster: they run, fail, are left and stopped, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.storage import provenance
from s5.checkpoints import checkpoint
from tests.clusters.local_cluster import LocalCluster, client_environment, local_cluster
from tests.clusters.test_shipping import plant
from tests.clusters.test_submit import ROOT, SUBMIT, TINY_SAMPLE, refusal

OF_NODES = {"MLFLOW_TRACKING_PASSWORD": "planted-there-1", "AWS_SECRET_ACCESS_KEY": "planted-there-2"}
OF_THE_CLIENT = {"MLFLOW_TRACKING_PASSWORD": "planted-here-1", "AWS_SECRET_ACCESS_KEY": "planted-here-2"}
"""Credentials as the nodes have them, and as the one has them who submits."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(workers=2, worker_cpus=2, head_cpus=0, **OF_NODES) as running:
        yield running


def submitted(cluster: LocalCluster, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [*SUBMIT, "--address", cluster.address, *arguments]
    environment = client_environment(cluster) | OF_THE_CLIENT
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
@pytest.mark.cluster
def test_token_that_is_missing_wrong_or_unused(cluster: LocalCluster, tmp_path: Path) -> None:
    arguments = ["--address", cluster.address, "sample", "--out", str(tmp_path / "o")]
    right = client_environment(cluster)
    none = {key: value for key, value in right.items() if not key.startswith("RAY_AUTH")} | {"HOME": str(tmp_path)}
    assert "wants its token and there is none here; set RAY_AUTH_TOKEN" in refusal(*arguments, env=none)
    assert "refuses the token" in refusal(*arguments, env=right | {"RAY_AUTH_TOKEN": "x" * 32})
    assert "RAY_AUTH_MODE is not 'token'" in refusal(*arguments, env=right | {"RAY_AUTH_MODE": "disabled"})
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.cluster
def test_job_succeeds_and_job_fails(cluster: LocalCluster, tmp_path: Path) -> None:
    done = submitted(cluster, *TINY_SAMPLE, "--out", str(tmp_path / "sample"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[sample]" in done.stdout
    result = json.loads((tmp_path / "sample/result.json").read_text())
    assert result["commit"] == provenance.commit()
    assert result["ray"]["submission_id"] in done.stdout

    (tmp_path / "file").touch()
    failed = submitted(cluster, *TINY_SAMPLE, "--out", str(tmp_path / "file/out"))
    assert failed.returncode == 2
    assert "error: --out is" in failed.stdout
    assert "Traceback" not in failed.stdout + failed.stderr


@pytest.mark.slow
@pytest.mark.cluster
def test_ctrl_c_leaves_the_job_and_stop_ends_it(cluster: LocalCluster, tmp_path: Path) -> None:
    environment = client_environment(cluster)
    arguments = [
        "--stop-wait",
        "5",
        "sample",
        "--videos",
        "5000",
        "--tracking.uri",
        "off",
        "--out",
        str(tmp_path / "o"),
    ]
    command = [*SUBMIT, "--address", cluster.address, *arguments]
    follower = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    job = follower.stdout.readline().split()[2]
    for line in follower.stdout:
        if "Running entrypoint" in line:
            break
    follower.send_signal(signal.SIGINT)
    out, _ = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert f"job {job} continues" in out
    assert status(cluster, job) == "RUNNING"

    # The same command on a terminal: it follows the same job, and Ctrl-C asks.
    ours, theirs = os.openpty()
    again = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=subprocess.PIPE, text=True)
    assert again.stdout is not None
    assert again.stdout.readline().split()[2:] == [job, "at", cluster.address, "runs", "already"]
    assert "goes on with other settings" in refusal(*command[3:], "--seconds", "20", env=environment)
    again.send_signal(signal.SIGINT)
    os.write(ours, b"s\n")
    again.communicate(timeout=120)
    assert again.returncode == 130
    assert status(cluster, job) == "STOPPED"

    def asked(*words: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "clusters.jobs", words[0], "--address", cluster.address, *words[1:]]
        return subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    # After its end the run is started again, as another job.
    run = job.removesuffix("-1")
    second = submitted(cluster, "--no-wait", *arguments).stdout.split()[2]
    assert (job, second) == (f"{run}-1", f"{run}-2")
    assert asked("stop", run).returncode == 0
    listed = asked("list").stdout
    assert f"{job}  stopped  " in listed
    assert f"{second}  stopped  " in listed
    assert asked("status", second).stdout.split()[:2] == [second, "stopped"]
    assert asked("logs", job).returncode == 130
    assert "does not run; job " in asked("stop", second).stderr
    told = asked("status", "../x").stderr
    assert "RUN is '../x': the cluster has no such run; it has " in told
    assert run in told


def status(cluster: LocalCluster, job: str) -> str:
    """Return a job's status."""
    answer: Any = cluster.get(f"/api/jobs/{job}")
    return str(answer["status"])


@pytest.mark.slow
@pytest.mark.cluster
def test_ray_job_submit_of_a_checkout_ships_code_alone(cluster: LocalCluster, tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    plant(tree)
    run = {"stage": "sample", "out": str(out), "videos": 4, "seconds": 10, "tracking": {"uri": "off"}}
    (tree / "run.json").write_text(json.dumps(run))
    command = ["ray", "job", "submit", "--address", cluster.address, "--working-dir", str(tree), "--"]
    command += ["sh", "-c", "ls -A . s5 && sh clusters/python.sh -m pipelines sample --config run.json"]
    environment = client_environment(cluster)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "result.json").is_file()
    listed = {line.strip() for line in done.stdout.splitlines()}
    assert {"s5", "pipelines", "clusters", "pyproject.toml", "run.json", "errors.py"} <= listed
    assert not listed & {".env", "secret.txt", ".git", "out", "v.mp4", "weights.pt"}


@pytest.mark.slow
@pytest.mark.cluster
def test_pretraining_on_two_nodes(cluster: LocalCluster, tmp_path: Path) -> None:
    pipelines = [sys.executable, "-m", "pipelines"]
    sample = ["sample", "--videos", "16", "--seconds", "12", "--tracking.uri", "off", "--out", str(tmp_path / "videos")]
    environment = client_environment(cluster) | {"RAY_AUTH_MODE": "disabled"}
    subprocess.run([*pipelines, *sample], cwd=ROOT, env=environment, check=True, timeout=300)
    videos, index, out = (str(tmp_path / name) for name in ("videos", "index", "pretrain"))

    done = submitted(cluster, "index", "--videos", videos, "--out", index)
    assert done.returncode == 0, done.stdout + done.stderr

    # 1.5 of a node's 2 CPUs: the two workers cannot share a node.
    small = {
        "clips.frames": 4,
        "model.backbone.frame_size": 64,
        "model.backbone.depth": 2,
        "model.backbone.embed_dim": 32,
        "model.backbone.num_heads": 2,
        "model.decoder.blocks": 2,
        "lsmcl.hidden": 32,
        "lsmcl.dim": 16,
        "loop.batch_size": 4,
        "loop.epochs": 1,
        "scale.num_workers": 2,
        "scale.cpus_per_worker": 1.5,
        "data.cpus_per_decode": 0.5,
    }
    settings = [text for key, value in small.items() for text in (f"--{key}", str(value))]
    done = submitted(cluster, "pretrain", "--manifest", index, "--out", out, *settings)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    result = json.loads(Path(out, "result.json").read_text())
    assert result["counts"]["steps"] > 0
    assert Path(tmp_path, "mlflow.db").is_file()
    assert len(nodes_of_workers(cluster)) == 2

    model, meta = checkpoint.read_model(Path(result["checkpoint"]))
    assert meta.step == result["counts"]["steps"]
    assert all(weight.isfinite().all() for weight in model.parameters())
    no_secrets(cluster, tmp_path, done)


def no_secrets(cluster: LocalCluster, folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    """Look for the token and the planted credentials in all that jobs have left: files, logs, records, processes."""
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"])
    everything = {"printed": (done.stdout + done.stderr).encode(), "jobs": cluster.read("/api/jobs/")}
    everything["actors"] = cluster.read("/api/v0/actors?detail=1&limit=1000")
    for path in (*cluster.folder.rglob("*"), *folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path != token:
            everything[str(path)] = path.read_bytes()
    for process in cluster.leftovers():
        with contextlib.suppress(OSError):
            everything[f"process {process}"] = Path(f"/proc/{process}/cmdline").read_bytes()
    assert b"pretrain-" in everything["jobs"]
    assert any(name.endswith("mlflow.db") for name in everything)
    assert any("runtime_env" in name and name.endswith(".log") for name in everything)
    for secret in (token.read_text().strip(), *OF_NODES.values(), *OF_THE_CLIENT.values()):
        assert not [name for name, content in everything.items() if secret.encode() in content]


def nodes_of_workers(cluster: LocalCluster) -> set[str]:
    """Return the nodes that training workers have run on."""
    answer: Any = cluster.get("/api/v0/actors?detail=1&limit=1000")
    actors = answer["data"]["result"]["result"]
    return {actor["node_id"] for actor in actors if "TrainWorker" in actor["class_name"]}


@pytest.mark.slow
@pytest.mark.cluster
def test_nothing_is_left_of_a_cluster() -> None:
    with local_cluster(workers=1) as short:
        assert short.alive() == 2
        assert len(short.leftovers()) > 4
        short.lose_node(1)
        end = time.monotonic() + 60
        while short.alive() > 1 and time.monotonic() < end:
            time.sleep(0.5)
        assert short.alive() == 1
    assert not short.leftovers()
    assert not short.folder.exists()
