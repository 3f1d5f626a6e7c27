"""Workers, decoders, nodes and drivers are killed, stopped, preempted, or hang: the run still follows its clip order.

They run only with `make drills`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import storage
from s5.checkpoints import checkpoint
from tests.clusters.drill import ROOT, STEPS, WAIT_S, Drill, is_running
from tests.clusters.local_cluster import LocalCluster, client_environment, descendants, local_cluster

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.drill]

# Longer than the first batch takes on a busy machine.
HANG_S = 60


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """Run a cluster of one worker node."""
    with local_cluster(workers=1, worker_cpus=4) as running:
        yield running


@pytest.fixture
def nodes() -> Iterator[LocalCluster]:
    """Run a cluster of three worker nodes."""
    with local_cluster(workers=3, worker_cpus=2) as running:
        yield running


def started(folder: Path, cluster: LocalCluster, hold: tuple[int, ...], **changes: Any) -> Drill:
    """Start a run whose workers wait before the steps in `hold`."""
    drill = Drill(folder, cluster, {key.replace("__", "."): value for key, value in changes.items()})
    drill.write_inputs()
    for step in hold:
        drill.hold(step)
    drill.start()
    return drill


def line_with(drill: Drill, *parts: str) -> str:
    """Return the only line of the log that has all of these parts."""
    (line,) = [line for line in drill.log().splitlines() if all(part in line for part in parts)]
    return line


def test_lost_decoders_and_workers(cluster: LocalCluster, tmp_path: Path) -> None:
    drill = Drill(tmp_path, cluster, {"scale.num_workers": 2})
    drill.write_inputs()
    for name in ("decoding", 5, 8):
        drill.hold(name)
    drill.start()
    # A decoder's child, and a whole decode task, while they read.
    (_, child), (task, _) = drill.wait(lambda: drill.decoders()[:2] if len(drill.decoders()) > 1 else [], "decoders")
    os.kill(child, signal.SIGKILL)
    os.kill(task, signal.SIGKILL)
    drill.release("decoding")

    killed = drill.held(5, 2)[1]
    os.kill(killed.process, signal.SIGKILL)
    drill.release(5)

    # Preempted: it saves after the present step, although no checkpoint is due there.
    preempted = drill.held(8, 2)[1]
    drill.hold(9)
    drill.release(8)
    drill.held(9, 2)
    os.kill(preempted.process, signal.SIGTERM)
    drill.release(9)
    drill.finish()

    begun = drill.check_order()
    assert begun[:2] == [0, 3]
    assert begun[2] in (10, 11), "it stops after the step in which it receives the signal, or after the next"
    assert line_with(drill, f"process {killed.process})", "died", "from the checkpoint of step 3 (failure 1 of 3)")
    assert "failure" not in line_with(
        drill, f"process {preempted.process})", "preempted (its process received SIGTERM)"
    )
    result = storage.read_json(str(tmp_path / "out" / "result.json"))
    assert result["counts"]["steps"] == STEPS


@pytest.mark.parametrize("how", ["lost", "ended"])
def test_a_node_is_taken_away(nodes: LocalCluster, tmp_path: Path, how: str) -> None:
    # Each node has room for one worker: two of three work.
    drill = started(tmp_path, nodes, (5, 10), scale__num_workers=2, scale__cpus_per_worker=1.25)
    worker = drill.held(5, 2)[1]
    (node,) = [i for i, each in enumerate(nodes.nodes) if worker.process in descendants({each.pid})]
    if how == "lost":
        nodes.lose_node(node)
    else:
        nodes.nodes[node].send_signal(signal.SIGTERM)
    drill.release(5)
    drill.wait(lambda: len(drill.groups()) > 1, "no new workers start")
    drill.release(10)
    drill.finish()
    begun = drill.check_order()
    assert begun[0] == 0
    assert begun[1] >= 3
    assert "failure" not in line_with(drill, f"process {worker.process})", "resuming from")


def test_a_node_is_drained(nodes: LocalCluster, tmp_path: Path) -> None:
    drill = started(tmp_path, nodes, (6,), scale__num_workers=2, scale__cpus_per_worker=1.25)
    worker = drill.held(6, 2)[1]
    # As a cloud's preemption notice does; the run does not use up the two minutes.
    drain = ["ray", "drain-node", "--address", nodes.gcs_address, "--node-id", worker.node]
    drain += [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
        "120",
    ]
    subprocess.run(drain, env=client_environment(nodes), check=True, capture_output=True, timeout=WAIT_S)
    drill.wait(lambda: (tmp_path / "notice_1").exists(), "the worker gets no notice")
    drill.release(6)
    drill.finish()
    # Saved after the present step, although no checkpoint is due there.
    assert drill.check_order() == [0, 7]
    assert worker.node not in {row.node for row in drill.rows() if row.step > 6}
    assert "failure" not in line_with(drill, f"process {worker.process})", "preempted (its node is being drained)")


@pytest.mark.parametrize("how", ["native", "python", "stopped"])
def test_a_worker_hangs(cluster: LocalCluster, tmp_path: Path, how: str) -> None:
    drill = started(tmp_path, cluster, (5,), scale__num_workers=2, scale__hang_timeout_s=HANG_S)
    hanging = drill.held(5, 2)[1]
    if how == "stopped":
        os.kill(hanging.process, signal.SIGSTOP)
    else:
        (tmp_path / "control" / f"hang_5_1_{how}").touch()
    drill.release(5)
    drill.finish()
    assert drill.check_order() == [0, 3]
    assert not is_running(hanging.process)
    verb = "hangs in step 6: waiting for data" if how == "python" else "stopped responding in step"
    assert line_with(drill, f"process {hanging.process}) of 2 {verb}", "(failure 1 of 3)").startswith(
        "[pretrain] worker 1 ("
    )
    stacks = (tmp_path / "out" / "stacks.txt").read_text()
    if how != "stopped":
        assert "in hang" in stacks


def test_one_worker_that_is_stopped_is_replaced(cluster: LocalCluster, tmp_path: Path) -> None:
    drill = started(tmp_path, cluster, (5,), scale__hang_timeout_s=HANG_S)
    stopped = drill.held(5, 1)[0]
    os.kill(stopped.process, signal.SIGSTOP)
    drill.release(5)
    drill.finish()
    assert drill.check_order() == [0, 3]
    assert not is_running(stopped.process)
    assert line_with(drill, f"process {stopped.process}) of 1 stopped responding in step", "(failure 1 of 3)")


def test_the_driver_is_killed_and_the_same_command_resumes_with_other_workers(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    drill = started(tmp_path, cluster, (5,), scale__num_workers=2)
    orphans = drill.held(5, 2)
    drill.kill()
    # Its workers end without it, although they are in the middle of a step.
    drill.wait(lambda: not any(is_running(row.process) for row in orphans), "workers outlive it", driver_runs=False)
    saved = sorted(os.listdir(tmp_path / "out" / "checkpoints"))
    drill.release(5)
    drill.changes["scale.num_workers"] = 1
    drill.start()
    drill.finish()
    assert drill.check_order() == [0, 3]
    assert saved == ["step_00000003"]


def test_a_run_grows_once_there_is_room(tmp_path: Path) -> None:
    few = {"scale__num_workers": 2, "scale__min_workers": 1, "scale__resize_interval_s": 3.0}
    with local_cluster(workers=1, worker_cpus=1) as small:
        drill = started(tmp_path, small, (5, 8), scale__cpus_per_worker=0.75, **few)
        assert drill.held(5, 1)[0].world_size == 1
        small.add_node(1)
        small.wait_for(3)
        drill.wait(lambda: any(row.world_size == 2 for row in drill.rows()), "the run does not grow")
        drill.release(5)
        assert len(drill.held(8, 2)) == 2
        drill.release(8)
        drill.finish()
    assert drill.check_order() == [0, 3]
    sizes = {row.step: row.world_size for row in drill.rows()}
    assert [sizes[step] for step in range(STEPS)] == [1] * 3 + [2] * (STEPS - 3)
    assert line_with(drill, "2 workers instead of 1, resuming from the checkpoint of step 3")

    grown = losses(drill)
    with local_cluster(workers=1, worker_cpus=1) as small:
        (tmp_path / "one").mkdir()
        alone = started(tmp_path / "one", small, (), scale__cpus_per_worker=0.75)
        alone.finish()
    assert grown == pytest.approx(losses(alone), rel=2e-2)


def losses(drill: Drill) -> list[float]:
    """Return the loss of every step, as printed."""
    found = {}
    for line in drill.log().splitlines():
        if line.startswith("[pretrain] step ") and "loss" in line:
            found[int(line.split()[2].partition("/")[0])] = float(line.partition("loss ")[2].partition(",")[0])
    return [found[step] for step in range(1, STEPS + 1)]


def test_a_stopped_job_saves_within_rays_own_grace(cluster: LocalCluster, tmp_path: Path) -> None:
    endless = {"loop.epochs": 10000, "loop.checkpoint_every": 40000}
    drill = Drill(tmp_path, cluster, {"scale.num_workers": 2} | endless)
    drill.write_inputs()
    environment = client_environment(cluster)
    ray = ["ray", "job", "submit", "--address", cluster.address, "--submission-id", "drill", "--no-wait"]
    variables = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}})
    command = [*ray, "--runtime-env-json", variables, "--", *drill.command()]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=WAIT_S)
    drill.wait(lambda: any(row.step == 7 for row in drill.rows()), "the job does not train", driver_runs=False)
    stop = ["ray", "job", "stop", "--address", cluster.address, "drill"]
    subprocess.run(stop, env=environment, check=True, capture_output=True, timeout=WAIT_S)
    checkpoints = tmp_path / "out" / "checkpoints"
    saved = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    logs = ["ray", "job", "logs", "--address", cluster.address, "drill"]
    log = subprocess.run(logs, env=environment, capture_output=True, text=True, timeout=WAIT_S).stdout
    assert len(saved) == 1, log
    assert checkpoint.verify(checkpoints / saved[0]).step >= 8
