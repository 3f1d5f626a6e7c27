"""What is wrong with a cluster, in sentences that say what to fix: pure functions of what its nodes report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pipelines.running.node_checks import Asked, NodeReport

GIB = 2**30
CLOCK_S = 1.0
LEAST_FREE = 0.05
"""Share of a disk or of the memory below which Ray stores no more objects, or kills tasks."""
NAMED_NODES = 3
DECORD_MACHINES = ("x86_64", "AMD64")
"""decord has no wheels for others; PyAV reads everything there."""
PACKAGES = "install the packages of constraints.txt there, or give all nodes the same image"
FAILURES = {
    "system": ("cannot be asked", f"if a package is missing, {PACKAGES}; else start the node again"),
    "torch": ("cannot import torch", PACKAGES),
    "decord": ("cannot decode with decord", PACKAGES),
    "pyav": ("cannot decode with PyAV", PACKAGES),
    "video": ("cannot read --video", "give a sound video, and the credentials of its store by --env"),
    "mlflow": (
        "cannot reach MLflow",
        "stages, and trials of a sweep, log from any node: open the way, or correct it",
    ),
    "write": (
        "cannot write to --store",
        "give a place with room that all nodes may write to, and its credentials by --env",
    ),
    "read": ("cannot read from --store", "let all nodes read what others write there"),
    "clock": ("cannot say what time it is", "start the node again"),
}
"""What a node fails to do, and the remedy, by question."""


class Finding(NamedTuple):
    """Something about a cluster."""

    fix: bool
    """It has to be fixed; else it is worth knowing."""
    text: str
    """One sentence, with the remedy."""


def findings(reports: Sequence[NodeReport], asked: Asked, here: Mapping[str, str]) -> list[Finding]:
    """Return what is to be fixed, then what is worth knowing.

    Args:
        reports: of all nodes.
        asked: what they were to reach.
        here: versions on this machine.
    """
    answered = [each for each in reports if "system" not in each.errors]
    found = [
        *_failures(reports),
        *_not_shared(answered, asked.store),
        *_versions(answered, here),
        *_gpus(answered),
        *_clocks(answered),
        *_room(answered),
    ]
    return sorted(found, key=lambda finding: not finding.fix)


def names(reports: Sequence[NodeReport]) -> str:
    """Return the names of nodes, of many the first ones."""
    known = [each.name for each in reports[:NAMED_NODES]]
    if len(reports) > NAMED_NODES:
        known.append(f"{len(reports) - NAMED_NODES} more")
    return " and ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)


def _failures(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    by_reason: dict[tuple[str, str], list[NodeReport]] = {}
    for each in reports:
        for question, reason in each.errors.items():
            if question != "decord" or each.machine in DECORD_MACHINES:
                by_reason.setdefault((question, reason), []).append(each)
    for (question, reason), nodes in by_reason.items():
        what, remedy = FAILURES[question]
        yield Finding(True, f"{names(nodes)} {what} ({reason}): {remedy}")


def _not_shared(reports: Sequence[NodeReport], store: str) -> Iterator[Finding]:
    if blind := [each for each in reports if each.unseen]:
        yield Finding(
            True,
            f"--store {store!r} is not shared: what {blind[0].unseen} wrote is not there for {blind[0].name}, and so "
            f"for {len(blind)} of {len(reports)} nodes; give a URI, or a folder that all nodes mount",
        )


def _versions(reports: Sequence[NodeReport], here: Mapping[str, str]) -> Iterator[Finding]:
    packages = dict.fromkeys(name for versions in (here, *(each.versions for each in reports)) for name in versions)
    for package in packages:
        groups: dict[str, list[NodeReport]] = {}
        for each in reports:
            if package != "decord" or each.machine in DECORD_MACHINES:
                groups.setdefault(_public(each.versions.get(package, "missing")), []).append(each)
        if len(groups) > 1 or "missing" in groups:
            told = ", ".join(f"{version} on {names(nodes)}" for version, nodes in groups.items())
            yield Finding(True, f"{package} is {told}: {PACKAGES}")
        elif groups and (mine := _public(here.get(package, "missing"))) != (theirs := next(iter(groups))):
            yield _unlike_here(package, mine, theirs)


def _unlike_here(package: str, mine: str, theirs: str) -> Finding:
    """Return what it means that a package's version here is not that of the nodes."""
    told = f"{package} is {mine} here and {theirs} on the cluster"
    if package == "ray" or (package == "python" and mine.split(".")[:2] != theirs.split(".")[:2]):
        return Finding(True, f"{told}: install {theirs} here, or {mine} on all nodes")
    return Finding(False, f"{told}: settings are checked with the one and run with the other")


def _public(version: str) -> str:
    """Return a version without what says how it was built, such as `+cu128`."""
    return version.partition("+")[0]


def _gpus(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    for each in reports:
        counted, seen = each.resources.get("GPU", 0), each.torch_gpus
        if counted > seen and "torch" not in each.errors:
            why = f" ({each.torch_reason})" if each.torch_reason else ""
            remedy = "install a torch for CUDA and a driver that fits it, or start Ray with the number that is there"
            yield Finding(True, f"Ray counts {counted:g} GPUs on {each.name} and torch sees {seen}{why}: {remedy}")
        elif seen > counted:
            remedy = f"start Ray with --num-gpus={seen} for runs to use them"
            yield Finding(False, f"torch sees {seen} GPUs on {each.name} and Ray counts {counted:g}: {remedy}")


def _clocks(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    for each in reports:
        offset = each.clock_offset_s or 0.0
        if abs(offset) - each.clock_error_s > CLOCK_S:
            side = "ahead of" if offset > 0 else "behind"
            yield Finding(
                True,
                f"the clock of {each.name} is {abs(offset):.1f} s {side} that of the job's node (to within "
                f"{each.clock_error_s:.3f} s): run chrony or another NTP client on all nodes",
            )


def _room(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    remedies = {
        "disk": "Ray stores no more objects there: make room, or start Ray with another --temp-dir",
        "memory": "Ray ends tasks there: end what else runs on the node, or give it more",
    }
    for each in reports:
        for kind, remedy in remedies.items():
            free, total = each.free_bytes.get(kind, 0), each.total_bytes.get(kind, 0)
            if free < LEAST_FREE * total:
                what = f"disk of {each.temp_dir}" if kind == "disk" else kind
                yield Finding(
                    True, f"the {what} on {each.name} has {free / GIB:.1f} of {total / GIB:.1f} GiB left: {remedy}"
                )
        objects, shared = each.resources.get("object_store_memory", 0), each.total_bytes.get("shm", 0)
        if shared and shared < objects:
            yield Finding(
                True,
                f"/dev/shm on {each.name} holds {shared / GIB:.2f} GiB, less than Ray's object store "
                f"({objects / GIB:.2f} GiB), which is therefore on a disk: give the container more (docker run "
                "--shm-size, or an emptyDir of medium Memory)",
            )
