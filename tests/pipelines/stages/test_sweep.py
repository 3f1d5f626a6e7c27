"""Sweeps: what their spaces mean, what is refused before any work, and real trials on a real Ray cluster."""

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
    FinetuneConfig,
    IndexConfig,
    PretrainConfig,
    SampleConfig,
    SweepConfig,
    TrackingConfig,
    flatten,
    override,
)
from pipelines.errors import StoppedError, UserError
from pipelines.running import resources
from pipelines.running.run_folder import CHECKPOINTS
from pipelines.stages import index, pretrain, sample, sweep
from pipelines.tracking.history import Run, read_runs
from pipelines.tuning import draws, placement, search_space, trials, tuner
from tests.tiny import HEADS, TINY

SMALL = TINY | {"loop.epochs": 1, "loop.evaluate_every": 0}


def values_of(*entries: str, **changes: Any) -> list[dict[str, Any]]:
    config = SweepConfig(space=entries, **changes)
    return draws.settings_of(config, search_space.parse(config))


def trials_of(config: SweepConfig) -> list[trials.TrialSettings]:
    settings = draws.settings_of(config, search_space.parse(config))
    return [trials.trial_of(config, values, seed) for seed in trials.seeds_of(config) for values in settings]


# --- the space ------------------------------------------------------------------------------------------------------


def test_draws_follow_from_the_seed() -> None:
    entries = ("optim.lr=loguniform(1e-5,1e-2)", "clips.frames=4,8", "lsmcl.momentum=uniform(0.9,0.99)")
    drawn = values_of(*entries, samples=8)
    assert drawn == values_of(*entries, samples=8) != values_of(*entries, samples=8, seed=1)
    assert [*drawn[:3], *drawn[8:11]] == values_of(*entries, samples=3)
    assert len({search_space.name_of(values) for values in drawn}) == len(drawn) == 16
    assert all(list(values) == ["optim.lr", "clips.frames", "lsmcl.momentum"] for values in drawn)
    assert all(1e-5 <= values["optim.lr"] <= 1e-2 and 0.9 <= values["lsmcl.momentum"] <= 0.99 for values in drawn)
    assert 0.2 < sum(values["optim.lr"] < 10**-3.5 for values in drawn) / len(drawn) < 0.8


def test_a_grid_runs_each_trial_once() -> None:
    assert len(values_of("clips.frames=4,8,4", "lsmcl.mask_ratio=0.25,0.75", samples=3)) == 4


def test_other_values_have_other_names() -> None:
    values: list[Any] = [0.12341, 0.12342, 1e-5, "a/b", "a_b", "a b", "x" * 300, "x" * 299]
    names = {search_space.name_of({"optim.lr": value}) for value in values}
    assert len(names) == len(values)
    assert {"lr=0.12341", "lr=1e-05", "lr=a_b"} <= names
    assert all(len(name) < 60 and "/" not in name for name in names)


def test_lists_stand_in_brackets_and_a_single_value_is_a_list_of_one() -> None:
    entry = "model.decoder.selection.keep_ratio=[0.5, 0.7],0.4,[0.3],[0.5,0.5]"
    config = SweepConfig(space=(entry, "finetune.optim.betas=[0.9,0.95],[0.9,0.999]"), stages="finetune")
    found = trials_of(config)
    settings = [trial.stages["finetune"] for trial in found]
    ratios = [each.model.decoder.selection.keep_ratio for each in settings if isinstance(each, FinetuneConfig)]
    assert ratios == [pair for pair in [(0.5, 0.7), (0.4,), (0.3,), (0.5, 0.5)] for _ in range(2)]
    assert [each.optim.betas for each in settings[:2]] == [(0.9, 0.95), (0.9, 0.999)]
    assert found[0].name == "betas=0.9+0.95,keep_ratio=0.5+0.7"
    assert len({trial.name for trial in found}) == 8
    assert [search_space.text_of(value) for value in found[2].values.values()] == ["[0.4]", "[0.9,0.95]"]


def test_a_drawn_value_of_a_list_is_a_list_of_one() -> None:
    config = SweepConfig(space=("model.decoder.selection.keep_ratio=uniform(0.2,0.8)",), stages="finetune", samples=2)
    for trial in trials_of(config):
        settings = trial.stages["finetune"]
        assert isinstance(settings, FinetuneConfig)
        assert settings.model.decoder.selection.keep_ratio == next(iter(trial.values.values()))


@pytest.mark.parametrize("text", ["[0.5,0.7", "0.5],0.7", "[[0.5],0.7]", "[0.5]0.7", "[0.5]x[0.7]"])
def test_brackets_that_do_not_pair_are_named(text: str) -> None:
    with pytest.raises(UserError, match=r"space is .*: write a list as \[value,value\], and a comma between two lists"):
        values_of(f"model.decoder.selection.keep_ratio={text}", stages="finetune")


@pytest.mark.parametrize("length", [1, 40, 400])
def test_names_of_many_keys_fit_a_folder(length: int, tmp_path: Path) -> None:
    keys = list(flatten(FinetuneConfig()))[:30]
    values: list[dict[str, Any]] = [{key: f"{'x' * length}{last}" for key in keys} for last in "ab"]
    names = {search_space.name_of(each) for each in values}
    assert len(names) == 2
    for name in names:
        # As Tune does: with a trial's id in front.
        (tmp_path / f"abcde_00000_{name}").mkdir()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("clips.frames=,",), "write key=value,value"),
        (("clips.frames=4", "clips.frames=8"), "clips.frames is there already"),
    ],
)
def test_entries_without_or_with_two_values_are_named(entries: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        values_of(*entries)


# --- before any work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "val/acuracy"}, r"unknown metric 'val/acuracy': did you mean val/accuracy\?"),
        ({"metric": "val/mse"}, "unknown metric 'val/mse'"),
        ({"metric": "val/accuracy", "stages": "pretrain"}, "unknown metric 'val/accuracy'"),
        ({"metric": "knn/top1", "early_stopping": True}, "early_stopping compares evaluations of finetune; give val/"),
    ],
)
def test_a_metric_that_no_trial_has_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trials.objective_of(override(SweepConfig(), changes))


@pytest.mark.parametrize(
    ("metric", "task", "mode"),
    [
        ("val/mse", "regression", "min"),
        ("train/loss", "class", "min"),
        ("knn/top1", "class", "max"),
        ("val/accuracy", "class", "max"),
    ],
)
def test_errors_and_losses_are_minimised(metric: str, task: str, mode: str) -> None:
    config = override(SweepConfig(metric=metric), {"finetune.task": task})
    assert trials.objective_of(config).mode == mode


def test_paths_of_trials_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space_ = ("finetune.checkpoint=a,b", "model.backbone.weights=timm,w.pt,s3://b/w.pt")
    config = SweepConfig(out="out", space=space_, stages="finetune")
    found = trials_of(config)
    settings = [each.stages["finetune"] for each in found]
    assert {each.manifest for each in settings} == {f"{tmp_path}/out/index/manifest.parquet"}
    assert {each.checkpoint for each in settings if isinstance(each, FinetuneConfig)} == {
        f"{tmp_path}/a",
        f"{tmp_path}/b",
    }
    assert {each.model.backbone.weights for each in settings} == {"timm", f"{tmp_path}/w.pt", "s3://b/w.pt"}
    assert all(each.out.startswith(f"{tmp_path}/out/trials/checkpoint=") for each in settings)
    assert {each.tracking.uri for each in settings} == {f"sqlite:///{tmp_path}/mlflow.db"}


# --- what fits a cluster --------------------------------------------------------------------------------------------


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
