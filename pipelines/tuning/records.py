"""What became of each trial: a small file beside its folder, from which a later start of the sweep goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipelines import storage
from pipelines.config import SweepConfig
from pipelines.errors import UserError, last_line
from pipelines.running.run_folder import TRIALS
from pipelines.tuning.search_space import Dimension, holds
from pipelines.tuning.trials import TrialSettings, trial_of

Status = Literal["running", "finished", "stopped", "failed", "out of memory"]
ENDED = ("finished", "stopped")
"""How a trial ends that is not run again."""
READERS = 16
MEMORY_MARKS = (
    *("out of memory", "outofmemory", "can't allocate memory", "not enough memory", "memoryerror"),
    "node running low on memory",
)
"""What torch, NumPy, Python, and Ray, which ends processes before the memory is full, write where it is short."""


@dataclass(frozen=True)
class Record:
    """A trial as its file holds it."""

    setting: str
    seed: int
    values: dict[str, Any]
    status: Status = "running"
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    """Of its stages, a pretraining that it shares with other trials included; of a stage that was resumed, that of all
    starts, but for what was lost after a checkpoint."""
    failure: str = ""
    checkpoint: str = ""
    """Of its last stage."""
    run_id: str = ""
    """Its run in MLflow."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of what it reads, by the path."""
    epoch: int = 0
    """Of a member of a population: the epoch after which it ends."""
    start: str = ""
    """Of one that goes on: folder of the trial whose weights it begins with."""


def path_of(trial: TrialSettings) -> str:
    """Return the file of a trial's record."""
    return f"{trial.out}.json"


def started(trial: TrialSettings, inputs: Mapping[str, str]) -> Record:
    """Return the record of a trial that starts."""
    about = (trial.setting, trial.seed, trial.values)
    return Record(*about, inputs=dict(inputs), epoch=trial.epoch, start=trial.start)


def write(trial: TrialSettings, record: Record) -> Record:
    """Write a trial's record, and return it."""
    storage.write_json(path_of(trial), asdict(record))
    return record


def read(path: str) -> Record:
    """Read a record; a list among its values is a tuple again."""
    found = Record(**storage.read_json(path))
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in found.values.items()}
    return replace(found, values=values)


def is_short_of_memory(text: str) -> bool:
    """Return whether an error says that memory is short."""
    return any(mark in text.lower() for mark in MEMORY_MARKS)


def failed(record: Record, text: str) -> Record:
    """Return the record of a trial that failed, which tells a lack of memory from other reasons.

    Args:
        record: the trial's.
        text: of the error; its last line says what went wrong, but where memory is short the one that says so.
    """
    if not is_short_of_memory(text):
        return replace(record, status="failed", failure=last_line(text))
    line = next(line.strip() for line in text.splitlines() if is_short_of_memory(line))
    remedy = "lower loop.batch_size or loop.micro_batch, or give loop.recompute"
    return replace(record, status="out of memory", failure=f"out of memory: {line}; {remedy}")


def earlier(config: SweepConfig, dimensions: Mapping[str, Dimension]) -> Iterator[tuple[TrialSettings, Record]]:
    """Yield the trials below --out that belong to this sweep: those of its space, its seeds and its epochs."""
    below = storage.files_below(storage.join(storage.absolute(config.out), TRIALS))
    paths = [path for path in below if path.endswith(".json")]
    with ThreadPoolExecutor(READERS) as pool:
        records = list(pool.map(read, paths))
    for path, record in zip(paths, records, strict=True):
        if record.values.keys() != dimensions.keys():
            continue
        if all(holds(dimensions[key], value) for key, value in record.values.items()):
            trial = trial_of(config, record.values, record.seed)
            if path_of(trial) == path:
                yield trial, record


def check_inputs(config: SweepConfig, record: Record, inputs: Mapping[str, str]) -> None:
    """Check that a trial has read what the sweep reads.

    Raises:
        UserError: a manifest or another input has changed since.
    """
    for what, digest in inputs.items():
        if record.inputs.get(what, digest) != digest:
            raise UserError(
                f"--out {config.out!r} holds trials on another {what}, which has changed since: give another --out"
            )
