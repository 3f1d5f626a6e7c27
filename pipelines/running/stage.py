"""What all stages share: the tracked run around a stage's body, its lines, its rejects and result.json."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, TypeVar

import pyarrow as pa

from pipelines import storage, tracking
from pipelines.config import StageConfig, flatten, paths, to_json
from pipelines.errors import StoppedError, UserError
from pipelines.running import lease, progress
from pipelines.running.ray_job import ray_job
from pipelines.running.run_folder import REJECTS, RESULT, RunFolder
from pipelines.storage import provenance
from s5.errors import Failure

Result = TypeVar("Result")

REJECTS_SCHEMA = pa.schema([("video_id", pa.string()), ("uri", pa.string()), ("reason", pa.string())])
LINKED = ("manifest", "checkpoint", "features")
"""Inputs that other stages make: their runs are linked in MLflow."""
SHOWN_REJECTS = 5
FIRST_REASONS = 3
"""Reasons that the error names where no video can be read."""


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Run work in a thread that does not delay the end of the process; the future has its result or its error."""
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
    """A running stage: its folder, its tracked run, and what it has found so far."""

    name: str
    folder: RunFolder
    tracker: tracking.Tracker
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    rejects: dict[Failure, None] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    ray_job: dict[str, str] = field(default_factory=dict)
    earlier_seconds: float = 0.0
    """Of earlier starts, as far as this one goes on with what they did."""

    @property
    def out(self) -> str:
        """The folder's path or URI."""
        return self.folder.root

    def path(self, *parts: str) -> str:
        """Return a name below --out."""
        return self.folder.path(*parts)

    def info(self, message: str) -> None:
        """Print a line."""
        progress.info(self.name, message)

    def progress_bar(self, label: str, total: int, unit: str) -> progress.ProgressBar:
        """Return a bar for a phase of the stage: so many items (`unit`, in the plural), `label` says what is done."""
        return progress.ProgressBar(self.name, label, total, unit)

    def publish(self, name: str, content: bytes) -> str:
        """Write a file below --out, add it to the tracked run and return its path."""
        path = self.folder.write(name, content)
        self.tracker.artifact(path)
        return path

    def reject(self, failures: list[Failure]) -> None:
        """Add videos that could not be read to rejects.parquet, and print the first ones."""
        new = [failure for failure in dict.fromkeys(failures) if failure not in self.rejects]
        for failure in new[: max(0, SHOWN_REJECTS - len(self.rejects))]:
            self.info(f"cannot read {failure.video_id!r}: {failure.reason}")
        self.rejects |= dict.fromkeys(new)
        if new or not self.folder.exists(REJECTS):
            rows = [asdict(failure) for failure in self.rejects]
            self.folder.write_table(REJECTS, pa.Table.from_pylist(rows, REJECTS_SCHEMA))

    def replace_rejects(self, failures: list[Failure]) -> None:
        """Write rejects.parquet without what an earlier run listed."""
        self.folder.remove(REJECTS)
        self.reject(failures)

    def load_rejects(self) -> None:
        """Start from the rejects that an earlier part of a resumed run listed."""
        if self.folder.exists(REJECTS):
            rows = storage.read_table(self.path(REJECTS)).to_pylist()
            self.rejects |= dict.fromkeys(Failure(**row) for row in rows)

    def none_readable(self) -> UserError:
        """Return the error of a stage all of whose videos are rejects."""
        first = list(self.rejects)[:FIRST_REASONS]
        reasons = "; ".join(f"{reject.video_id!r}: {reject.reason}" for reject in first)
        return UserError(f"none of the {len(self.rejects)} videos can be read ({reasons}); see {self.path(REJECTS)}")


@contextmanager
def stage_run(
    name: str,
    config: StageConfig,
    parent_run: str = "",
    inputs: Mapping[str, str] | None = None,
    params: Mapping[str, str] | None = None,
    datasets: Sequence[tracking.DataSet] = (),
) -> Iterator[Stage]:
    """Run a stage's body: run.json before it, result.json after it, and an MLflow run around it.

    Args:
        name: the stage.
        config: its settings; `config.out` is where it writes.
        parent_run: MLflow run to nest the stage's own run under (a sweep's trial).
        inputs: digests of what the stage reads, by name: another digest means another run.
        params: what is logged beside the settings, as a setting that was worked out.
        datasets: videos that the stage reads.

    Raises:
        UserError: --out cannot be written to, holds a run of another stage or is in use by another run, or MLflow
            refuses the run.
        StageError: another run took --out over, since this one gave no sign of life.
    """
    folder = RunFolder.of(name, config, inputs)
    tracking.resolve_uri(config.tracking, folder.root)
    folder.check()
    with lease.held(folder.root, name) as held:
        started = time.monotonic()
        folder.begin()
        tracker = tracking.start(
            config.tracking,
            stage=name,
            out=folder.root,
            params=flatten(config) | dict(params or {}),
            parent_run=parent_run,
            inputs={key: path for key, (path, role) in paths(config).items() if role.what in LINKED and "." not in key},
            datasets=datasets,
            ray_job=(job := ray_job()),
        )
        with _finished(tracker):
            stage = Stage(name, folder, tracker, ray_job=job)
            if tracker.link:
                stage.info(f"MLflow run: {tracker.link}")
            with tracking.machine_logged(tracker, config.tracking.system_s):
                yield stage
            held.check()
            stage.result = _result(stage, config, time.monotonic() - started)
            folder.write_json(RESULT, stage.result)
            if checkpoint := stage.details.get("checkpoint"):
                tracker.tag("checkpoint", checkpoint)
            tracker.log(stage.metrics, step=None)
            tracker.artifact(stage.path(RESULT))


@contextmanager
def _finished(tracker: tracking.Tracker) -> Iterator[None]:
    """Finish a tracked run as the block ends."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, StoppedError):
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


@contextmanager
def signals_received(stage: Stage, notice: str) -> Iterator[list[int]]:
    """Record SIGINT and SIGTERM in the list that is yielded, instead of ending; a second one ends at once.

    Outside the main thread, as in a trial of a sweep, signals are left alone.

    Args:
        stage: the running stage, which prints a line at the first signal.
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
        stage.info(f"stopping: {notice} (once more to stop at once)")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def finished(
    name: str, config: StageConfig, inputs: Mapping[str, str] | None = None, redo: str = ""
) -> dict[str, Any] | None:
    """Return the result of an earlier, finished run of the same stage with the same settings in --out, if any.

    Args:
        name: the stage.
        config: its settings.
        inputs: digests of what it reads.
        redo: what another --out is for, such as `train again`: then a line says that the run is finished already.

    Raises:
        UserError: --out holds a run of another stage, or one that began with other settings or inputs.
    """
    result = RunFolder.of(name, config, inputs).finished()
    if result is not None and redo:
        progress.info(name, f"{config.out} is finished already; give another --out to {redo}")
    return result


def _result(stage: Stage, config: StageConfig, seconds: float) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "metrics": stage.metrics,
        "counts": stage.counts,
        "seconds": round(stage.earlier_seconds + seconds, 2),
        **stage.details,
        "config": to_json(stage.name, config),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "mlflow": {"uri": stage.tracker.uri, "run_id": stage.tracker.run_id, "link": stage.tracker.link},
        "ray": stage.ray_job,
    }
