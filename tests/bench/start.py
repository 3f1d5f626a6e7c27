"""How long a user waits: for the answer to a mistake, for the first step, and from the last step to the prompt.

    make bench-start ARGS="--rounds 3 --against ../other-checkout"

Commands run as a user's do, on warm caches, with a tiny model and made videos. The parts of a training run are the
times between the lines that it prints. With `--against`, another checkout runs alternately, with the same Python.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from tests.bench.record import Row, table, write

ROOT = Path(__file__).parents[2]
MISTAKES = {
    "a stage": ["pretian"],
    "a preset": ["pretrain", "--preset", "quikstart"],
    "an option": ["pretrain", "--optim.lrr", "1"],
    "a value": ["pretrain", "--optim.lr", "fast"],
    "a manifest": ["pretrain", "--manifest", "nowhere"],
    "a checkpoint": ["finetune", "--manifest", "MANIFEST", "--checkpoint", "nowhere"],
    "--out": ["sample", "--out", "/proc/nowhere"],
}
ANSWER_S = 2.0
SETTINGS = {
    "preset": "quickstart",
    "scale.cpus-per-worker": "1",
    "clips.too-short": "shrink",
    "probe-videos": "0",
    "loop.steps": "6",
    "loop.batch-size": "4",
    "loop.log-every": "1",
    "model.backbone.depth": "1",
    "lsmcl.hidden": "32",
    "lsmcl.dim": "16",
}
TRAIN = ["pretrain", *(text for name, value in SETTINGS.items() for text in (f"--{name}", value))]
# Ray Train's worker, and the process of the command itself, which a checkout has to know.
IN_WORKER, IN_OWN_PROCESS = "1", "0"
# What a training run prints, in order, and the part that ends with it.
MARKS = (
    ("listed videos", "imports, checks, Ray, MLflow"),
    ("training", "to the trainer"),
    ("step 1/", "workers and first batch"),
    ("step 6/", "steps"),
    ("checkpoint: ", "last save, end of the workers"),
    ("", "MLflow, Ray, end of the process"),
)
START, END = ("imports, checks, Ray, MLflow", "to the trainer", "workers and first batch"), MARKS[-2:]


def environment(checkout: Path) -> dict[str, str]:
    """Return the environment in which a checkout's own code runs."""
    return os.environ | {"PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1"}


def answer_seconds(checkout: Path, arguments: list[str], folder: Path) -> float:
    """Return the seconds from pressing enter to the prompt; the command has to end with status 2, help with 0."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pipelines", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(checkout), capture_output=True)
    seconds = time.perf_counter() - began
    if done.returncode != (0 if "--help" in arguments else 2):
        raise RuntimeError(f"{arguments} ended with status {done.returncode}: {done.stderr.decode()[-500:]}")
    return seconds


def parts_of_training(checkout: Path, workers: str, manifest: Path, folder: Path) -> dict[str, float]:
    """Return the seconds of each part of one training run."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        files = ["--manifest", str(manifest), "--out", f"{out}/run"]
        command = [sys.executable, "-m", "pipelines", *TRAIN, "--scale.num-workers", workers, *files]
        before = time.perf_counter()
        parts: dict[str, float] = {}
        marks: Iterator[tuple[str, str]] = iter(MARKS)
        mark, part = next(marks)
        printed = []
        with subprocess.Popen(
            command, cwd=folder, env=environment(checkout), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                printed.append(line)
                if mark and mark in line:
                    now = time.perf_counter()
                    parts[part], before = now - before, now
                    mark, part = next(marks)
        parts[part] = time.perf_counter() - before
        if process.returncode or len(parts) < len(MARKS):
            raise RuntimeError(f"training ended with status {process.returncode}:\n{''.join(printed)}")
        return parts


def sample(folder: Path) -> Path:
    """Render videos and index them; return the manifest's folder."""
    for arguments in (
        ["sample", "--out", "videos", "--videos", "24", "--seconds", "20", "--classes", "order-only"],
        ["index", "--videos", "videos", "--out", "index"],
    ):
        command = [sys.executable, "-m", "pipelines", *arguments, "--tracking.uri", "off"]
        subprocess.run(command, cwd=folder, env=environment(ROOT), check=True, capture_output=True)
    return folder / "index"


def run(rounds: int, against: Path | None) -> None:
    """Measure, print and write out/bench/start.json."""
    checkouts = {"here": ROOT} | ({"there": against.resolve()} if against else {})
    runs = {"here": (ROOT, IN_WORKER), "here, own process": (ROOT, IN_OWN_PROCESS)}
    runs |= {name: (checkout, IN_WORKER) for name, checkout in checkouts.items()}
    answers: dict[str, dict[str, list[float]]] = {name: {} for name in checkouts}
    training: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory(prefix="bench-start-") as temporary:
        folder = Path(temporary)
        manifest = sample(folder)
        for number in range(rounds + 1):
            for name, checkout in checkouts.items():
                for what, arguments in (MISTAKES | {"--help": ["pretrain", "--help"]}).items():
                    given = [str(manifest) if argument == "MANIFEST" else argument for argument in arguments]
                    answers[name].setdefault(what, []).append(answer_seconds(checkout, given, folder))
            for name, (checkout, workers) in runs.items():
                training[name].append(parts_of_training(checkout, workers, manifest, folder))
                print(f"round {number} of {rounds}, {name}: {training[name][-1]}", flush=True)
    rows = report(answers, training)
    write("start", torch.device("cpu"), rows, {"answers": answers, "training": training})


def report(answers: dict[str, dict[str, list[float]]], training: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Print a table of all parts; return the figures. The first round warms the caches and does not count."""
    lines = [[what, *(f"{median(given[what][1:]):.2f}" for given in answers.values())] for what in answers["here"]]
    table(["seconds to an answer", *answers], lines)
    lines = [
        [part, *(f"{median(run[part] for run in each[1:]):.2f}" for each in training.values())] for _, part in MARKS
    ]
    table(["seconds of a run", *training], lines)
    slowest = max(median(answers["here"][what][1:]) for what in MISTAKES)
    rows = [Row("slowest answer to a mistake, s", slowest, ANSWER_S, "lower")]
    for label, parts in (("to the first step", START), ("from the last step to the prompt", [p for _, p in END])):
        totals = {name: [sum(run[part] for part in parts) for run in each[1:]] for name, each in training.items()}
        rows += [Row(f"pretrain {label}, {name}, s", median(seconds)) for name, seconds in totals.items()]
        there = totals.pop("there", [])
        for name, seconds in totals.items() if there else ():
            ratios = [one / other for one, other in zip(seconds, there, strict=True)]
            rows.append(Row(f"pretrain {label}, {name} / there", median(ratios), 0.5, "lower"))
    return rows


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds; one more warms the caches")
    parser.add_argument("--against", type=Path, help="another checkout to compare with")
    options = parser.parse_args()
    run(options.rounds, options.against)


if __name__ == "__main__":
    main()
