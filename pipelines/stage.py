"""What all stages share: the checks of --out, run.json, the tracked run, progress lines and result.json."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipelines import provenance, storage, tracking
from pipelines.config import StageConfig, UserError, flatten
from s5.batch import Failure

RESULT = "result.json"
RUN = "run.json"
REJECTS = "rejects.parquet"
REJECTS_SCHEMA = pa.schema([("video_id", pa.string()), ("uri", pa.string()), ("reason", pa.string())])
SHOWN_REJECTS = 5
# These say where and how fast a stage runs, not what it computes: they may change when it resumes.
FREE_SETTINGS = ("scale.", "tracking.", "data.", "loop.keep_checkpoints", "loop.log_every", "concurrent_trials")


class StageError(Exception):
    """A stage that could not be finished for a reason that one sentence tells; `code` is the exit status."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class StoppedError(StageError):
    """A stage that a signal asked to stop and that saved its work; the exit status is 128 + the signal."""


@dataclass
class Stage:
    """A running stage: what it has found so far, and where that is told."""

    name: str
    out: str
    tracker: tracking.Tracker
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    rejects: list[Failure] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    def progress(self, message: str) -> None:
        """Print a line of progress."""
        progress(self.name, message)

    def reject(self, failures: list[Failure]) -> None:
        """List videos that could not be read in rejects.parquet, and tell of the first ones."""
        for failure in failures[: max(0, SHOWN_REJECTS - len(self.rejects))]:
            self.progress(f"cannot read {failure.video_id!r}: {failure.reason}")
        self.rejects += failures
        rows = [asdict(failure) for failure in self.rejects]
        storage.write_table(self.path(REJECTS), pa.Table.from_pylist(rows, REJECTS_SCHEMA))

    def path(self, *parts: str) -> str:
        """Return a name below --out."""
        return storage.join(self.out, *parts)


def progress(name: str, message: str) -> None:
    """Print a line of progress of a stage."""
    print(f"[{name}] {message}", flush=True)


@contextmanager
def stage_run(name: str, config: StageConfig, parent_run: str = "") -> Iterator[Stage]:
    """Run a stage's body: run.json before it, result.json after it, and an MLflow run around it.

    Args:
        name: the stage.
        config: its settings; `config.out` is where it writes.
        parent_run: MLflow run to nest the stage's own run under (a sweep's trial).

    Raises:
        UserError: --out cannot be written to, or holds a run with other settings.
    """
    started = time.monotonic()
    out = storage.absolute(config.out)
    storage.check_writable(out)
    storage.write_json(storage.join(out, RUN), to_json(name, config))
    tracker = tracking.start(config.tracking, stage=name, out=out, params=flatten(config), parent_run=parent_run)
    stage = Stage(name, out, tracker)
    try:
        yield stage
    except (KeyboardInterrupt, SystemExit, StoppedError):
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    stage.result = _result(stage, config, time.monotonic() - started)
    storage.write_json(stage.path(RESULT), stage.result)
    tracker.log({key: value for key, value in stage.metrics.items()}, step=None)
    tracker.artifact(stage.path(RESULT))
    tracker.finish("FINISHED")


def finished(name: str, config: StageConfig) -> dict[str, Any] | None:
    """Return the result of an earlier, finished run of the same stage with the same settings in --out, if any.

    Raises:
        UserError: --out holds a run of another stage or with other settings.
    """
    out = storage.absolute(config.out)
    if not storage.exists(storage.join(out, RUN)):
        return None
    check_same_settings(name, config, storage.read_json(storage.join(out, RUN)))
    result = storage.join(out, RESULT)
    return dict(storage.read_json(result)) if storage.exists(result) else None


def check_same_settings(name: str, config: StageConfig, earlier: dict[str, Any]) -> None:
    """Raise `UserError` where a run in --out differs from the one to be started in what it computes."""
    if earlier.get("stage") != name:
        raise UserError(f"--out {config.out!r} holds a run of {earlier.get('stage')!r}: give another folder")
    before = _fixed(_flatten_json(earlier))
    now = _fixed(_flatten_json(to_json(name, config)))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"--out {config.out!r} holds a run with {key} {before.get(key)!r}, not {now.get(key)!r}: "
                "give another --out, or the same settings to resume"
            )


def _fixed(leaves: dict[str, Any]) -> dict[str, Any]:
    free = tuple(f"{prefix}{name}" for name in FREE_SETTINGS for prefix in ("", "pretrain.", "finetune."))
    return {key: value for key, value in leaves.items() if key != "out" and not key.startswith(free)}


def to_json(name: str, config: StageConfig) -> dict[str, Any]:
    """Return what run.json holds: the stage and its settings as nested values that JSON knows."""
    nested: dict[str, Any] = {"stage": name}
    for key, value in flatten(config).items():
        *groups, leaf = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = list(value) if isinstance(value, tuple) else value
    return nested


def from_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return the leaves of nested values under their dotted keys: what `override` takes."""
    return _flatten_json(value)


def _flatten_json(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            leaves |= _flatten_json(item, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = item
    return leaves


def _result(stage: Stage, config: StageConfig, seconds: float) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "metrics": stage.metrics,
        "counts": stage.counts,
        "seconds": round(seconds, 2),
        **stage.details,
        "config": to_json(stage.name, config),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "mlflow": {"uri": stage.tracker.uri, "run_id": stage.tracker.run_id},
    }
