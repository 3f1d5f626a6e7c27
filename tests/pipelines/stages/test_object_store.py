"""The whole line with all of its files in an S3 service on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from pipelines import storage
from pipelines.config import SampleConfig
from pipelines.data.manifest import read_manifest, splits
from pipelines.stages import sample
from pipelines.storage.weights import local_checkpoint
from pipelines.tracking.history import read_runs
from s5.checkpoints.checkpoint import read_model
from tests.pipelines.conftest import SECRET
from tests.pipelines.training.test_training import MODEL, TASK

# One process, so that Ray starts once.
STAGES = """
import json, sys
from pipelines.command_line import main
for arguments in json.loads(sys.argv[1]):
    if code := main(arguments):
        sys.exit(f"{arguments[0]} ended with {code}")
"""
TINY = MODEL | {"loop.batch_size": 3, "loop.epochs": 1}
CLIPS = {key: value for key, value in MODEL.items() if key.startswith("clips.")}
BACKBONE = {key: value for key, value in MODEL.items() if key.startswith("model.backbone.")}
SHARE = {"scale.cpus_per_worker": 0.5, "data.cpus_per_decode": 0.5}


def _arguments(stage: str, settings: dict[str, Any]) -> list[str]:
    return [stage, *(f"--{key}" if value is True else f"--{key}={value}" for key, value in settings.items())]


def _line(place: str, tracking: str) -> list[list[str]]:
    """Return the command lines of the stages, from the videos in a bucket to what a model says of them."""
    out = {name: f"{place}/{name}" for name in ("index", "transcode", "pretrain", "features", "finetune", "evaluate")}
    stages: dict[str, dict[str, Any]] = {
        "index": {"videos": f"{place}/videos", "data.cpus_per_decode": 0.5},
        "transcode": CLIPS | {"manifest": out["index"], "measured_videos": 1, "data.cpus_per_decode": 0.5},
        "pretrain": TINY | TASK | {"manifest": out["transcode"], "probe_videos": 0, "scale.num_workers": 1},
        "features": BACKBONE | SHARE | {"manifest": out["transcode"], "checkpoint": out["pretrain"]},
        "finetune": TINY | {"manifest": out["transcode"], "checkpoint": out["pretrain"], "features": out["features"]},
        "evaluate": SHARE | {"manifest": out["transcode"], "checkpoint": out["finetune"], "clips_per_video": 2},
    }
    stages["features"] |= {"frames_per_second": 2, "shard_videos": 10}
    stages["finetune"] |= {"model.backbone.frozen": True}
    return [_arguments(stage, s | {"out": out[stage], "tracking.uri": tracking}) for stage, s in stages.items()]


def _contents(place: str) -> dict[str, bytes]:
    """Return all files below a folder by their names."""
    system, inner = storage.filesystem(place)
    infos = system.get_file_info(fs.FileSelector(inner, recursive=True))
    prefix = place.removesuffix(inner)
    return {info.path: storage.read_bytes(prefix + info.path) for info in infos if info.is_file}


@pytest.mark.slow
@pytest.mark.cluster
def test_the_whole_line_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    local = tmp_path / "local"
    shares = {"val_share": 1 / 3, "test_share": 1 / 3}
    plans = sample.draw_videos(SampleConfig(videos=18, classes="order-only", seconds=10, fps=4, size=32, **shares))
    for plan in plans:
        storage.write_bytes(f"{bucket}/videos/{plan.path}", sample.render_video(plan))

    tracking = f"sqlite:///{local}/mlflow.db"
    # Ray's sockets lie in its folder, and their names may have 107 characters.
    folder = tempfile.mkdtemp(prefix="s5ray")
    environment = os.environ | {"RAY_TMPDIR": folder, "RAY_LOG_TO_DRIVER": "1"}
    try:
        ended = subprocess.run(
            [sys.executable, "-c", STAGES, json.dumps(_line(bucket, tracking))],
            env=environment,
            capture_output=True,
            text=True,
        )
        logs = _contents(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    indexed, transcoded = read_manifest(f"{bucket}/index"), read_manifest(f"{bucket}/transcode")
    assert splits(indexed) == splits(transcoded) == {"train": 6, "val": 6, "test": 6}
    assert all(uri.startswith(f"{bucket}/transcode/videos/") for uri in transcoded["uri"].to_pylist())
    assert storage.read_table(f"{bucket}/index/rejects.parquet").num_rows == 0
    results = {
        arguments[0]: storage.read_json(f"{bucket}/{arguments[0]}/result.json") for arguments in _line(bucket, "")
    }
    assert results["transcode"]["counts"]["files"] == results["features"]["counts"]["videos"] == 18
    for stage, kind in (("pretrain", "lsmcl"), ("finetune", "class")):
        assert results[stage]["counts"]["steps"] == 2
        assert results[stage]["checkpoint"].startswith(bucket)
        with local_checkpoint(results[stage]["checkpoint"]) as checkpoint:
            assert read_model(checkpoint)[1].kind == kind
    predictions = storage.read_table(f"{bucket}/evaluate/predictions.parquet").to_pydict()
    assert predictions["clips"] == [2] * 6
    hits = sum(a == b for a, b in zip(predictions["label"], predictions["prediction"], strict=True))
    assert results["evaluate"]["metrics"]["test/accuracy"] == pytest.approx(hits / 6)

    runs = read_runs(tracking, "s5")
    assert sorted(run.stage for run in runs) == sorted(results)
    assert all(run.status == "FINISHED" and run.out == f"{bucket}/{run.stage}" for run in runs)
    # Neither files, logs, tracking nor what was printed hold what is secret.
    assert any(content for name, content in logs.items() if name.endswith(".log"))
    everything = _contents(bucket) | _contents(str(local)) | logs
    everything |= {"stdout": ended.stdout.encode(), "stderr": ended.stderr.encode()}
    everything["parameters"] = repr([run.params for run in runs]).encode()
    assert not [name for name, content in everything.items() if SECRET.encode() in content]
