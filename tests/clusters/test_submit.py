from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clusters import connection, jobs, submit
from pipelines.config import (
    FinetuneConfig,
    IndexConfig,
    NarrateConfig,
    PredictConfig,
    PretrainConfig,
    RecipeConfig,
    ReportConfig,
    SweepConfig,
    override,
)
from pipelines.errors import UserError
from pipelines.storage import provenance
from s5.checkpoints import checkpoint
from tests.clusters.local_cluster import LocalCluster, client_environment, local_cluster
from tests.clusters.test_shipping import plant

ROOT = Path(__file__).parent.parent.parent
SUBMIT = [sys.executable, "-m", "clusters.submit"]
TINY_SAMPLE = ["sample", "--videos", "4", "--seconds", "10", "--tracking.uri", "off"]


# --- checks before anything is shipped ------------------------------------------------------------------------------


def refusal(*arguments: str, env: dict[str, str] | None = None) -> str:
    """Return the one sentence with which a command line is refused."""
    done = subprocess.run([*SUBMIT, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sample"], "--address"),
        (["--address", "http://127.0.0.1:9"], "there is no STAGE"),
        (["--address", "http://127.0.0.1:9", "pretrane", "--out", "s3://b/o"], "did you mean pretrain?"),
        (["--address", "http://127.0.0.1:9", "pretrain", "--optim.lrr", "1"], "did you mean optim.lr?"),
        (["--address", "http://127.0.0.1:9", "--run-id", "../a", "sample", "--out", "/x"], "--run-id is '../a': give"),
        (["--address", "http://127.0.0.1:9", "--run-id", "a;b", "sample", "--out", "/x"], "--run-id is 'a;b': give"),
        (["--address", "http://127.0.0.1:9", "--stop-wait", "0", "sample"], "--stop-wait is 0"),
        (["--address", "http://127.0.0.1:9", "sample"], "--out is 'out/sample': a job runs in another folder"),
        (["--address", "http://127.0.0.1:9", "--env", "S5_NOT_SET", "sample", "--out", "/x"], "--env is 'S5_NOT_SET'"),
        (["--address", "http://127.0.0.1:9", "-e", "RAY_AUTH_TOKEN", "sample", "--out", "/x"], "jobs are no place for"),
        (["--address", "http://127.0.0.1:9", "sweep", "--out", "/o", "--space", "lrr=1"], "space is 'lrr=1': unknown"),
        (["--address", "head:8265", "sample", "--out", "/x"], "--address is 'head:8265': give the URL"),
        (["--address", "http://127.0.0.1:9", "sample", "--out", "/x"], "no Ray dashboard answers there"),
    ],
)
def test_a_mistake_is_told_before_anything_is_shipped(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        submit.run(arguments)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


NARRATED = {"out": "/o", "manifest": "/m", "narration": "/n.jsonl", "steps": "/s.csv"}


def sweep_of(*space: str) -> SweepConfig:
    """Return a sweep whose own paths all nodes see."""
    return override(SweepConfig(), {"out": "/o", "pretrain.manifest": "/m", "finetune.manifest": "/m", "space": space})


@pytest.mark.parametrize(
    ("config", "changes", "told"),
    [
        (PretrainConfig(), {"out": "s3://b/o"}, "--manifest is 'out/index/manifest.parquet'"),
        (PretrainConfig(), {"out": "s3://b/o", "manifest": "/m"}, None),
        (PretrainConfig(), {"out": "~/o", "manifest": "/m"}, "--out is '~/o'"),
        (PretrainConfig(), {"out": "/o", "manifest": "/m", "model.backbone.weights": "w.pt"}, "backbone.weights"),
        (PretrainConfig(), {"out": "/o", "manifest": "/m", "model.backbone.weights": "timm"}, None),
        (FinetuneConfig(), {"out": "/o", "manifest": "/m", "checkpoint": "out/pretrain"}, "--checkpoint is"),
        (SweepConfig(), {"out": "/o", "pretrain.manifest": "/m"}, "--finetune.manifest is"),
        (SweepConfig(), {"out": "/o", "pretrain.manifest": "/m", "stages": "pretrain"}, None),
        (sweep_of("optim.lr=1,2", "features=/f,out/g"), {}, "--space features\\[1\\] is 'out/g'"),
        (sweep_of("model.backbone.weights=timm,w.pt"), {}, "--space model.backbone.weights\\[1\\] is 'w.pt'"),
        (sweep_of("pretrain.features=choice(/f:1,s3://b/f:2)", "model.backbone.weights=timm"), {}, None),
        (PredictConfig(), {"checkpoint": "/c", "videos": ("/v", "a/*.mp4")}, "--videos\\[1\\] is 'a/\\*.mp4'"),
        (PredictConfig(), {"checkpoint": "models:/m@champion", "videos": ("s3://b/*.mp4",)}, None),
        (NarrateConfig(), NARRATED | {"encoder": "clusters"}, "--encoder is 'clusters'"),
        (NarrateConfig(), NARRATED | {"encoder": "./mpnet"}, "--encoder is './mpnet'"),
        (NarrateConfig(), NARRATED | {"encoder": "sentence-transformers/paraphrase-mpnet-base-v2"}, None),
        (RecipeConfig(), {"out": "/o", "videos": "lvu", "annotations": "/a"}, "--videos is 'lvu'"),
        (RecipeConfig(), {"out": "/o", "features": "f", "manifest": "/m"}, "--features is 'f'"),
        (ReportConfig(), {"out": "/o", "runs": ("/a", "out/b")}, "--runs\\[1\\] is 'out/b'"),
        (IndexConfig(), {"out": "/o", "videos": "/v", "annotations": "a.csv"}, "--annotations is 'a.csv'"),
    ],
)
def test_paths_must_mean_something_on_the_cluster(config: Any, changes: dict[str, Any], told: str | None) -> None:
    config = override(config, changes)
    if told is None:
        submit.check_paths(config)
        return
    with pytest.raises(UserError, match=f"{told}.*: a job runs in another folder"):
        submit.check_paths(config)


def test_a_file_of_a_space_is_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "space.yaml").write_text("features: [s3://b/f, out/g]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(connection, "connect", lambda address: pytest.fail("it is sent"))
    submitted = ["--address", "http://h", "sweep", "--out", "/o", "--tracking.uri", "off", "--space", "space.yaml"]
    submitted += ["--pretrain.manifest", "/m", "--finetune.manifest", "/m"]
    with pytest.raises(UserError, match=r"--space features\[1\] is 'out/g': a job runs in another folder"):
        submit.run(submitted)
    (tmp_path / "space.yaml").write_text("optim.lr: [1e-3, 1e-4]\n")
    sent: list[Any] = []
    monkeypatch.setattr(connection, "connect", lambda address: None)
    monkeypatch.setattr(submit, "submit", lambda client, submission: (sent.append(submission.config), ("j", True))[1])
    assert submit.run(["--no-wait", *submitted]) == 0
    assert sent[0].space == ("optim.lr=1e-3,1e-4",)
    (tmp_path / "space.yaml").write_text("features: s3://key:hush@b/f\n")
    with pytest.raises(UserError, match="holds credentials") as refused:
        submit.run(submitted)
    assert "hush" not in str(refused.value)


def test_another_ray_there_is_refused() -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"version": "4", "ray_version": "2.9.3"}')

    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told = refusal("--address", f"http://127.0.0.1:{server.server_port}", "sample", "--out", "/x")
    server.shutdown()
    server.server_close()
    assert "runs Ray 2.9.3, and here is 2.60" in told


def test_token_file_without_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH is "):
        connection.use_token()
    (tmp_path / "token").write_text("t")
    monkeypatch.delenv("RAY_AUTH_MODE")
    connection.use_token()
    assert os.environ.pop("RAY_AUTH_MODE") == "token"


# --- what is shipped ------------------------------------------------------------------------------------------------


def test_environment_holds_what_is_named_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S5_TEST_KEY", "v")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    made = submit.environment(submit.Submission("sample", PretrainConfig(), ("S5_TEST_KEY",), 0, 45))
    assert made.pop("S5_COMMIT")
    assert made == {
        "S5_TEST_KEY": "v",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "RAY_JOB_STOP_WAIT_TIME_S": "45",
    }


# --- following ------------------------------------------------------------------------------------------------------


class FlakyClient:
    """Breaks the log off after each chunk, and begins it anew at the next connection, as Ray does."""

    def __init__(self, chunks: list[str], status: str) -> None:
        self.chunks, self.status, self.connections = chunks, status, 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.connections += 1
        for chunk in self.chunks[: self.connections]:
            yield chunk
        if self.connections < len(self.chunks):
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, job: str) -> SimpleNamespace:
        done = self.connections >= len(self.chunks)
        return SimpleNamespace(
            status=Status(self.status, done), message="exit code 3, last available logs: x", driver_exit_code=3
        )


class Status(str):
    """Ray's JobStatus, as far as it is used."""

    done: bool

    def __new__(cls, name: str, done: bool) -> Status:
        made = super().__new__(cls, name)
        made.done = done
        return made

    def is_terminal(self) -> bool:
        return self.done


@pytest.mark.parametrize(("status", "code"), [("SUCCEEDED", 0), ("FAILED", 3), ("STOPPED", 130)])
def test_log_is_printed_once_over_broken_connections(
    status: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connection, "POLL_S", 0)
    client: Any = FlakyClient(["one\n", "two\n", "three\n"], status)
    assert jobs.follow(client, "j") == code
    captured = capsys.readouterr()
    assert captured.out.startswith("one\ntwo\nthree\n")
    assert ("exit code 3" in captured.err) == (status == "FAILED")
    assert "last available" not in captured.err


def test_a_cluster_that_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            raise ConnectionError("refused")

        def get_job_info(self, job: str) -> None:
            raise ConnectionError("refused")

        def get_address(self) -> str:
            return "http://head:8265"

    monkeypatch.setattr(connection, "POLL_S", 0)
    monkeypatch.setattr(connection, "PATIENCE_S", 0)
    client: Any = Gone()
    with pytest.raises(UserError, match="job j cannot be followed: the cluster at http://head:8265"):
        jobs.follow(client, "j")


# --- the real thing -------------------------------------------------------------------------------------------------


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
def test_a_mistake_is_one_sentence_and_status_2() -> None:
    assert "did you mean pretrain?" in refusal("--address", "http://127.0.0.1:9", "pretrane", "--out", "s3://b/o")


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
