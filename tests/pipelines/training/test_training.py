"""The line from manifest to evaluation, on a real Ray cluster and a real MLflow database."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from ray.util.state import list_actors

from pipelines import storage
from pipelines.config import (
    EvaluateConfig,
    FinetuneConfig,
    IndexConfig,
    PretrainConfig,
    SampleConfig,
    TrackingConfig,
    override,
)
from pipelines.errors import StageError, StoppedError, UserError
from pipelines.stages import evaluate, finetune, index, pretrain, sample
from pipelines.tracking.history import metric_history, read_runs
from s5.checkpoints.checkpoint import read_model
from s5.training.watchdog import EXIT_STATUS
from tests.tiny import HEADS, TINY

ROOT = Path(__file__).parents[3]

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]

MODEL = TINY | {"loop.epochs": 3}
TASK = HEADS | {"loop.evaluate_every": 0}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Index 40 small rendered videos of ten activities: 20 for training, 10 for validation, 10 for testing."""
    folder = tmp_path_factory.mktemp("data")
    off = TrackingConfig(uri="off")
    videos = str(folder / "videos")
    sample.run(
        SampleConfig(out=videos, videos=40, seconds=12, fps=4, size=32, val_share=0.25, test_share=0.25, tracking=off)
    )
    out = str(folder / "index")
    result = index.run(IndexConfig(videos=videos, out=out, tracking=off))
    assert result["counts"] | {"train": 20, "val": 10, "test": 10, "rejects": 0} == result["counts"]
    return out


def pretraining(manifest: str, out: Path, **changes: Any) -> PretrainConfig:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return override(PretrainConfig(), MODEL | TASK | {"manifest": manifest, "out": str(out)} | dotted)


def losses(config: PretrainConfig | FinetuneConfig) -> list[float]:
    """Return the loss of every step as MLflow has it."""
    uri = f"sqlite:///{Path(config.out).parent}/mlflow.db"
    run = next(run for run in read_runs(uri, "s5") if run.out == config.out)
    history = metric_history(uri, run.run_id, "train/loss")
    assert [step for step, _ in history] == list(range(1, len(history) + 1))
    return [value for _, value in history]


@pytest.fixture(scope="module")
def straight(manifest: str, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """Pretrain without a break on one worker, in this process."""
    config = pretraining(manifest, tmp_path_factory.mktemp("straight") / "pretrain")
    assert config.scale.num_workers == 0
    result = pretrain.run(config)
    assert result["counts"]["steps"] == 6
    assert {"train/loss", "train/top1", "train/embedding_spread", "knn/top1", "data/failures"} <= result[
        "metrics"
    ].keys()
    return config


def test_two_workers_follow_the_curve_of_one(straight: PretrainConfig, tmp_path: Path) -> None:
    """Also where each computes its share in parts, and recomputes it for the backward pass."""
    again = override(straight, {"out": str(tmp_path / "again"), "scale.num_workers": 1})
    pretrain.run(again)
    assert losses(again) == losses(straight)
    saving = {"loop.micro_batch": 3, "loop.recompute": True}
    two = override(straight, saving | {"out": str(tmp_path / "two"), "scale.num_workers": 2})
    pretrain.run(two)
    assert losses(two) == pytest.approx(losses(straight), rel=2e-3)
    assert losses(two)[0] == pytest.approx(losses(straight)[0], rel=1e-6)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.drill)])
def test_a_stopped_run_resumes_where_it_was(
    straight: PretrainConfig, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # Long enough for the signal to arrive before the end on any machine.
    whole = override(
        straight, {"out": str(tmp_path / "whole"), "loop.epochs": 20, "loop.checkpoint_every": 10, "optim.lr": 1e-4}
    )
    config = override(whole, {"out": str(tmp_path / "pretrain"), "scale.num_workers": workers})

    def stop(step: int, row: dict[str, float]) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="the checkpoint is saved, and the same command resumes") as stopped:
        pretrain.run(config, on_row=stop)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not storage.exists(str(tmp_path / "pretrain" / "result.json"))
    with pytest.raises(UserError, match=r"holds a run with optim.lr 0.0001, not 0.002: give another --out"):
        pretrain.run(override(config, {"optim.lr": 2e-3}))

    result = pretrain.run(config)
    assert 0 < result["counts"]["resumed_at"] < result["counts"]["steps"] == 40
    assert f" from the checkpoint of step {result['counts']['resumed_at']}\n" in capsys.readouterr().out
    assert result["metrics"]["train/save_failures"] == 0
    pretrain.run(whole)
    assert losses(config) == losses(whole)
    resumed, uninterrupted = (read_model(checkpoint_of(c))[0].state_dict() for c in (config, whole))
    assert all((resumed[name] == value).all() for name, value in uninterrupted.items())
    assert pretrain.run(config) == result


def test_what_a_row_raises_ends_the_training_of_this_process(straight: PretrainConfig, tmp_path: Path) -> None:
    """As where Tune ends a trial whose process is to run the next one."""

    def leave(step: int, row: dict[str, float]) -> None:
        raise SystemExit(7)

    config = override(straight, {"out": str(tmp_path / "pretrain"), "loop.epochs": 4000})
    with pytest.raises(SystemExit):
        pretrain.run(config, on_row=leave)
    assert not [thread.name for thread in threading.enumerate() if thread.name == "watchdog"]
    assert list((tmp_path / "pretrain" / "checkpoints").glob("step_*/meta.json"))


def monitors() -> set[int]:
    """Return the processes of all run monitors; those of earlier runs may still be ending."""
    alive = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")])
    return {actor.pid for actor in alive if actor.class_name == "RunMonitor"}


def test_a_lost_monitor_ends_the_run_with_a_sentence(straight: PretrainConfig, tmp_path: Path) -> None:
    before = monitors()

    def lose(step: int, row: dict[str, float]) -> None:
        if step == 1:
            (monitor,) = monitors() - before
            os.kill(monitor, signal.SIGKILL)

    config = override(straight, {"out": str(tmp_path / "pretrain"), "loop.epochs": 4000})
    with pytest.raises(StageError, match=r"the process of the run's monitor was lost .*: run the same command again"):
        pretrain.run(config, on_row=lose)
    assert list((tmp_path / "pretrain" / "checkpoints").glob("step_*/meta.json"))


HANGING = """
import os, signal, sys, threading, time
from pipelines.config import PretrainConfig, override
from pipelines.stages import pretrain
from tests.pipelines.training.test_training import pretraining

build = pretrain.build

def interrupt():
    for _ in range(2):
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

def hang(progress):
    if sys.argv[3] == "interrupted":
        threading.Thread(target=interrupt).start()
    time.sleep(1000)

def hanging(job, context):
    loop = build(job, context)
    loop.task.before_step = hang
    return loop

pretrain.build = hanging
# Long enough for the first batch on a busy machine.
seconds = 45 if sys.argv[3] == "alone" else 600
pretrain.run(override(pretraining(sys.argv[1], sys.argv[2]), {"scale.hang_timeout_s": seconds, "tracking.uri": "off"}))
"""


def hung(manifest: str, out: Path, how: str) -> subprocess.CompletedProcess[str]:
    """Pretrain in a process of its own whose first step never ends; it hangs alone, or is interrupted twice."""
    return subprocess.run(
        [sys.executable, "-c", HANGING, manifest, str(out), how],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.drill
def test_a_run_that_hangs_in_its_own_process_says_so(manifest: str, tmp_path: Path) -> None:
    done = hung(manifest, tmp_path / "pretrain", "alone")
    assert done.returncode == EXIT_STATUS
    assert "error: training hangs in step 1: training for 4" in done.stderr
    assert "run the same command again to resume" in done.stderr
    assert "in hang\n" in (tmp_path / "pretrain" / "stacks.txt").read_text()


@pytest.mark.drill
def test_a_second_interrupt_does_not_wait_for_the_step(manifest: str, tmp_path: Path) -> None:
    done = hung(manifest, tmp_path / "pretrain", "interrupted")
    assert "stopping: saving a checkpoint first (once more to stop at once)" in done.stdout
    assert "KeyboardInterrupt" in done.stderr
    assert "training hangs" not in done.stderr


def test_a_run_that_diverges_ends_with_its_videos(
    straight: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"optim.lr": 1e30, "optim.warmup": 0.0, "loop.max_skipped": 2}
    config = override(straight, changes | {"out": str(tmp_path / "pretrain")})
    with pytest.raises(StageError, match=r"not finite in steps 2 to 4, more in a row than loop.max_skipped allows"):
        pretrain.run(config)
    skipped = storage.read_json(str(tmp_path / "pretrain" / "not_finite.json"))
    assert [step["step"] for step in skipped] == [2, 3, 4]
    assert [len(set(step["video_ids"])) for step in skipped] == [8, 8, 8]
    assert "WARNING: 1 step(s) skipped up to step 2" in capsys.readouterr().out


def test_collapsed_embeddings_raise_an_alarm(
    straight: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No spread is as wide as twice that of random directions."""
    changes = {"lsmcl.collapse_spread": 2.0, "loop.steps": 1, "out": str(tmp_path / "pretrain")}
    result = pretrain.run(override(straight, changes))
    assert result["metrics"]["train/collapsed_at_step"] == 1
    assert "ALARM: embeddings collapse (spread " in capsys.readouterr().out


def checkpoint_of(config: PretrainConfig | FinetuneConfig) -> Path:
    return Path(storage.read_json(storage.join(config.out, "result.json"))["checkpoint"])


def test_fine_tuning_and_evaluation(straight: PretrainConfig, manifest: str, tmp_path: Path) -> None:
    table = pq.read_table(Path(manifest) / "manifest.parquet")
    # One training video is gone since indexing: its spare is trained on, and it is listed among the rejects.
    gone = table.filter([split == "train" for split in table["split"].to_pylist()])["uri"].to_pylist()[0]
    moved = Path(gone).rename(f"{gone}.gone")
    try:
        config = override(
            FinetuneConfig(),
            MODEL
            | {
                "manifest": manifest,
                "out": str(tmp_path / "finetune"),
                "checkpoint": straight.out,
                "data.max_failure_share": 0.5,
                "scale.num_workers": 2,
            },
        )
        result = finetune.run(config)
    finally:
        moved.rename(gone)
    assert result["metrics"]["data/failures_total"] >= 1
    assert {"val/accuracy", "best/val/accuracy", "train/selection_entropy"} <= result["metrics"].keys()
    rejects = pq.read_table(tmp_path / "finetune" / "rejects.parquet").to_pylist()
    assert {(row["uri"], row["reason"]) for row in rejects} == {(gone, "file not found")}

    found = evaluate.run(
        EvaluateConfig(
            out=str(tmp_path / "evaluate"),
            checkpoint=config.out,
            manifest=manifest,
            clips_per_video=2,
            data=config.data,
        )
    )
    predictions = pq.read_table(tmp_path / "evaluate" / "predictions.parquet").to_pylist()
    assert len(predictions) == found["metrics"]["test/videos"] == 10
    hits = sum(row["label"] == row["prediction"] for row in predictions)
    assert found["metrics"]["test/accuracy"] == pytest.approx(hits / 10)
    assert found["metrics"]["test/chance"] == pytest.approx(0.1)

    near = evaluate.run(
        EvaluateConfig(
            out=str(tmp_path / "near"),
            checkpoint=straight.out,
            manifest=manifest,
            clips_per_video=2,
            probe="both",
            data=config.data,
            scale=straight.scale,
        )
    )
    assert (tmp_path / "near" / "neighbours.png").read_bytes().startswith(b"\x89PNG")
    assert {"knn/top1", "linear/top1", "linear/decay", "retrieval/same_video"} <= near["metrics"].keys()
    assert (near["metrics"]["linear/videos"], near["metrics"]["linear/train_videos"]) == (10, 20)
    assert storage.read_json(str(tmp_path / "near" / "metrics.json")) == near["metrics"]


def test_a_checkpoint_of_another_architecture_is_refused(
    straight: PretrainConfig, manifest: str, tmp_path: Path
) -> None:
    changes = {"manifest": manifest, "out": str(tmp_path / "finetune"), "checkpoint": straight.out}
    config = override(FinetuneConfig(), MODEL | changes | {"model.backbone.depth": 2})
    with pytest.raises(UserError, match=r"model.backbone.depth is 1 there and 2 here"):
        finetune.run(config)
    assert not (tmp_path / "finetune").exists()
