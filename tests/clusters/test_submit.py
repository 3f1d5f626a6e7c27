from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
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


@pytest.mark.slow
def test_a_mistake_is_one_sentence_and_status_2() -> None:
    assert "did you mean pretrain?" in refusal("--address", "http://127.0.0.1:9", "pretrane", "--out", "s3://b/o")
