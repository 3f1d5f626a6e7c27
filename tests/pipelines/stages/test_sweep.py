"""Sweeps: what is refused before any work, and real trials on a real Ray cluster."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines import command_line, storage
from pipelines.config import (
    IndexConfig,
    PretrainConfig,
    SampleConfig,
    SweepConfig,
    TrackingConfig,
    override,
)
from pipelines.errors import StoppedError, UserError
from pipelines.running.run_folder import CHECKPOINTS
from pipelines.stages import index, pretrain, sample, sweep
from pipelines.tracking.history import Run, read_runs
from tests.tiny import HEADS, TINY

SMALL = TINY | {"loop.epochs": 1, "loop.evaluate_every": 0}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Index 40 small rendered videos of ten activities."""
    folder = tmp_path_factory.mktemp("data")
    off = TrackingConfig(uri="off")
    videos, out = str(folder / "videos"), str(folder / "index")
    sample.run(
        SampleConfig(out=videos, videos=40, seconds=12, fps=4, size=32, val_share=0.25, test_share=0.25, tracking=off)
    )
    index.run(IndexConfig(videos=videos, out=out, tracking=off))
    return out


def of_pretraining(manifest: str, out: Path, **changes: Any) -> SweepConfig:
    config = SweepConfig(
        out=str(out / "sweep"),
        space=("lsmcl.mask_ratio=0.25,0.75",),
        stages="pretrain",
        concurrent_trials=1,
        pretrain=override(PretrainConfig(), SMALL | HEADS | {"manifest": manifest}),
    )
    return override(config, {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": ("clips.frames=4,400",)}, r"trial frames=400: .*clip"),
        ({"pretrain__probe_videos": 0}, "metric is 'knn/top1': pretrain.probe_videos is 0"),
        ({"metric": "linear/top1"}, "metric is 'linear/top1': pretrain.probe is 'knn'; give linear or both"),
        ({"pretrain__probe": "linear", "metric": "knn/top1"}, "pretrain.probe is 'linear'; give knn or both"),
        ({"pretrain__manifest": "none.parquet"}, "manifest is '.*/none.parquet': there is no such file"),
    ],
)
def test_every_trial_is_checked_before_the_first(
    manifest: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sweep.run(of_pretraining(manifest, tmp_path, **changes))
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def another_cluster() -> Iterator[None]:
    """A second Ray on this machine, as of another user or job."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets need a short path
    code = (
        "import ray, sys\n"
        f"ray.init(address='local', num_cpus=0, include_dashboard=False, object_store_memory=80_000_000, "
        f"_temp_dir={folder!r})\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert any("ready" in line for line in process.stdout)
        yield
        process.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)


# --- real trials ----------------------------------------------------------------------------------------------------


def logged(out: Path) -> list[Run]:
    return read_runs(f"sqlite:///{out}/mlflow.db", "s5")


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_local")
def test_a_sweep_compares_its_trials(manifest: str, tmp_path: Path) -> None:
    config = of_pretraining(manifest, tmp_path)
    result = sweep.run(config)
    assert result["counts"] == {"trials": 2, "failed": 0}
    assert {row["setting"] for row in result["settings"]} == {"mask_ratio=0.25", "mask_ratio=0.75"}
    runs = logged(tmp_path)
    parent = next(run for run in runs if run.stage == "sweep")
    assert (parent.params["objective.metric"], parent.params["objective.mode"]) == ("knn/top1", "max")
    trials = [run for run in runs if run.parent_run == parent.run_id]
    assert {run.params["trial.lsmcl.mask_ratio"] for run in trials} == {"0.25", "0.75"}
    assert all("knn/top1" in run.metrics for run in trials)
    assert {run.parent_run for run in runs if run.stage == "pretrain"} == {run.run_id for run in trials}
    assert {run.status for run in runs} == {"FINISHED"}
    assert sweep.run(config) == result
    before = storage.read_table(str(tmp_path / "sweep" / "sweep.parquet"))
    more = sweep.run(dataclasses.replace(config, space=("lsmcl.mask_ratio=0.25,0.5,0.75",), seeds=2))
    assert (more["counts"], {row["seeds"] for row in more["settings"]}) == ({"trials": 6, "failed": 0}, {2})
    after = storage.read_table(str(tmp_path / "sweep" / "sweep.parquet"))
    # What had finished was not run again.
    rows = {row["trial"]: row for row in after.to_pylist()}
    assert all(rows[row["trial"]] == row for row in before.to_pylist())
    best = command_line.parse(["pretrain", "--config", str(tmp_path / "sweep" / "best" / "pretrain.json")])[1]
    assert isinstance(best, PretrainConfig)
    assert (best.lsmcl.mask_ratio, best.out) == (more["settings"][0]["values"]["lsmcl.mask_ratio"], "out/pretrain")


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_local")
def test_a_member_that_only_goes_on_is_a_run_by_hand(manifest: str, tmp_path: Path) -> None:
    changes = {"search": "pbt", "samples": 2, "space": ("optim.lr=loguniform(1e-4,1e-2)",)}
    length = {"pretrain__loop__epochs": 2, "pretrain__loop__evaluate_every": 1}
    config = of_pretraining(manifest, tmp_path, **changes, **length)
    result = sweep.run(config)
    assert result["counts"] == {"trials": 4, "failed": 0}
    rows = storage.read_table(str(tmp_path / "sweep" / "sweep.parquet")).to_pylist()
    (source,) = {row["start"] for row in rows if row["epoch"] == 2}
    better, other = sorted((row for row in rows if row["epoch"] == 2), key=lambda row: row["setting"] not in source)
    assert better["optim.lr"] == next(row["optim.lr"] for row in rows if row["trial"] == source) != other["optim.lr"]
    for row in (better, other):
        part = storage.read_json(f"{tmp_path}/sweep/trials/{row['trial']}/pretrain/result.json")
        assert 2 * part["counts"]["resumed_at"] == part["counts"]["steps"]

    settings = override(config.pretrain, {"optim.lr": better["optim.lr"], "out": str(tmp_path / "hand")})
    assert pretrain.run(override(settings, {"loop.stop_after_epoch": 1}))["counts"]["resumed_at"] == 0
    by_hand = pretrain.run(settings)["metrics"]
    for metric in ("train/loss", "knn/top1"):
        assert by_hand[metric] == better[metric]
    assert sweep.run(config) == result
    assert result["schedule"] == storage.read_json(str(tmp_path / "sweep" / "best" / "schedule.json"))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_local", "another_cluster")
def test_a_stopped_sweep_goes_on_with_what_is_left(manifest: str, tmp_path: Path) -> None:
    # Long enough for a trial not to end by itself before it is stopped.
    config = of_pretraining(manifest, tmp_path, pretrain__loop__epochs=60)
    folders = (tmp_path / "sweep" / "trials" / f"mask_ratio={ratio},seed=0,60epochs" for ratio in (0.25, 0.75))
    first, second = (folder / "pretrain" for folder in folders)
    sent: list[float] = []

    def interrupt() -> None:
        # Ray Train releases the CPUs of a controller that is killed once it has seen the workers start.
        while not any((second / CHECKPOINTS).glob("*/meta.json")):
            time.sleep(0.1)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    with pytest.raises(StoppedError, match="stopped as requested after 1 of 2 trials") as stopped:
        sweep.run(config)
    assert stopped.value.code == 128 + signal.SIGINT
    assert time.monotonic() - sent[0] < 300
    assert {run.status for run in logged(tmp_path) if str(second.parent) in run.out or run.stage == "sweep"} == {
        "KILLED"
    }
    assert not (tmp_path / "sweep" / "result.json").exists()
    deadline = time.monotonic() + 300
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, "the stopped trial's workers still hold CPUs"
        time.sleep(0.5)

    saved = max(int(folder.name.removeprefix("step_")) for folder in (second / CHECKPOINTS).iterdir())
    before = (first / "result.json").stat().st_mtime_ns
    assert sweep.run(config)["counts"] == {"trials": 2, "failed": 0}
    assert (first / "result.json").stat().st_mtime_ns == before
    assert storage.read_json(str(second / "result.json"))["counts"]["resumed_at"] == saved
    assert {run.status for run in logged(tmp_path)} == {"FINISHED"}
