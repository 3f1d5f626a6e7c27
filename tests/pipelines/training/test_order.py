"""Training follows the clip order exactly, also where driver and cluster are killed and other workers resume."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.config import PretrainConfig, override
from pipelines.data.clip_order import ClipOrder, order_of
from pipelines.data.manifest import MANIFEST, SCHEMA
from pipelines.running.run_folder import CHECKPOINTS, RESULT
from s5.video.reading import probe
from tests.clusters.local_cluster import descendants, kill, wait_gone
from tests.pipelines.training.test_training import MODEL, TASK
from tests.s5.videos import write_video

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.drill]

ROOT = Path(__file__).parents[3]
VIDEOS, BATCH, EPOCHS = 17, 4, 4
STEPS_PER_EPOCH, CHECKPOINT_EVERY = VIDEOS // BATCH, 3
# Workers of each start (0: its own process), and the step, in mid-epoch after a checkpoint, at which it is killed; the
# last one finishes.
STARTS = [(0, 5), (2, 10), (1, EPOCHS * STEPS_PER_EPOCH)]
WAIT_S = 240
DRIVER = """
import dataclasses, os, sys, time
import ray
from pipelines.running import resources
from pipelines.stages import pretrain
from tests.pipelines.training.test_order import configuration, record_batch

folder, workers, record_path, hold, ray_folder = sys.argv[1:]
workers, hold = int(workers), int(hold)
os.environ.update(resources.ENVIRONMENT)
ray.init(
    address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False,
    object_store_memory=200_000_000, runtime_env={"env_vars": resources.ENVIRONMENT}, _temp_dir=ray_folder,
)
build = pretrain.build

def recorded(job, context):
    loop = build(job, context)
    batches = loop.inputs.batches
    def read(start):
        for batch in batches(start):
            record_batch(record_path, context.rank, batch)
            while batch.step == hold:
                time.sleep(1)
            yield batch
    loop.inputs = dataclasses.replace(loop.inputs, batches=read)
    return loop

pretrain.build = recorded
pretrain.run(configuration(folder, workers))
"""


def configuration(folder: str, workers: int) -> PretrainConfig:
    """Return the settings of every start."""
    changes: dict[str, Any] = {
        "manifest": f"{folder}/{MANIFEST}",
        "out": f"{folder}/out",
        "tracking.uri": "off",
        "probe_videos": 0,
        "clips.long_stride": 0.5,
        "scale.num_workers": workers,
        "loop.batch_size": BATCH,
        "loop.epochs": EPOCHS,
        "loop.checkpoint_every": CHECKPOINT_EVERY,
    }
    return override(PretrainConfig(), MODEL | TASK | changes)


def record_batch(path: str, rank: int, batch: Any) -> None:
    """Record what a worker is given before it trains on it."""
    with open(f"{path}_{rank}.jsonl", "a") as lines:
        lines.write(json.dumps([batch.step, rank, batch.epoch, batch.video_ids]) + "\n")


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """Return a folder whose name is short enough for Ray's sockets."""
    folder = tempfile.mkdtemp(prefix="s5ray")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make small videos and their manifest."""
    rows = []
    for index in range(VIDEOS):
        path = write_video(tmp_path / "videos" / f"v{index}.mp4", 24, fps=8)
        facts = probe(path)
        columns = ("duration_s", "fps", "num_frames", "width", "height", "decoder")
        row = {"video_id": f"v{index}", "uri": path, "split": "train", "start_s": 0.0, "end_s": facts.duration_s}
        rows.append(row | {name: getattr(facts, name) for name in columns})
    storage.write_table(str(tmp_path / MANIFEST), pa.Table.from_pylist(rows, SCHEMA))
    return tmp_path


def records(folder: Path, start: int) -> list[tuple[int, int, int, list[str]]]:
    """Return what the workers of a start were given: step, rank, epoch and videos, in order."""
    lines = [line for path in folder.glob(f"start{start}_*.jsonl") for line in path.read_text().splitlines()]
    return sorted(tuple(json.loads(line)) for line in lines)


def stored(folder: Path) -> int:
    """Return the step of the latest checkpoint on storage."""
    metas = (folder / "out" / CHECKPOINTS).glob("*/meta.json")
    return max((int(meta.parent.name.removeprefix("step_")) for meta in metas), default=0)


def train(folder: Path, start: int, ray_folder: str) -> None:
    """Train until the end, or until all workers hold at the step where driver and cluster are killed."""
    workers, hold = STARTS[start]
    arguments = [str(folder), str(workers), str(folder / f"start{start}"), str(hold), ray_folder]
    with (folder / f"start{start}.log").open("wb") as log:
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], cwd=ROOT, stdout=log, stderr=log)
    try:
        end = time.monotonic() + WAIT_S
        while driver.poll() is None and time.monotonic() < end:
            held = sum(step == hold for step, *_ in records(folder, start)) == max(workers, 1)
            # As soon as the checkpoint is stored: the next start resumes from it.
            if held and stored(folder) == hold // CHECKPOINT_EVERY * CHECKPOINT_EVERY:
                return
            time.sleep(0.2)
        assert driver.poll() == 0, (folder / f"start{start}.log").read_text()
    finally:
        cluster = descendants({driver.pid})
        driver.send_signal(signal.SIGKILL)
        kill(cluster, signal.SIGKILL)
        driver.wait()
        assert not wait_gone(cluster, [], seconds=30)


def planned(plan: ClipOrder) -> list[tuple[int, str]]:
    """Return epoch and video of the whole clip order."""
    rows = plan.rows(0, plan.total_steps)
    return [(int(epoch), f"v{video}") for epoch, video in zip(rows.epoch, rows.video, strict=True)]


def test_killed_runs_follow_the_clip_order_once(folder: Path, ray_folder: str) -> None:
    for start in range(len(STARTS)):
        train(folder, start, ray_folder)
    given = [records(folder, start) for start in range(len(STARTS))]
    resumed = [rows[0][0] for rows in given]
    counts = storage.read_json(str(folder / "out" / RESULT))["counts"]
    assert counts["steps"] == EPOCHS * STEPS_PER_EPOCH
    assert counts["resumed_at"] == resumed[-1]
    # In mid-epoch; the steps since the checkpoint are lost.
    assert resumed == [0, 3, 9]
    assert [rows[-1][0] for rows in given] == [5, 10, 15]

    # A checkpoint holds the steps before it: the next start repeats those after it.
    kept = [row for rows, end in zip(given, [*resumed[1:], 10**9], strict=True) for row in rows if row[0] < end]
    trained = [(epoch, video) for _, _, epoch, videos in kept for video in videos]
    assert trained == planned(order_of(configuration(str(folder), 1).loop, VIDEOS))
    assert len(set(trained)) == len(trained) == EPOCHS * STEPS_PER_EPOCH * BATCH
