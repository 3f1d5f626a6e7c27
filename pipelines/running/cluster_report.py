"""Ask every node of a cluster what a run needs of it: the job that `clusters.doctor` submits.

`python -m pipelines.running.cluster_report` reads ASKED and CLIP from its folder, and prints one line: MARK and the
nodes' reports as JSON. Nodes are asked by tasks that hold no CPUs, so that a busy cluster answers too.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import storage
from pipelines.errors import last_line
from pipelines.running import node_checks
from pipelines.running.node_checks import ASKED, CLIP, MARK, Asked, NodeReport
from pipelines.running.resources import ensure_ray

ROUND_S = 180.0
"""Seconds that all nodes have for one question."""
CLOCK_ROUNDS = 5


class Cluster:
    """The nodes of the cluster that this process has joined, by name."""

    def __init__(self) -> None:
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        addresses = [node["NodeManagerAddress"] for node in alive]
        self._ids: dict[str, str] = {}
        self.reports: dict[str, NodeReport] = {}
        for node, address in zip(alive, addresses, strict=True):
            name = address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:6]})"
            self._ids[name] = node["NodeID"]
            self.reports[name] = NodeReport(name=name, resources=dict(node["Resources"]))

    def ask(
        self, question: str, function: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]]
    ) -> dict[str, Any]:
        """Run a function on nodes at once; return the answers by name, and record in their reports why others failed.

        Args:
            question: what it is recorded under.
            function: a task.
            arguments: those for each node, by name.
        """
        calls = {name: self._call(function, name, given) for name, given in arguments.items()}
        ready, _ = ray.wait([*calls.values()], num_returns=len(calls), timeout=ROUND_S) if calls else ([], [])
        answers: dict[str, Any] = {}
        for name, call in calls.items():
            try:
                if call in ready:
                    answers[name] = ray.get(call)
                else:
                    ray.cancel(call, force=True)
                    self.reports[name].errors.setdefault(question, f"no answer within {ROUND_S:.0f} s")
            except ray.exceptions.RayError as error:
                self.reports[name].errors.setdefault(question, reason(error))
        return answers

    def ask_clock(self, name: str) -> None:
        """Record how far a node's clock is from this one's, by the fastest of several round trips."""
        report = self.reports[name]
        for _ in range(CLOCK_ROUNDS):
            began = time.time()
            theirs = self.ask("clock", node_checks.clock, {name: ()})
            ended = time.time()
            half = (ended - began) / 2
            if name in theirs and (report.clock_offset_s is None or half < report.clock_error_s):
                report.clock_offset_s, report.clock_error_s = theirs[name] - (began + half), half

    def _call(self, function: Callable[..., Any], name: str, given: tuple[Any, ...]) -> Any:
        place = NodeAffinitySchedulingStrategy(self._ids[name], soft=False)
        return ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(*given)


def report(asked: Asked, clip: bytes) -> list[NodeReport]:
    """Ask all nodes of the cluster that this process has joined.

    Args:
        asked: what they are to reach.
        clip: what `node_checks.make_clip` returned.
    """
    cluster = Cluster()
    for name, found in cluster.ask("system", node_checks.system, dict.fromkeys(cluster.reports, ())).items():
        vars(cluster.reports[name]).update(found)
    # A node that has not answered would hold up each of the rounds.
    nodes = [name for name, each in cluster.reports.items() if "system" not in each.errors]
    for name, (gpus, why) in cluster.ask("torch", node_checks.gpus_of_torch, dict.fromkeys(nodes, ())).items():
        cluster.reports[name].torch_gpus, cluster.reports[name].torch_reason = gpus, why
    for decoder in ("decord", "pyav"):
        cluster.ask(decoder, node_checks.decode, dict.fromkeys(nodes, (decoder, clip)))
    if asked.video:
        cluster.ask("video", node_checks.read_video, dict.fromkeys(nodes, (asked.video,)))
    if asked.tracking_uri:
        cluster.ask("mlflow", node_checks.ask_mlflow, dict.fromkeys(nodes, (asked.tracking_uri,)))
    if asked.store:
        use_store(cluster, nodes, asked.store)
    for name in nodes:
        cluster.ask_clock(name)
    return [*cluster.reports.values()]


def use_store(cluster: Cluster, nodes: Sequence[str], store: str) -> None:
    """Have every node write a file to the store, and read that of another node; the files are deleted."""
    run = uuid.uuid4().hex[:8]
    paths = {name: storage.join(store, f".doctor-{run}-{place}") for place, name in enumerate(nodes)}
    try:
        written = cluster.ask("write", node_checks.write_file, {name: (path,) for name, path in paths.items()})
        for name, (seconds, _) in written.items():
            cluster.reports[name].write_mb_s = node_checks.STORE_BYTES / 1e6 / seconds
        writers = read_from([*paths], [*written])
        read = cluster.ask("read", node_checks.read_file, {name: (paths[source],) for name, source in writers.items()})
        for name, found in read.items():
            each, writer = cluster.reports[name], writers[name]
            if found is None:
                each.unseen = writer
            elif found[1] != written[writer][1]:
                each.errors["read"] = f"it reads other bytes than {writer} wrote"
            else:
                each.read_mb_s = node_checks.STORE_BYTES / 1e6 / found[0]
    finally:
        cluster.ask("write", node_checks.remove_file, {name: (path,) for name, path in paths.items()})


def read_from(readers: Sequence[str], writers: Sequence[str]) -> dict[str, str]:
    """Return whose file each node reads: that of another node where there is one; none where nobody has written."""
    pairs = {}
    for place, reader in enumerate(readers):
        others = [name for name in writers if name != reader] or writers
        if others:
            pairs[reader] = others[place % len(others)]
    return pairs


def reason(error: Exception) -> str:
    """Return the cause of a failed task in one line, without the name of its class."""
    return re.sub(r"^[\w.]+(Error|Exception|Exit): ", "", last_line(str(error)))[: node_checks.REASON_CHARACTERS]


def main() -> None:
    """Run the job."""
    ensure_ray()
    asked = Asked(**json.loads(Path(ASKED).read_text()))
    rows = [asdict(each) for each in report(asked, Path(CLIP).read_bytes())]
    print(MARK + json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
