"""Memory and CPU time of a process (default: this one) and all its descendants, Ray's too, as Linux counts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def resident_bytes(root: int | None = None) -> int:
    """Return the memory of a process and its descendants; shared memory counts once."""
    total = 0
    for process in _process_tree(root):
        lines = _text(f"/proc/{process}/smaps_rollup").splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 1024 * total


def cpu_seconds(root: int | None = None) -> dict[int, float]:
    """Return the CPU time so far of a process and of each descendant."""
    stats = {process: _stat(process) for process in _process_tree(root)}
    tick = os.sysconf("SC_CLK_TCK")
    return {process: (int(stat[11]) + int(stat[12])) / tick for process, stat in stats.items() if stat}


def cpu_seconds_since(before: dict[int, float], root: int | None = None) -> float:
    """Return the CPU time since `before` of the processes that still run."""
    return sum(seconds - before.get(process, 0.0) for process, seconds in cpu_seconds(root).items())


def _process_tree(root: int | None) -> Iterator[int]:
    root = root or os.getpid()
    found = {int(folder.name): _stat(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")}
    parents = {process: int(stat[1]) for process, stat in found.items() if stat}
    for process in parents:
        ancestor = process
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root and root in parents:
            yield process


def _stat(process: int) -> list[str]:
    """Return the fields after the name, of which the second is the parent; none where the process has ended."""
    return _text(f"/proc/{process}/stat").rpartition(")")[2].split()


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
