"""The report, from a database that is filled as the stages fill it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines import storage, tracking
from pipelines.config import ReportConfig, TrackingConfig
from pipelines.errors import UserError
from pipelines.plots import sweeps
from pipelines.reporting.table import labels, value_text
from pipelines.stages import report
from pipelines.tracking.history import Run

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def _copied(tmp_path: Path, database: Path) -> None:
    shutil.copy(database, tmp_path / "mlflow.db")


def start(root: Path, stage: str, out: str, parent: str = "", **params: object) -> tracking.Tracker:
    config = TrackingConfig(uri=f"sqlite:///{root}/mlflow.db")
    named = {key.replace("__", "."): value for key, value in params.items()}
    return tracking.start(config, stage=stage, out=str(root / out), params=named, parent_run=parent)


def fill(root: Path) -> None:
    """Log the stages of a small study, with a sweep over two keys and one over one key."""
    rng = np.random.default_rng(0)
    done = start(root, "index", "index")
    done.log({"index/videos": 478, "index/rejects": 2}, None)
    done.finish("FINISHED")
    for out, gain in (("pretrain", 0.30), ("ablations/no_masks/pretrain", 0.22)):
        run = start(root, "pretrain", out)
        for step in range(0, 1200, 5):
            fall = math.exp(-step / 300)
            noise = rng.normal(0, 0.05)
            run.log({"train/loss": 0.9 + 2.0 * fall + noise, "train/top1": 0.85 - 0.7 * fall + noise / 2}, step)
            if step % 120 == 0:
                run.log({"knn/top1": 0.35 + gain * (1 - fall)}, step)
        run.log({"train/clips_per_second": 41.3, "train/data_wait_share": 0.0231, "data/failures": 2}, None)
        run.finish("FINISHED")
    run = start(root, "finetune", "finetune", checkpoint=str(root / "pretrain"))
    for epoch in range(1, 11):
        fall = math.exp(-epoch / 4)
        run.log({"train/loss": 0.2 + 2 * fall, "val/loss": 0.5 + 1.6 * fall}, 30 * epoch)
        run.log({"train/accuracy": 0.97 - 0.8 * fall, "val/accuracy": 0.81 - 0.7 * fall}, 30 * epoch)
    run.finish("FAILED")
    run = start(root, "evaluate", "evaluate", checkpoint=str(root / "finetune"))
    run.log({"test/accuracy": 0.7833, "test/chance": 0.1, "test/videos": 120}, None)
    run.finish("FINISHED")
    fill_sweeps(root)


def fill_sweeps(root: Path) -> None:
    space = ("lsmcl.mask_ratio=0.25,0.5,0.75", "clips.frames=4,8,16")
    sweep = start(root, "sweep", "sweep", space=space, metric="")
    assert sweep.run_id
    for ratio in (0.25, 0.5, 0.75):
        for frames in (16, 4, 8):
            out = f"sweep/{ratio}-{frames}"
            keys = {"trial__lsmcl__mask_ratio": ratio, "trial__clips__frames": frames}
            trial = start(root, "trial", out, sweep.run_id, **keys)
            if (ratio, frames) != (0.75, 16):
                trial.log({"val/accuracy": 0.5 + 0.015 * frames - (ratio - 0.5) ** 2, "knn/top1": 0.4}, None)
            trial.finish("FINISHED" if (ratio, frames) != (0.75, 16) else "FAILED")
    sweep.finish("FINISHED")
    sweep = start(root, "sweep", "sweep_lr", space=("optim.lr=1e-4,1e-3,1e-2",), metric="val/mse")
    assert sweep.run_id
    for lr, mse in (("1e-4", 2.1), ("1e-3", 0.9), ("1e-2", 1.4)):
        trial = start(root, "trial", f"sweep_lr/{lr}", sweep.run_id, trial__optim__lr=lr)
        trial.log({"val/mse": mse}, None)
        trial.finish("FINISHED")
    sweep.finish("FINISHED")


@pytest.mark.slow
def test_report_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    result = report.run(ReportConfig(out=str(tmp_path / "report")))
    tables = {table["title"]: table for table in result["tables"]}
    titles = ["index", "pretrain", "finetune", "evaluate", "sweep", "sweep_lr"]
    assert [title for title in tables if ":" not in title] == titles
    assert tables["index"]["rows"][0][:3] == ("index", "478", "2")
    assert [row[0] for row in tables["pretrain"]["rows"]] == ["pretrain", "ablations/no_masks/pretrain"]
    assert tables["finetune"]["rows"][0][:2] == ("finetune", "pretrain")
    assert tables["finetune"]["rows"][0][-1] == "failed"
    assert tables["evaluate"]["header"][:4] == ("run", "checkpoint", "test/accuracy", "test/chance")
    assert tables["evaluate"]["rows"][0][:5] == ("evaluate", "finetune", "0.783", "0.100", "120")
    grid = tables["sweep"]
    assert grid["header"] == ("lsmcl.mask_ratio", "clips.frames", "val/accuracy", "time", "status")
    assert grid["rows"][0][:3] == ("0.5", "16", "0.740")  # the best comes first, what has no result last
    assert grid["rows"][-1][:3] == ("0.75", "16", "–")
    assert [row[0] for row in tables["sweep_lr"]["rows"]] == ["1e-3", "1e-2", "1e-4"]

    names = [Path(path).name for path in result["figures"]]
    curves = ["pretrain_contrastive_loss", "pretrain_top-1_accuracy", "finetune_loss", "finetune_accuracy"]
    assert names == [*(f"curves_{name}.png" for name in curves), "sweep.png", "sweep_lr.png"]
    assert all(storage.read_bytes(path).startswith(PNG) for path in result["figures"])
    page = storage.read_bytes(result["page"]).decode()
    assert page.count("<svg") == len(names)
    assert page.count("<section") == len(result["tables"])
    text = storage.read_bytes(result["report"]).decode()
    assert "| evaluate | finetune | 0.783 | 0.100 | 120 |" in text
    assert "![sweep](sweep.png)" in text
    shown = capsys.readouterr().out
    assert "evaluate\nrun" in shown
    assert f"wrote {tmp_path}/report/report.md" in shown
    assert storage.read_json(f"{tmp_path}/report/result.json")["tables"][0]["title"] == "index"

    # The report logs no run of its own; --runs narrows it down, and the latest of an --out counts.
    again = start(tmp_path, "index", "index")
    again.log({"index/videos": 480}, None)
    again.finish("FINISHED")
    result = report.run(ReportConfig(out=str(tmp_path / "report"), runs=(str(tmp_path / "index"),)))
    assert [table["title"] for table in result["tables"]] == ["index"]
    assert [row[1] for row in result["tables"][0]["rows"]] == ["480"]
    assert result["figures"] == []


def test_a_sweep_whose_space_mlflow_cuts_off_has_its_table(tmp_path: Path) -> None:
    space = ("optim.lr=" + ",".join(f"{i}e-9" for i in range(1500)), "clips.long-stride=1,2")
    assert sum(map(len, space)) > 6000
    sweep = start(tmp_path, "sweep", "sweep", space=space, metric="val/accuracy")
    for lr in ("1e-9", "2e-9"):
        trial = start(
            tmp_path, "trial", f"sweep/{lr}", str(sweep.run_id), trial__optim__lr=lr, trial__clips__long_stride=2
        )
        trial.log({"val/accuracy": 0.5}, None)
        trial.finish("FINISHED")
    sweep.finish("FINISHED")
    config = ReportConfig(out=str(tmp_path / "report"), tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    (table,) = report.run(config)["tables"]
    assert tuple(table["header"][:3]) == ("optim.lr", "clips.long_stride", "val/accuracy")
    assert {tuple(row[:2]) for row in table["rows"]} == {("1e-9", "2"), ("2e-9", "2")}


@pytest.mark.parametrize(
    ("logged", "metric", "best"),
    [
        ({"objective__metric": "val/loss", "objective__mode": "min"}, "val/loss", "1e-3"),
        ({"objective__metric": "val/loss", "objective__mode": "max"}, "val/loss", "1e-2"),
        ({"objective__metric": "val/accuracy", "objective__mode": "max"}, "val/accuracy", "1e-4"),
        ({}, "val/accuracy", "1e-4"),
    ],
)
def test_a_sweep_is_reported_by_what_it_compared(
    tmp_path: Path, logged: dict[str, str], metric: str, best: str
) -> None:
    sweep = start(tmp_path, "sweep", "sweep", space=("optim.lr=1e-4,1e-3,1e-2",), metric="", **logged)
    for lr, loss, accuracy in (("1e-4", 1.5, 0.9), ("1e-3", 0.9, 0.5), ("1e-2", 2.1, 0.7)):
        trial = start(tmp_path, "trial", f"sweep/{lr}", str(sweep.run_id), trial__optim__lr=lr)
        trial.log({"val/loss": loss, "val/accuracy": accuracy}, None)
        trial.finish("FINISHED")
    sweep.finish("FINISHED")
    config = ReportConfig(out=str(tmp_path / "report"), tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    (table,) = report.run(config)["tables"]
    assert table["header"][1] == metric
    assert table["rows"][0][0] == best


def test_an_empty_experiment_is_a_users_mistake(tmp_path: Path) -> None:
    config = ReportConfig(out=str(tmp_path / "report"))
    with pytest.raises(UserError, match="unknown experiment 's5': there are template"):
        report.run(config)
    start(tmp_path, "index", "index").finish("FINISHED")
    with pytest.raises(UserError, match=r"holds no runs of experiment 's5' below .*give another --runs"):
        report.run(ReportConfig(out=config.out, runs=(str(tmp_path / "elsewhere"),)))
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("test/accuracy", 1.0, "1.000"),
        ("test/videos", 1200.0, "1200"),
        ("train/loss", 0.0001234, "0.000123"),
        ("train/loss", math.nan, "nan"),
        ("val/mse", None, "–"),
        ("val/mse", 12345.6, "1.23e+04"),
    ],
)
def test_values_as_text(metric: str, value: float | None, text: str) -> None:
    assert value_text(metric, value) == text


def test_labels_tell_runs_apart() -> None:
    def run(out: str, name: str = "pretrain") -> Run:
        return Run("0", "pretrain", "1", name, out, "FINISHED", "", {}, {}, 0.0, 1.0)

    assert labels([run("/a/x"), run("/a/y")]) == ["x", "y"]
    assert labels([run("/a/x"), run("/b/x")]) == ["a/x", "b/x"]
    assert labels([run("/a/x", "long clips"), run("/b/x")]) == ["long clips", "b/x"]
    assert labels([run("s3://bucket/a/x"), run("s3://bucket/x")]) == ["a/x", "x"]
    assert labels([run("/a/x")]) == ["x"]


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (("a",), [("s5",), ("vis4mer",)]),
        (("a",), [("1",)]),
        (("lr", "b"), [("0.001", "x"), ("0.01", "y"), ("0.1", "x"), ("0.3", "z")]),
        # So many, and so far apart, that the axes are logarithmic and choose their marks.
        (("lr",), [(f"{10 ** (-i / 3):.3g}",) for i in range(12)]),
        (("lr", "b"), [(f"{10 ** (-i / 3):.3g}", f"{2**i}") for i in range(12)]),
    ],
)
def test_sweep_maps_of_all_kinds(keys: tuple[str, ...], values: list[tuple[str, ...]]) -> None:
    trials = [sweeps.Trial(value, 0.1 * i) for i, value in enumerate(values)]
    content = sweeps.sweep_map(keys, trials, "val/accuracy", False)
    assert content is not None
    assert content.png.startswith(PNG)
    assert content.svg.startswith("<svg")
    assert "mathdefault" not in content.svg


def test_no_map_over_three_keys_or_without_results() -> None:
    assert sweeps.sweep_map(("a", "b", "c"), [sweeps.Trial(("1", "2", "3"), 0.5)], "m", False) is None
    assert sweeps.sweep_map(("a",), [sweeps.Trial(("1",), math.nan)], "m", False) is None
