"""Tracking against a database file."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import storage, tracking
from pipelines.config import TrackingConfig
from pipelines.errors import UserError
from pipelines.tracking import runs
from pipelines.tracking.client import connect
from pipelines.tracking.history import metric_history, read_runs
from tests.pipelines.tracking.conftest import DEADLINE_S

pytestmark = pytest.mark.usefixtures("clean_cwd")


# --- URIs -----------------------------------------------------------------------------------------------------------


def test_uri_defaults_to_a_database_beside_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.resolve_uri(TrackingConfig(), "/data/out/pretrain") == "sqlite:////data/out/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000/")
    assert tracking.resolve_uri(TrackingConfig(), "s3://bucket/out") == "http://host:5000"
    assert tracking.resolve_uri(TrackingConfig(uri="off"), "s3://bucket/out") == "off"


@pytest.mark.parametrize("uri", ["sqlite:///a/mlflow.db", "a/mlflow.db", "a"])
def test_uri_of_a_relative_database_becomes_absolute(uri: str) -> None:
    assert tracking.resolve_uri(TrackingConfig(uri=uri), "o") == f"sqlite:///{Path.cwd()}/a/mlflow.db"


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "file:mlruns", "sqlite:///", "sqlite://", "sqlite:///:memory:"])
def test_an_unusable_uri_is_a_users_mistake(uri: str) -> None:
    with pytest.raises(UserError, match=r"--tracking\.uri is .*give"):
        tracking.resolve_uri(TrackingConfig(uri=uri), "/o")


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("http://user:hush@host:5000", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("https://hush@host", "MLFLOW_TRACKING_TOKEN"),
        ("HTTP://user:hu/sh@host/path", "MLFLOW_TRACKING_USERNAME"),
        ("https://host/?token=hush", "MLFLOW_TRACKING_TOKEN"),
        ("postgresql://user:hu@sh@host:5432/mlflow", "PGUSER and PGPASSWORD"),
        ("mysql+pymysql://host/mlflow?password=hush", "password file"),
    ],
)
def test_a_uri_with_credentials_is_refused_without_showing_them(
    uri: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^--tracking\.uri holds credentials .* give \w[\w+]*://host") as raised:
        tracking.resolve_uri(TrackingConfig(uri=uri), "/o")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI holds credentials") as by_variable:
        tracking.resolve_uri(TrackingConfig(), "/o")
    for message in (str(raised.value), str(by_variable.value)):
        assert remedy in message
        assert "hu" not in message.replace("mlflow", "")
        assert "sh@" not in message


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000/path",
        "postgresql://user@host/mlflow",
        "postgresql://host:5432/m?sslmode=require",
        "databricks",
    ],
)
def test_a_uri_without_credentials_stays_as_it_is(uri: str) -> None:
    assert tracking.resolve_uri(TrackingConfig(uri=uri), "/o") == uri


def test_uri_cannot_default_on_an_object_store() -> None:
    with pytest.raises(UserError, match=r"give --tracking\.uri http"):
        tracking.resolve_uri(TrackingConfig(), "s3://bucket/out")


# --- a database file ------------------------------------------------------------------------------------------------


def test_a_run_in_the_default_database(tmp_path: Path) -> None:
    out = str(tmp_path / "out" / "pretrain")
    storage.write_json(f"{out}/run.json", {"stage": "pretrain"})
    params = {f"group.key{i}": i for i in range(130)} | {"space": ("a=1,2", "b=3"), "long": "x" * 9000, "empty": ""}
    tracker = tracking.start(TrackingConfig(), stage="pretrain", out=out, params=params, parent_run="0123456789abcdef")
    for step in range(5):
        tracker.log({"train/loss": 5.0 - step, "per class/a@b": 1.0, "nan": math.nan}, step)
    tracker.log({"train/loss": 0.5, "test/accuracy": 0.25}, None)
    tracker.finish("FINISHED")

    [run] = read_runs(tracker.uri, "s5")
    assert (run.stage, run.name, run.out, run.status) == ("pretrain", "pretrain", out, "FINISHED")
    assert run.run_id == tracker.run_id
    assert run.parent_run == "0123456789abcdef"
    assert len(run.params) == 133
    assert json.loads(run.params["space"]) == ["a=1,2", "b=3"]
    assert run.params["long"] == "x" * 9000
    assert run.metrics["train/loss"] == 0.5
    assert run.metrics["test/accuracy"] == 0.25
    assert run.metrics["per class/a_b"] == 1.0
    assert math.isnan(run.metrics["nan"])
    assert 0 <= run.seconds < 100
    # The final result stands at the last step, not at step 0.
    assert metric_history(tracker.uri, run.run_id, "train/loss") == [(0, 5), (1, 4), (2, 3), (3, 2), (4, 0.5)]
    files = sorted(p.name for p in (tmp_path / "out" / "mlartifacts" / run.run_id).rglob("*") if p.is_file())
    assert files == ["environment.json", "long_params.json", "run.json"]
    assert not storage.exists(f"{out}/{tracking.UNSENT_FILE}")


def test_a_run_links_what_made_its_inputs_and_lists_its_videos(tmp_path: Path) -> None:
    made = tracking.start(TrackingConfig(), stage="pretrain", out=str(tmp_path / "pretrain"), params={})
    made.finish("FINISHED")
    about = {"benchmark": "lvu", "task": "director", "videos": 107}
    videos = tracking.DataSet(name="lvu director", digest="0" * 24, source="s3://b/m", context="train", about=about)
    elsewhere = tmp_path / "elsewhere"
    storage.write_json(f"{elsewhere}/mlflow_run.json", {"uri": "http://other", "run_id": "1"})
    tracker = tracking.start(
        TrackingConfig(),
        stage="finetune",
        out=str(tmp_path / "finetune"),
        params={},
        inputs={
            "checkpoint": str(tmp_path / "pretrain" / "checkpoints" / "step_1"),
            "manifest": str(elsewhere),
            "features": str(tmp_path / "missing"),
        },
        datasets=[videos],
    )
    tracker.tag("checkpoint", "s3://bucket/checkpoints/step_9")
    tracker.finish("FINISHED")
    _, run = read_runs(tracker.uri, "s5")
    assert run.links == {"checkpoint": made.run_id}
    assert run.benchmark == ("lvu", "director")
    with tracking.reading(tracker.uri) as client:
        logged = client.get_run(run.run_id)
        experiments = [run.experiment_id]
        (found,) = client.search_runs(experiments, f"tags.`link.checkpoint` = '{made.run_id}'")
    assert found.info.run_id == run.run_id
    assert logged.data.tags["checkpoint"] == "s3://bucket/checkpoints/step_9"
    assert logged.data.tags["mlflow.source.git.commit"] == logged.data.tags["commit"].removesuffix("+changes")
    (read,) = logged.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest) == ("lvu director", "0" * 24)
    assert json.loads(read.dataset.source) == {"uri": "s3://b/m"}
    assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "train")]


def test_a_second_start_resumes_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "o")
    first = tracking.start(TrackingConfig(), stage="finetune", out=out, params={"a": 1, "scale.num_workers": 1})
    first.log({"m": 1.0}, 1)
    first.finish("FAILED")
    second = tracking.start(
        TrackingConfig(), stage="finetune", out=out, params={"a": 1, "scale.num_workers": 2, "new": 3}
    )
    [run] = read_runs(second.uri, "s5")
    assert run.status == "RUNNING"
    second.log({"m": 2.0}, 2)
    second.finish("FINISHED")
    [run] = read_runs(second.uri, "s5")
    assert run.run_id == first.run_id == second.run_id
    assert run.status == "FINISHED"
    assert run.params == {"a": "1", "scale.num_workers": "1", "new": "3"}
    assert metric_history(second.uri, run.run_id, "m") == [(1, 1.0), (2, 2.0)]
    with tracking.reading(second.uri) as client:
        client.delete_run(run.run_id)
    third = tracking.start(TrackingConfig(), stage="finetune", out=out, params={})
    third.finish("FINISHED")
    assert [run.run_id for run in read_runs(second.uri, "s5")] == [third.run_id] != [first.run_id]
    assert capfd.readouterr().err == ""


def test_what_mlflow_refuses_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = tracking.start(TrackingConfig(), stage="pretrain", out=str(tmp_path / "o"), params={})
    tracker.artifact(str(tmp_path / "missing.png"))
    for step in range(20):
        tracker.log({"x" * 300 if step == 7 else "m": 1.0}, step)
    tracker.finish("FINISHED")
    assert tracker.run_id
    assert len(metric_history(tracker.uri, tracker.run_id, "m")) == 19
    err = capfd.readouterr().err
    assert "missing.png (No such file or directory): it is left out" in err
    assert "refused 2 entries" in err


def test_an_unusable_store_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(UserError, match=r"--tracking\.uri is .*give another one"):
        tracking.start(config, stage="pretrain", out=str(tmp_path / "o"), params={})


def test_a_deleted_experiment_is_a_users_mistake(tmp_path: Path) -> None:
    tracker = tracking.start(TrackingConfig(experiment="gone"), stage="a", out=str(tmp_path / "o"), params={})
    tracker.finish("FINISHED")
    with tracking.reading(tracker.uri) as client:
        experiment = client.get_experiment_by_name("gone")
        assert experiment
        client.delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError, match=r"'gone' was deleted .* give another name"):
        tracking.start(TrackingConfig(experiment="gone"), stage="a", out=str(tmp_path / "o"), params={})


def test_what_the_machine_does_is_logged_along_the_seconds_of_the_run(tmp_path: Path) -> None:
    for every_s in (0.3, 10.0, 0.0):
        tracker = tracking.start(TrackingConfig(), stage="pretrain", out=str(tmp_path / f"{every_s}"), params={})
        assert tracker.started is not None
        tracker.started -= 100
        with tracking.machine_logged(tracker, every_s):
            time.sleep(1)
        tracker.finish("FINISHED")
    often, once, never = read_runs(tracker.uri, "s5")
    names = {f"system/{key}" for key in ("cpu_utilization_percentage", "system_memory_usage_megabytes")}
    assert names < often.metrics.keys() == once.metrics.keys()
    assert 0 < once.metrics["system/system_memory_usage_percentage"] < 100
    assert 0 <= once.metrics["system/cpu_utilization_percentage"] <= 100
    (step, _) = metric_history(tracker.uri, once.run_id, "system/cpu_utilization_percentage")[0]
    assert 101 <= step < 200
    assert not any(key.startswith("system/") for key in never.metrics)


def test_off_does_nothing(tmp_path: Path) -> None:
    out = tmp_path / "o"
    tracker = tracking.start(TrackingConfig(uri="off"), stage="pretrain", out=str(out), params={"a": 1})
    tracker.log({"m": 1.0}, 1)
    tracker.artifact("nowhere")
    tracker.finish("FINISHED")
    assert (tracker.uri, tracker.run_id) == ("off", None)
    assert not out.exists()


def test_reading_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such database; run a stage first"):
        read_runs(f"sqlite:///{tmp_path}/new/mlflow.db", "s5")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking.start(TrackingConfig(experiment="videos"), stage="a", out=str(tmp_path / "o"), params={}).finish(
        "FINISHED"
    )
    with pytest.raises(UserError, match=r"unknown experiment 'vidoes': did you mean videos\?"):
        read_runs(uri, "vidoes")
    with pytest.raises(UserError, match="'off'"):
        read_runs("off", "s5")


def test_runs_below_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrackingConfig(uri=str(tmp_path / "mlflow.db"))
    for name in ("a/x", "a", "ab"):
        tracking.start(config, stage=name, out=str(tmp_path / name), params={}).finish("FINISHED")
    uri = tracking.resolve_uri(config, "o")
    assert [run.stage for run in read_runs(uri, "s5", below=(str(tmp_path / "a"),))] == ["a/x", "a"]
    assert [run.stage for run in read_runs(uri, "s5", below=("../a/",))] == ["a/x", "a"]
    assert len(read_runs(uri, "s5")) == 3


TRIAL = """
import sys
from pipelines import tracking
from pipelines.config import TrackingConfig
tracker = tracking.start(TrackingConfig(uri=sys.argv[1]), stage="trial", out=sys.argv[2], params={"a": 1})
for step in range(50):
    tracker.log({"m": step}, step)
tracker.finish("FINISHED")
"""


@pytest.mark.slow
def test_processes_that_open_a_new_database_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    trials = [
        subprocess.Popen([sys.executable, "-c", TRIAL, uri, str(tmp_path / f"o{i}")], env=env, stderr=subprocess.PIPE)
        for i in range(4)
    ]
    assert [(trial.communicate(timeout=DEADLINE_S)[1], trial.returncode) for trial in trials] == [(b"", 0)] * 4
    runs = read_runs(uri, "s5")
    assert len(runs) == 4
    for run in runs:
        assert metric_history(uri, run.run_id, "m") == [(step, float(step)) for step in range(50)]


@pytest.mark.slow
def test_a_database_whose_creation_was_killed_is_created_again(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    uri = f"sqlite:///{folder}/mlflow.db"
    code = (
        "import os, sys\n"
        "from pipelines.tracking.client import connect\n"
        "os.replace = lambda *paths: os.kill(os.getpid(), 9)\n"
        "connect(sys.argv[1])"
    )
    killed = subprocess.run([sys.executable, "-c", code, uri], cwd=Path(__file__).parents[3])
    assert killed.returncode == -signal.SIGKILL
    (half_made,) = folder.iterdir()
    assert half_made.stat().st_size > 0
    half_made.write_bytes(half_made.read_bytes()[:8192])
    assert half_made.name != "mlflow.db"
    assert connect(uri).search_experiments()[0].name == "Default"
    assert [path.name for path in folder.iterdir()] == ["mlflow.db"]


def test_what_was_made_without_mlflow_is_linked_to_no_run(tmp_path: Path) -> None:
    sweep, made = tmp_path / "sweep", tmp_path / "sweep" / "finetune"
    made.mkdir(parents=True)
    for folder in (sweep, made):
        (folder / "run.json").write_text("{}")
    (sweep / runs.RUN_FILE).write_text('{"uri": "sqlite:///a.db", "run_id": "of the sweep"}')
    inputs = {"checkpoint": str(made / "checkpoints"), "manifest": str(sweep / "manifest")}
    assert runs.linked_runs("sqlite:///a.db", inputs) == {"link.manifest": "of the sweep"}
