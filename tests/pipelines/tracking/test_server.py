"""Tracking against an `mlflow server` that comes and goes."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines import storage, tracking
from pipelines.config import TrackingConfig
from pipelines.errors import UserError
from pipelines.tracking import send_queue
from pipelines.tracking.history import metric_history, read_runs
from tests.pipelines.tracking.conftest import DEADLINE_S, until

pytestmark = pytest.mark.usefixtures("clean_cwd")


class Server:
    """An `mlflow server` on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True, env=_server_environment()
            )
        until(self.answers)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def _server_environment() -> dict[str, str]:
    # MLflow's job runner would start more processes, of no use here.
    off = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")} | off


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(send_queue, "BACKOFF_S", (0.2, 0.5))
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_that_comes_late_and_leaves_early(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "o")
    config = TrackingConfig(uri=server.uri)
    tracker = tracking.start(config, stage="pretrain", out=out, params={"a": ""})
    assert tracker.run_id is None
    began = time.monotonic()
    for step in range(3000):
        tracker.log({"m": float(step), "nan": math.nan}, step)
    assert time.monotonic() - began < 1
    server.start()
    until(lambda: tracker.run_id is not None)
    assert re.fullmatch(rf"{server.uri}/#/experiments/\d+/runs/{tracker.run_id}", tracker.link)
    until(lambda: read_runs(server.uri, "s5")[0].metrics.get("m") == 2999)

    server.kill()
    monkeypatch.setattr("pipelines.tracking.tracker.FLUSH_S", 0.5)
    tracker.log({"other": 1.0}, 1)
    tracker.log({"m": -1.0}, 3000)
    tracker.finish("FINISHED")
    assert len(send_queue.read_rows(f"{out}/{tracking.UNSENT_FILE}")) == 2
    err = capfd.readouterr().err
    assert f"2 values are saved in {out}/{tracking.UNSENT_FILE}" in err
    assert err.count("answers again") == 1

    monkeypatch.setattr("pipelines.tracking.tracker.FLUSH_S", DEADLINE_S)
    server.start()
    again = tracking.start(config, stage="pretrain", out=out, params={"a": ""})
    again.finish("FINISHED")
    assert again.run_id == tracker.run_id
    [run] = read_runs(server.uri, "s5")
    assert run.status == "FINISHED"
    assert run.metrics["other"] == 1.0
    assert math.isnan(run.metrics["nan"])
    history = metric_history(server.uri, run.run_id, "m")
    assert history == [(step, float(step)) for step in range(3000)] + [(3000, -1.0)]
    assert not storage.exists(f"{out}/{tracking.UNSENT_FILE}")


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.tracking.tracker.FLUSH_S", DEADLINE_S)
    server.start()
    tracker = tracking.start(TrackingConfig(uri=server.uri), stage="pretrain", out=str(tmp_path / "o"), params={})
    assert tracker.run_id
    for step in range(100):
        tracker.log({"m": float(step)}, step)
        if step == 50:
            until(lambda: bool(read_runs(server.uri, "s5")[0].metrics))
            server.kill()
    tracker.artifact(__file__)
    until(lambda: "does not answer" in capfd.readouterr().err)
    server.start()
    tracker.finish("FINISHED")
    assert metric_history(server.uri, tracker.run_id, "m") == [(step, float(step)) for step in range(100)]
    with tracking.reading(server.uri) as client:
        assert [file.path for file in client.list_artifacts(tracker.run_id)] == [Path(__file__).name]
    assert read_runs(server.uri, "s5")[0].status == "FINISHED"
    err = capfd.readouterr().err
    assert err.count("answers again") == 1
    assert "does not answer" not in err


def test_a_server_that_does_not_know_the_host_name_says_what_to_start_it_with(tmp_path: Path) -> None:
    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # As MLflow 3.17 answers.
            body = b"Invalid Host header - possible DNS rebinding attack detected"
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(
            UserError, match=r"answers 403 to this host name: start it with .*--allowed-hosts HOST:PORT"
        ):
            tracking.start(TrackingConfig(uri=uri), stage="a", out=str(tmp_path / "o"), params={})
        with pytest.raises(UserError, match=r"--allowed-hosts HOST:PORT,localhost:PORT"):
            read_runs(uri, "s5")
        server.shutdown()
