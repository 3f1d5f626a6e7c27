"""The Slurm script runs here as it is, apart from its stage: `srun` starts the nodes of the job on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clusters.files import FILES, ROOT
from tests.clusters.local_cluster import MARK, descendants, kill, marked, wait_gone

JOB = str(os.getpid())
# Like Slurm's, it starts the command that follows its own options; nodes on one machine need ports of their own.
SRUN = """#!/usr/bin/env bash
echo "$@" >>"$COMMANDS"
while [[ $1 == --* ]]; do shift; done
ports() { for name; do echo "--$name=$(python -c '
import socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print(probe.getsockname()[1])')"; done; }
names=(dashboard-agent-listen-port metrics-export-port)
[[ " $* " == *" --head "* ]] && names+=(dashboard-port ray-client-server-port)
mapfile -t own < <(ports "${names[@]}")
exec "$@" "${own[@]}" --object-store-memory=200000000
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$COMMANDS"
"""


@contextmanager
def running(folder: Path, stage: str, nodes: int) -> Iterator[subprocess.Popen[str]]:
    """Run the script in a checkout of its own, with another stage, on nodes of one CPU; leave no process of it."""
    checkout, tools = folder / "checkout", folder / "tools"
    for made in (checkout, tools):
        made.mkdir()
    for name in ("s5", "pipelines", ".venv"):
        (checkout / name).symlink_to(ROOT / name)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    text, changed = re.subn(r"^stage=\(.*?\)$", f"stage=({stage})", FILES["slurm.sh"].read_text(), flags=re.M | re.S)
    assert changed == 1
    (folder / "slurm.sh").write_text(text)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "COMMANDS": str(folder / "commands"),
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURMD_NODENAME": "node1",
        "SLURM_CPUS_PER_TASK": "1",
        MARK: str(folder),
    }
    with (folder / "log").open("w") as log:
        job = subprocess.Popen(["bash", str(folder / "slurm.sh")], env=environment, stdout=log, stderr=log, text=True)
    try:
        yield job
        assert wait_gone(marked(str(folder)), [], seconds=20) == set()
    finally:
        kill(marked(str(folder)) | descendants({job.pid}), signal.SIGKILL)
        job.wait()
        shutil.rmtree(f"/tmp/ray-{JOB}", ignore_errors=True)


def wait_until(job: subprocess.Popen[str], holds: Callable[[], bool]) -> None:
    """Return once something holds or the script has ended."""
    while job.poll() is None and not holds():
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.cluster
def test_script_runs_a_stage_on_its_nodes(tmp_path: Path) -> None:
    out, tokens = tmp_path / "out", set[str]()

    def read_token() -> bool:
        tokens.update(path.read_text().strip() for path in (tmp_path / "checkout").glob(".ray-token-*"))
        return False

    with running(tmp_path, f"sample --videos 4 --seconds 10 --tracking.uri off --out {out}", nodes=2) as job:
        wait_until(job, read_token)
        log = (tmp_path / "log").read_text()
        assert job.returncode == 0, log
    assert json.loads((out / "result.json").read_text())
    commands = (tmp_path / "commands").read_text()
    assert re.search(r"ray start --head .*\n.*ray start --address=[\d.]+:\d+ ", commands)
    assert "--nodelist=node1" in commands
    assert "--exclude=node1" in commands
    (token,) = tokens - {""}
    assert token not in commands + log
    assert not list((tmp_path / "checkout").glob(".ray-token-*"))


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.cluster
def test_script_queues_again_what_its_time_ended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(tmp_path, f"sample --videos 2000 --seconds 10 --tracking.uri off --out {out}", nodes=1) as job:
        wait_until(job, lambda: any(out.rglob("*.mp4")))
        assert job.poll() is None, (tmp_path / "log").read_text()
        job.send_signal(signal.SIGTERM)
        wait_until(job, lambda: False)
        assert job.returncode == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    assert (tmp_path / "commands").read_text().splitlines()[-1] == f"scontrol requeue {JOB}"
    assert not list((tmp_path / "checkout").glob(".ray-token-*"))
