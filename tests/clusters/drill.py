"""A pretraining run on a cluster of several nodes to which things happen: its driver, its faults, its record.

Files in the folder `control` steer it, so that faults strike at a known point: workers wait before step K while there
is `hold_K`, decode tasks wait while there is `hold_decoding`, and `hang_K_R_HOW` makes the worker of rank R hang once
before step K. Every batch that a worker trains on is recorded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.config import PretrainConfig, override
from pipelines.data.clip_order import ClipOrder, order_of
from pipelines.data.manifest import MANIFEST, SCHEMA
from s5.video.reading import probe
from tests.clusters.local_cluster import LocalCluster, client_environment
from tests.s5.videos import write_video
from tests.tiny import HEADS, TINY

ROOT = Path(__file__).parents[2]
VIDEOS, BATCH, EPOCHS, CHECKPOINT_EVERY = 17, 4, 4, 3
STEPS = VIDEOS // BATCH * EPOCHS
WAIT_S = 600
SETTINGS: dict[str, Any] = {
    **TINY,
    **HEADS,
    "scale.num_workers": 1,
    "tracking.uri": "off",
    "probe_videos": 0,
    "clips.long_stride": 0.5,
    "clips.short_stride": 0.25,
    "loop.evaluate_every": 0,
    "loop.batch_size": BATCH,
    "loop.epochs": EPOCHS,
    "loop.checkpoint_every": CHECKPOINT_EVERY,
    "data.clips_per_task": 1,
    "data.cpus_per_decode": 0.25,
}
DRIVER = """
import ctypes, dataclasses, glob, json, os, sys, time
import pipelines.command_line
from pipelines.stages import pretrain
from pipelines.config import PretrainConfig, override

folder, settings = sys.argv[1], json.loads(sys.argv[2])
build = pretrain.build

def recorded(job, context):
    import ray
    from pipelines.data import clip_batches
    from pipelines.data.decoding import decode_tasks
    from ray.train.v2._internal.execution.context import get_train_context
    from pipelines.training.heartbeat import WORKER_PROCESS

    control, decode_chunk = f"{folder}/control", decode_tasks.decode_chunk

    def slow_chunk(rows, spec):
        child = decode_tasks._process._connected() and decode_tasks._process._child.pid
        while os.path.exists(f"{control}/hold_decoding"):
            with open(f"{folder}/decoding_{os.getpid()}_{child}", "w"):
                time.sleep(0.1)
        return decode_chunk(rows, spec)

    clip_batches.decode_chunk = slow_chunk
    loop = build(job, context)
    batches = loop.inputs.batches

    def read(start):
        for batch in batches(start):
            with open(f"{folder}/record_{os.getpid()}.jsonl", "a") as lines:
                row = [batch.step, context.rank, context.world_size, batch.epoch, batch.video_ids]
                row += [WORKER_PROCESS.group, os.getpid(), ray.get_runtime_context().get_node_id()]
                lines.write(json.dumps(row) + "\\n")
            while os.path.exists(f"{control}/hold_{batch.step}"):
                if get_train_context().preemption_context.preemption_info is not None:
                    open(f"{folder}/notice_{context.rank}", "w").close()
                time.sleep(0.1)
            for name in glob.glob(f"{control}/hang_{batch.step}_{context.rank}_*"):
                os.remove(name)
                hang(name.rpartition("_")[2])
            yield batch

    loop.inputs = dataclasses.replace(loop.inputs, batches=read)
    return loop

def hang(how):
    if how == "native":
        # Unlike CDLL, it keeps Python's lock.
        ctypes.PyDLL(None).sleep(1000)
    time.sleep(1000)

if __name__ == "__main__":
    pretrain.build = recorded
    sys.exit(pipelines.command_line.main(["pretrain", *settings]))
"""


@dataclass(frozen=True)
class Row:
    """The batch of one worker for one step."""

    step: int
    rank: int
    world_size: int
    epoch: int
    videos: list[str]
    group: str
    process: int
    node: str


@dataclass
class Drill:
    """A run, which may be started several times."""

    folder: Path
    cluster: LocalCluster
    changes: dict[str, Any]
    drivers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def config(self) -> PretrainConfig:
        """The settings."""
        places = {"manifest": str(self.folder / MANIFEST), "out": str(self.folder / "out")}
        return override(PretrainConfig(), SETTINGS | places | self.changes)

    def write_inputs(self) -> None:
        """Write small videos, their manifest, and the driver."""
        rows = []
        for index in range(VIDEOS):
            path = write_video(self.folder / "videos" / f"v{index}.mp4", 24, fps=8)
            facts = probe(path)
            columns = ("duration_s", "fps", "num_frames", "width", "height", "decoder")
            row = {"video_id": f"v{index}", "uri": path, "split": "train", "start_s": 0.0, "end_s": facts.duration_s}
            rows.append(row | {name: getattr(facts, name) for name in columns})
        storage.write_table(str(self.folder / MANIFEST), pa.Table.from_pylist(rows, SCHEMA))
        (self.folder / "control").mkdir()
        (self.folder / "driver.py").write_text(DRIVER)

    def command(self) -> list[str]:
        """Return the command of the driver."""
        places = {"manifest": str(self.folder / MANIFEST), "out": str(self.folder / "out")}
        options = [f"--{key}={value}" for key, value in (SETTINGS | places | self.changes).items()]
        return [sys.executable, str(self.folder / "driver.py"), str(self.folder), json.dumps(options)]

    def start(self) -> None:
        """Start the driver."""
        environment = client_environment(self.cluster) | {
            "RAY_ADDRESS": self.cluster.gcs_address,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / "log.txt").open("ab") as log:
            self.drivers.append(
                subprocess.Popen(self.command(), cwd=ROOT, env=environment, stdout=log, stderr=log, process_group=0)
            )

    def kill(self) -> None:
        """Kill the drivers that still run."""
        for driver in self.drivers:
            driver.kill()
            driver.wait()

    def finish(self) -> None:
        """Wait for the driver to end; it must succeed."""
        self.wait(lambda: self.drivers[-1].poll() is not None, "the run does not end", driver_runs=False)
        assert self.drivers[-1].returncode == 0, self.log()

    def log(self) -> str:
        """Return what the drivers printed."""
        return (self.folder / "log.txt").read_text()

    def wait(self, condition: Callable[[], Any], what: str, driver_runs: bool = True) -> Any:
        """Return the condition's value once it is true.

        Raises:
            AssertionError: it is still false after `WAIT_S` seconds, or once the driver has ended, if `driver_runs`.
        """
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            if found := condition():
                return found
            if driver_runs and self.drivers[-1].poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"{what}: {self.log()}")

    def hold(self, name: int | str) -> None:
        """Make workers wait before a step, or decode tasks for the name `decoding`."""
        (self.folder / "control" / f"hold_{name}").touch()

    def release(self, name: int | str) -> None:
        """Let them continue."""
        (self.folder / "control" / f"hold_{name}").unlink()

    def held(self, step: int, workers: int) -> list[Row]:
        """Return the rows of the workers that wait before a step, by rank, once there are so many."""

        def found() -> list[Row]:
            rows = [row for row in self.rows() if row.step == step and is_running(row.process)]
            return sorted(rows, key=lambda row: row.rank) if len(rows) == workers else []

        rows: list[Row] = self.wait(found, f"{workers} workers do not reach step {step}")
        return rows

    def decoders(self) -> list[tuple[int, int]]:
        """Return the processes of the waiting decode tasks, each with its child."""
        names = [path.name.split("_") for path in sorted(self.folder.glob("decoding_*"))]
        return [(int(task), int(child)) for _, task, child in names]

    def groups(self) -> set[str]:
        """Return the groups of workers that were given a batch."""
        return {row.group for row in self.rows()}

    def rows(self) -> list[Row]:
        """Return all recorded batches, by worker process in the order of their last rows."""
        files = sorted(self.folder.glob("record_*.jsonl"), key=lambda path: path.stat().st_ctime)
        return [Row(*json.loads(line)) for path in files for line in path.read_text().splitlines() if line[-1] == "]"]

    def check_order(self) -> list[int]:
        """Check that training followed the clip order, each clip once; return the step at which each group began."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows():
            groups.setdefault(row.group, []).append(row)
        starts = [min(row.step for row in rows) for rows in groups.values()]
        assert starts == sorted(starts), starts
        trained: list[tuple[int, int, int, str]] = []
        # A checkpoint holds the steps before it: the next group repeats those after it.
        for rows, end in zip(groups.values(), [*starts[1:], STEPS], strict=True):
            counted = sorted((row for row in rows if row.step < end), key=lambda row: (row.step, row.rank))
            trained += [(row.step, row.rank, row.epoch, video) for row in counted for video in row.videos]
        plan = order_of(self.config.loop, VIDEOS)
        assert [(step, epoch, video) for step, _, epoch, video in trained] == planned(plan)
        return starts


def planned(plan: ClipOrder) -> list[tuple[int, int, str]]:
    """Return step, epoch and video of the whole clip order."""
    rows = plan.rows(0, plan.total_steps)
    columns = zip(rows.step, rows.epoch, rows.video, strict=True)
    return [(int(step), int(epoch), f"v{video}") for step, epoch, video in columns]


def is_running(process: int) -> bool:
    """Return whether a process exists and is no zombie; a stopped one counts as running."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
