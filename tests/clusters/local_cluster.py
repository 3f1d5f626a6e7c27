"""A real cluster of several nodes on this machine, for tests and drills: `ray start` for a head and for each worker.

Nodes run in folders, sessions and on ports of their own, behind a token of their own: other clusters on the machine
and the user's own token are neither needed nor touched.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

MARK = "S5_LOCAL_CLUSTER"
OBJECT_STORE_BYTES = 200_000_000
PR_SET_PDEATHSIG = 1
START_SECONDS = 300
STOP_SECONDS = 20
DRAIN_SECONDS = 60


@dataclass
class LocalCluster:
    """A running cluster; `address` is the job server's, `environment` what a client needs besides it.

    `python` is in the PATH of no node, as on a head that was started as `VENV/bin/ray start`.
    """

    folder: Path
    address: str
    gcs_address: str
    environment: dict[str, str]
    mark: str
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of the nodes, such as credentials."""
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add_node(self, cpus: float = 1) -> subprocess.Popen[bytes]:
        """Start a worker node; `wait_for` returns once it has joined."""
        return self._start([f"--address={self.gcs_address}"], cpus)

    def lose_node(self, index: int) -> None:
        """Kill all processes of a node at once, as a machine that fails does; the head is number 0."""
        node = self.nodes.pop(index)
        kill({node.pid} | descendants({node.pid}), signal.SIGKILL)
        node.wait(STOP_SECONDS)

    def drain_node(self, index: int) -> None:
        """Send a node SIGTERM, as a preemption notice does (it drains for 30 seconds); the head is number 0."""
        node = self.nodes.pop(index)
        node.send_signal(signal.SIGTERM)
        node.wait(DRAIN_SECONDS)

    def alive(self) -> int:
        """Return how many nodes are alive."""
        rows = self.get("/api/v0/nodes")["data"]["result"]["result"]
        return sum(row["state"] == "ALIVE" for row in rows)

    def wait_for(self, nodes: int) -> None:
        """Return once that many nodes are alive.

        Raises:
            TimeoutError: they are not within `START_SECONDS`.
        """
        end, last = time.monotonic() + START_SECONDS, "no answer"
        while time.monotonic() < end:
            try:
                last = f"{self.alive()} nodes"
                if last == f"{nodes} nodes":
                    return
            except (OSError, ValueError, KeyError, TypeError) as error:
                last = repr(error)
            time.sleep(0.5)
        raise TimeoutError(f"{nodes} nodes did not come up ({last}); logs are below {self.folder}")

    def get(self, path: str) -> dict[str, dict[str, dict[str, list[dict[str, str]]]]]:
        """Return the dashboard's answer to a GET request, which is JSON."""
        return dict(json.loads(self.read(path)))

    def read(self, path: str) -> bytes:
        """Return the dashboard's answer to a GET request."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())

    def leftovers(self) -> set[int]:
        """Return the processes of this cluster that still run."""
        running = {node.pid for node in self.nodes if node.poll() is None}
        return marked(self.mark) | running | descendants(running)

    def stop(self) -> None:
        """End every process of this cluster and no other; raise `RuntimeError` if one is left."""
        # With SIGKILL: on SIGTERM, a node first waits for its work, up to 30 seconds.
        left = self.leftovers()
        for _ in range(STOP_SECONDS):
            kill(left, signal.SIGKILL)
            left = wait_gone(left, self.nodes, seconds=1) | marked(self.mark)
            if not left:
                self.nodes.clear()
                return
        raise RuntimeError(f"processes of the cluster are left: {sorted(left)}")

    def _start(self, arguments: list[str], cpus: float) -> subprocess.Popen[bytes]:
        place = self.folder / f"n{len(list(self.folder.glob('n*')))}"
        (place / "cwd").mkdir(parents=True)
        ports = [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "metrics-export-port")]
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1"),
            *arguments,
            *(f"--num-cpus={cpus:g}", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"),
            *(f"--temp-dir={place}", *ports),
        ]
        with (place / "start.log").open("wb") as log:
            node = subprocess.Popen(
                command,
                cwd=place / "cwd",
                env=_clean(os.environ) | self.environment | self.variables | {MARK: self.mark, "PATH": os.defpath},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self.nodes.append(node)
        return node


@contextmanager
def local_cluster(
    workers: int = 2, worker_cpus: float = 1, head_cpus: float = 0, **variables: str
) -> Iterator[LocalCluster]:
    """Run a head and worker nodes: all are alive when the body starts, and none is left after it.

    Args:
        workers: nodes beside the head.
        worker_cpus: CPUs of each of them.
        head_cpus: CPUs of the head.
        variables: environment variables of all nodes.
    """
    # Ray's sockets lie below the folder and their names may have 107 characters: pytest's folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="s5ray"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    gcs, dashboard = free_port(), free_port()
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    addresses = (f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}")
    cluster = LocalCluster(folder, *addresses, environment, folder.name, variables)
    try:
        cluster._start(
            ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"],
            head_cpus,
        )
        cluster.wait_for(1)
        for _ in range(workers):
            cluster.add_node(worker_cpus)
        cluster.wait_for(workers + 1)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def client_environment(cluster: LocalCluster) -> dict[str, str]:
    """Return a complete environment for a client of the cluster, without addresses and tokens of other clusters."""
    return _clean(os.environ) | cluster.environment


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _clean(environ: os._Environ[str]) -> dict[str, str]:
    """Return an environment without Ray's addresses and tokens, in which `python` is this one."""
    drop = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "PYTHONPATH", MARK)
    kept = {key: value for key, value in environ.items() if key not in drop}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return kept | {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


def _end_with_parent() -> None:
    """Have Linux send this process SIGTERM when its parent ends, for whatever reason."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def marked(mark: str) -> set[int]:
    """Return the processes that inherited a cluster's mark in their environment."""
    wanted, found = f"{MARK}={mark}".encode(), set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0") and _state(int(entry.name)) != "Z":
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def descendants(roots: set[int]) -> set[int]:
    """Return all descendants of processes; some of them lose the mark, since they write their title over it."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: set[int] = set()
    while True:
        more = {pid for pid, parent in parents.items() if parent in roots | found} - found
        if not more:
            return found
        found |= more


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def kill(pids: set[int], number: signal.Signals) -> None:
    """Send a signal to processes; those that have ended are skipped."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def wait_gone(pids: set[int], nodes: list[subprocess.Popen[bytes]], seconds: float) -> set[int]:
    """Wait until processes have ended (zombies count as ended); return those that have not."""
    end = time.monotonic() + seconds
    while True:
        for node in nodes:
            node.poll()
        left = {pid for pid in pids if _state(pid) not in ("", "Z")}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)
