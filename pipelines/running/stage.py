"""What all stages share: the checks of --out, run.json, the tracked run, progress lines and result.json."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, TypeVar

import pyarrow as pa

from pipelines import storage, tracking
from pipelines.config import INPUTS, StageConfig, flatten, leaves_of, to_json
from pipelines.errors import StoppedError, UserError
from pipelines.storage import provenance
from s5.errors import Failure

Result = TypeVar("Result")

RESULT = "result.json"
RUN = "run.json"
REJECTS = "rejects.parquet"
# Folders below --out that a resumed run goes on from: checkpoints; a sweep's trials; the videos that were transcoded;
# cached features.
CHECKPOINTS, TRIALS, VIDEOS, SHARDS = "checkpoints", "trials", "videos", "shards"
REJECTS_SCHEMA = pa.schema([("video_id", pa.string()), ("uri", pa.string()), ("reason", pa.string())])
SHOWN_REJECTS = 5
# These say where and how fast a stage runs, not what it computes: they may change when it resumes.
FREE_SETTINGS = (
    *("scale.", "tracking.", "data."),
    *("loop.keep_checkpoints", "loop.log_every", "loop.micro_batch", "loop.recompute", "loop.compile"),
    *("loop.max_skipped", "loop.profile_steps", "optim.fused", "concurrent_trials", "measured_videos"),
)


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Run work in a thread that does not hold up the end of the process; the future has its result or its error."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001  raised where the result is asked for, whatever it is
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@dataclass
class Stage:
    """A running stage: what it has found so far, and where that is told."""

    name: str
    out: str
    tracker: tracking.Tracker
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    rejects: dict[Failure, None] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    def progress(self, message: str) -> None:
        """Print a line of progress."""
        progress(self.name, message)

    def reject(self, failures: list[Failure]) -> None:
        """List videos that could not be read in rejects.parquet, and tell of the first ones."""
        new = [failure for failure in dict.fromkeys(failures) if failure not in self.rejects]
        for failure in new[: max(0, SHOWN_REJECTS - len(self.rejects))]:
            self.progress(f"cannot read {failure.video_id!r}: {failure.reason}")
        self.rejects |= dict.fromkeys(new)
        if new or not storage.exists(self.path(REJECTS)):
            rows = [asdict(failure) for failure in self.rejects]
            storage.write_table(self.path(REJECTS), pa.Table.from_pylist(rows, REJECTS_SCHEMA))

    def recall_rejects(self) -> None:
        """Take up the list that an earlier part of a resumed run has left."""
        if storage.exists(self.path(REJECTS)):
            rows = storage.read_table(self.path(REJECTS)).to_pylist()
            self.rejects |= dict.fromkeys(Failure(**row) for row in rows)

    def path(self, *parts: str) -> str:
        """Return a name below --out."""
        return storage.join(self.out, *parts)


def progress(name: str, message: str) -> None:
    """Print a line of progress of a stage."""
    print(f"[{name}] {message}", flush=True)


@contextmanager
def stage_run(
    name: str, config: StageConfig, parent_run: str = "", inputs: Mapping[str, str] | None = None
) -> Iterator[Stage]:
    """Run a stage's body: run.json before it, result.json after it, and an MLflow run around it.

    Args:
        name: the stage.
        config: its settings; `config.out` is where it writes.
        parent_run: MLflow run to nest the stage's own run under (a sweep's trial).
        inputs: digests of what the stage reads, by name: another digest means another run.

    Raises:
        UserError: --out cannot be written to or holds a run of another stage, or MLflow refuses the run.
    """
    started = time.monotonic()
    out = storage.absolute(config.out)
    tracking.resolve_uri(config.tracking, out)
    _check_stage(name, config.out, _earlier(out))
    storage.check_writable(out)
    storage.write_json(storage.join(out, RUN), to_json(name, config) | {INPUTS: dict(inputs or {})})
    storage.remove(storage.join(out, RESULT))
    tracker = tracking.start(config.tracking, stage=name, out=out, params=flatten(config), parent_run=parent_run)
    stage = Stage(name, out, tracker)
    try:
        yield stage
        stage.result = _result(stage, config, time.monotonic() - started)
        storage.write_json(stage.path(RESULT), stage.result)
        tracker.log(stage.metrics, step=None)
        tracker.artifact(stage.path(RESULT))
    except (KeyboardInterrupt, SystemExit, StoppedError):
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


@contextmanager
def signals_received(stage: Stage, notice: str) -> Iterator[list[int]]:
    """Take down SIGINT and SIGTERM in the list that is yielded, instead of ending; a second one ends at once.

    Outside the main thread, as in a trial of a sweep, signals are left alone.

    Args:
        stage: the running stage, which tells of the first signal.
        notice: what is done before the end.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        stage.progress(f"stopping: {notice} (once more to stop at once)")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def finished(name: str, config: StageConfig, inputs: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """Return the result of an earlier, finished run of the same stage with the same settings in --out, if any.

    Raises:
        UserError: --out holds a run of another stage, or one that has begun with other settings or inputs.
    """
    out = storage.absolute(config.out)
    earlier = _earlier(out)
    if earlier is None:
        return None
    _check_stage(name, config.out, earlier)
    done = storage.exists(storage.join(out, RESULT))
    if done or any(storage.exists(storage.join(out, folder)) for folder in (CHECKPOINTS, TRIALS, VIDEOS, SHARDS)):
        _check_same(config, earlier, to_json(name, config) | {INPUTS: dict(inputs or {})})
    return dict(storage.read_json(storage.join(out, RESULT))) if done else None


def _earlier(out: str) -> dict[str, Any] | None:
    """Return the run.json that an earlier start has left."""
    path = storage.join(out, RUN)
    if not storage.exists(path):
        return None
    try:
        return dict(storage.read_json(path))
    except ValueError as error:
        raise UserError(f"--out {out!r} holds a damaged {RUN} ({error}): delete it or give another --out") from None


def _check_stage(name: str, out: str, earlier: dict[str, Any] | None) -> None:
    if earlier is not None and earlier.get("stage") != name:
        raise UserError(f"--out {out!r} holds a run of stage {earlier.get('stage')!r}: give another folder")


def _check_same(config: StageConfig, earlier: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `UserError` where a run in --out differs from the one to be started in what it computes."""
    before, now = _fixed(leaves_of(earlier)), _fixed(leaves_of(wanted))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
            continue
        if key.startswith(f"{INPUTS}."):
            what = key.removeprefix(f"{INPUTS}.")
            raise UserError(
                f"--out {config.out!r} holds a run on another {what}, which has changed since: give another --out"
            )
        raise UserError(
            f"--out {config.out!r} holds a run with {key} {before.get(key)!r}, not {now.get(key)!r}: "
            "give another --out, or the same settings to resume"
        )


def _fixed(leaves: dict[str, Any]) -> dict[str, Any]:
    free = tuple(f"{prefix}{name}" for name in FREE_SETTINGS for prefix in ("", "pretrain.", "finetune."))
    return {key: value for key, value in leaves.items() if key != "out" and not key.startswith(free)}


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
