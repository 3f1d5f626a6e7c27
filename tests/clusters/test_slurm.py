"""The Slurm script runs here as it is, apart from its stage: `srun` starts the nodes of the job on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.clusters.files import FILES, ROOT
from tests.clusters.local_cluster import descendants, free_port, kill, wait_gone

# Like Slurm's, it starts the command that follows its own options; more than one node on a machine need their own ports.
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


def start(folder: Path, stage: str) -> tuple[subprocess.Popen[str], Path]:
    """Start the script in a checkout of its own, with another stage in it, on two nodes of one CPU; return the log too."""
    checkout, tools = folder / "checkout", folder / "tools"
    for made in (checkout, tools):
        made.mkdir()
    for name in ("s5", "pipelines", ".venv"):
        (checkout / name).symlink_to(ROOT / name)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    script = folder / "slurm.sh"
    text, changed = re.subn(r"^stage=\(.*?\)$", f"stage=({stage})", FILES["slurm.sh"].read_text(), flags=re.M | re.S)
    assert changed == 1
    script.write_text(text)
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "COMMANDS": str(folder / "commands"),
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": str(port - 20000 + (10000 if port < 20000 else 0)),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURMD_NODENAME": "node1",
        "SLURM_CPUS_PER_TASK": "1",
    }
    log = folder / "log"
    with log.open("w") as file:
        return subprocess.Popen(
            ["bash", str(script)], env=environment, stdout=file, stderr=subprocess.STDOUT, text=True
        ), log


@pytest.mark.slow
@pytest.mark.cluster
def test_script_runs_a_stage_on_its_nodes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job, log = start(tmp_path, f"sample --videos 4 --seconds 10 --tracking.uri off --out {out}")
    nodes: set[int] = set()
    try:
        tokens: set[str] = set()
        while job.poll() is None:
            nodes |= descendants({job.pid})
            tokens |= {path.read_text() for path in (tmp_path / "checkout").glob(".ray-token-*")}
            time.sleep(0.2)
        assert job.returncode == 0, log.read_text()
        assert json.loads((out / "result.json").read_text())
    finally:
        kill({job.pid} | nodes, signal.SIGKILL)
    (token,) = {token.strip() for token in tokens} - {""}
    commands = (tmp_path / "commands").read_text()
    assert commands.count("ray start") == 2
    assert "--nodelist=node1" in commands
    assert "--exclude=node1" in commands
    assert token not in commands + log.read_text()
    assert not list((tmp_path / "checkout").glob(".ray-token-*"))
    assert wait_gone(nodes, [], seconds=20) == set()
