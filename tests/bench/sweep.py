"""What a trial costs beside its training: the seconds of a sweep of small trials, and of each of them.

    make bench-sweep ARGS="--rounds 2 --against ../other-checkout"

The command runs as a user's does, on warm caches, with a tiny model, made videos and one trial at a time. With
`--against`, another checkout runs alternately, with the same Python.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.bench.record import Row, ratio, table, write
from tests.bench.start import ROOT, environment, sample

STEPS, TRIALS = 4, 4
SWEEP = {
    "preset": "quickstart",
    "stages": "pretrain",
    "metric": "train/loss",
    "concurrent-trials": "1",
    "pretrain.scale.num-workers": "1",
    "pretrain.scale.cpus-per-worker": "1",
    "pretrain.clips.too-short": "shrink",
    "pretrain.probe-videos": "0",
    "pretrain.loop.steps": str(STEPS),
    "pretrain.loop.batch-size": "4",
    "pretrain.loop.log-every": "1",
    "pretrain.loop.evaluate-every": "0",
    "pretrain.model.backbone.depth": "1",
    "pretrain.lsmcl.hidden": "32",
    "pretrain.lsmcl.dim": "16",
}
SPACE = f"lsmcl.mask_ratio={','.join(f'0.{5 + number}' for number in range(TRIALS))}"
TARGET = 3.0


def seconds_of_a_sweep(checkout: Path, manifest: Path, folder: Path) -> dict[str, float]:
    """Return the seconds of a sweep: in all, to the start of its first trial, and of a trial once one has run."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        settings = [text for name, value in SWEEP.items() for text in (f"--{name}", value)]
        command = [sys.executable, "-m", "pipelines", "sweep", *settings, "--space", SPACE]
        command += ["--pretrain.manifest", str(manifest), "--out", f"{out}/sweep"]
        began = time.perf_counter()
        marks: list[float] = []
        printed = []
        with subprocess.Popen(
            command, cwd=folder, env=environment(checkout), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                printed.append(line)
                if re.search(r"trial \S+ (starts|done)", line):
                    marks.append(time.perf_counter() - began)
        if process.returncode or len(marks) != 2 * TRIALS:
            raise RuntimeError(f"the sweep ended with status {process.returncode}:\n{''.join(printed)}")
        ends = marks[1::2]
        return {
            "the whole sweep": time.perf_counter() - began,
            "to the start of the first trial": marks[0],
            "the first trial": ends[0] - marks[0],
            "each further trial": (ends[-1] - ends[0]) / (TRIALS - 1),
        }


def run(rounds: int, against: Path | None) -> None:
    """Measure, print and write out/bench/sweep.json."""
    checkouts = {"here": ROOT} | ({"there": against.resolve()} if against else {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as temporary:
        folder = Path(temporary)
        manifest = sample(folder)
        for number in range(rounds):
            for name, checkout in checkouts.items():
                found[name].append(seconds_of_a_sweep(checkout, manifest, folder))
                print(f"round {number + 1} of {rounds}, {name}: {found[name][-1]}", flush=True)
    parts = list(found["here"][0])
    table(
        [f"seconds ({TRIALS} trials of {STEPS} steps)", *found],
        [[part, *(f"{median(each[part] for each in found[name]):.1f}" for name in found)] for part in parts],
    )
    further: dict[str, Any] = {name: [each["each further trial"] for each in found[name]] for name in found}
    rows = [Row("small trials an hour, once one has run", 3600 / median(further["here"]))]
    if "there" in found:
        rows.append(Row("the same, here / there", ratio(further["there"], further["here"]), TARGET))
    write("sweep", torch.device("cpu"), rows, {"sweeps": found})


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--against", type=Path, help="another checkout to compare with")
    options = parser.parse_args()
    run(options.rounds, options.against)


if __name__ == "__main__":
    main()
