"""What every benchmark writes and prints: out/bench/NAME.json and a table of figures against their targets.

A file has `machine`, `versions`, `commit`, `date`, `rows` (figure, value, target, better, met) and `raw`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch

FOLDER = Path("out/bench")
PACKAGES = ("torch", "timm", "numpy", "ray", "decord", "av", "pyarrow", "mlflow")


@dataclass(frozen=True)
class Row:
    """A figure and its target; without a target it is only shown."""

    figure: str
    value: float | None
    """None where it was not measured."""
    target: float | None = None
    better: Literal["higher", "lower"] = "higher"

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none, or no value."""
        if self.target is None or self.value is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


def machine(device: torch.device) -> dict[str, Any]:
    """Return the hardware that the figures depend on."""
    names = {line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")}
    found: dict[str, Any] = {
        "cpu": ", ".join(sorted(names)) or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "load_before": round(os.getloadavg()[0], 2),
    }
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit of the working tree, with a plus where it has changes; empty outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "--short=12", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "s5", "pipelines") else ""
    )


def write(name: str, device: torch.device, rows: list[Row], raw: dict[str, Any]) -> None:
    """Write out/bench/NAME.json and print its rows."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [{**asdict(row), "met": row.met} for row in rows],
        "raw": raw,
    }
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    about = content["machine"]
    print(f"\n{about['device']}, {about['cpu']}, {about['threads']} threads, torch {versions()['torch']}, {commit()}\n")
    table(["figure", "value", "target", "met"], [_cells(row) for row in rows])
    print(f"\nwrote {path}")


def _cells(row: Row) -> list[str]:
    sign = ">=" if row.better == "higher" else "<="
    return [
        row.figure,
        "not measured" if row.value is None else f"{row.value:.3g}",
        "" if row.target is None else f"{sign} {row.target:g}",
        {True: "yes", False: "NO", None: ""}[row.met],
    ]


def table(header: list[str], lines: list[list[str]]) -> None:
    """Print a table in Markdown."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    for line in [header, ["-" * width for width in widths], *lines]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def alternate(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm: int = 1,
    before: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time all cases, alternating, once a round, and return the seconds of each; the first `warm` rounds do not count.

    `before` is called before each case and is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warm + rounds):
        for name, run in cases.items():
            if before is not None:
                before()
            _wait(device)
            start = perf_counter()
            run()
            _wait(device)
            if number >= warm:
                seconds[name].append(perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(slow: list[float], fast: list[float]) -> float:
    """Return the median over rounds of slow / fast."""
    return median(a / b for a, b in zip(slow, fast, strict=True))
