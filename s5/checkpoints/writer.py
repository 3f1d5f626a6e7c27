"""Saving while training goes on: the loop pays for a copy in host memory, a thread writes it.

At most one save is being written and one waits. One that comes due meanwhile takes the place of the one that waits,
except where that was evaluated, and may thus be the best: then the loop waits until there is room. Host memory holds a
checkpoint once, and twice from when a save first had to wait.
"""

from __future__ import annotations

import errno
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import nn

from s5.checkpoints import checkpoint
from s5.checkpoints.checkpoint import META, Meta
from s5.checkpoints.host_buffer import Image, Snapshot
from s5.checkpoints.retention import Checkpoints, name_of
from s5.errors import SaveError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)


class Listener(Protocol):
    """Who hears, also from the thread, what becomes of the checkpoints; a `WorkerContext` does."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take a row of metrics."""

    def tell(self, message: str) -> None:
        """Take a sentence for the user."""

    def saved(self, step: int) -> None:
        """Take note that the checkpoint of that step is on the store."""

    def beat(self, phase: str) -> None:
        """Take note of what comes next."""


@dataclass(frozen=True)
class Job:
    """A checkpoint on its way from memory to the store."""

    meta: Meta
    snapshot: Snapshot
    blocked: float
    """Seconds that the loop was kept."""


class Saver:
    """Saves a run's checkpoints from a thread of its own; to be used with `with`, which waits for the last one.

    Args:
        checkpoints: of the run.
        context: is told, also from the thread, what the user has to know, which checkpoints there are, and what each
            took: `train/save_seconds` in the loop and `train/save_write_seconds` in the thread; the number of saves
            given up is `train/save_failures`. It gets a beat while the loop waits and writing gets on.
        last: step of the checkpoint that the run goes on from, 0 for none.
    """

    retry_seconds: tuple[float, ...] = (1.0, 4.0, 16.0, 60.0)
    """Waits before the attempts after the first; then a save is given up, and the next is tried when it is due."""

    def __init__(self, checkpoints: Checkpoints, context: Listener, last: int = 0) -> None:
        self.checkpoints = checkpoints
        self.failures = self.replaced = 0
        self.row: dict[str, float] = {}
        self._context = context
        self._last = self._step = last
        self._changed = threading.Condition()
        # The one given back last is taken first, so that the second is given memory only where it is needed.
        self._free = [Snapshot(), Snapshot()]
        self._waiting: Job | None = None
        self._writing: Job | None = None
        self._closed = self._hurried = False
        self._failed = ""
        self._broken: BaseException | None = None
        self._blocks = 0
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._changed:
            # After an error, what has been taken is still written, but a store that fails does not hold up the end.
            self._hurried = error is not None
            self._closed = True
            self._changed.notify_all()
            self._wait(self._is_idle)
        if error is not None:
            return
        if self._broken is not None:
            raise self._broken
        if self._failed:
            raise SaveError(f"the last checkpoint is not saved: {self._failed}; then run the same command again")

    def save(self, task: nn.Module, optimizer: torch.optim.Optimizer, meta: Meta) -> None:
        """Take a checkpoint and return; it is written later.

        Raises:
            ValueError: a tensor is of a type that a checkpoint does not hold.
        """
        began = time.perf_counter()
        self._step = meta.step
        snapshot = self._room(meta.step)
        snapshot.take(checkpoint.contents(task, optimizer))
        with self._changed:
            self._waiting = Job(meta, snapshot, time.perf_counter() - began)
            self._changed.notify_all()

    def _room(self, step: int) -> Snapshot:
        """Return memory for a checkpoint: free, or that of one that waits and can be done without."""
        with self._changed:
            if self._broken is not None:
                raise self._broken
            replaced = self._waiting
            if replaced is None or replaced.meta.evaluated:
                self._wait(lambda: self._waiting is None and bool(self._free))
                if self._broken is not None:
                    raise self._broken
                return self._free.pop()
            self._waiting = None
        self.replaced += 1
        if self.replaced == 1:
            self._context.tell(
                f"the checkpoint of step {replaced.meta.step} is left out for that of step {step}, since the one "
                "before is still being written: raise loop.checkpoint_every if this goes on"
            )
        return replaced.snapshot

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait for the thread to get so far, or to break down."""
        seen = -1
        while not self._changed.wait_for(lambda: ready() or self._broken is not None, timeout=1.0):
            # A store that hangs gives no beat.
            if self._blocks != seen:
                seen = self._blocks
                self._context.beat(f"step {self._step}: saving")

    def _is_idle(self) -> bool:
        return self._waiting is None and self._writing is None

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                    if self._waiting is None:
                        return
                    job = self._writing = self._waiting
                    self._waiting = None
                    self._changed.notify_all()
                self._save(job)
                with self._changed:
                    self._free.append(job.snapshot)
                    self._writing = None
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  raised in the loop's thread, whatever it is
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _save(self, job: Job) -> None:
        """Write a checkpoint, again where that fails; after the last attempt the user is told."""
        began = time.perf_counter()
        job.snapshot.wait()
        for seconds in (*self.retry_seconds, None):
            try:
                self._write(job)
            except OSError as error:
                self._drop(job)
                if seconds is None or self._is_given_up(job, seconds):
                    self._fail(job, error)
                    break
            else:
                self._last, self._failed = job.meta.step, ""
                self._context.saved(job.meta.step)
                self._prune()
                break
        self.row = {"train/save_seconds": job.blocked, "train/save_write_seconds": time.perf_counter() - began}
        self.row["train/save_failures"] = float(self.failures)
        self._context.log(self.row, job.meta.step)

    def _write(self, job: Job) -> None:
        store, name = self.checkpoints.store, name_of(job.meta.step)
        self.checkpoints.clear(name)
        store.check_room(job.snapshot.size)
        digests = {}
        for file, image in job.snapshot.images.items():
            digest = hashlib.sha256()
            store.put(name, file, self._hashed(image, digest.update))
            digests[file] = digest.hexdigest()
        store.put(name, META, [memoryview(checkpoint.meta_bytes(replace(job.meta, files=digests)))])

    def _hashed(self, image: Image, update: Callable[[memoryview], None]) -> Iterator[memoryview]:
        for block in image.blocks():
            update(block)
            self._blocks += 1
            yield block

    def _drop(self, job: Job) -> None:
        """Give back the room of what was not written to the end."""
        try:
            self.checkpoints.store.remove(name_of(job.meta.step))
        except OSError:
            # The next save will try again.
            return

    def _is_given_up(self, job: Job, seconds: float) -> bool:
        """Wait before another attempt; return whether something newer, or the end, makes it needless."""

        def needless() -> bool:
            return self._hurried or (self._waiting is not None and not job.meta.evaluated)

        with self._changed:
            return self._changed.wait_for(needless, timeout=seconds)

    def _fail(self, job: Job, error: OSError) -> None:
        self.failures += 1
        before = f"the checkpoint of step {self._last} is kept" if self._last else "there is none before it"
        self._failed = (
            f"step {job.meta.step} could not be written to {self.checkpoints.store.place!r} "
            f"({error.strerror or error}), {before}: {_remedy(error, job.snapshot.size)}"
        )
        self._context.tell(f"WARNING: {self._failed}; training goes on, and the next save is tried when it is due")

    def _prune(self) -> None:
        try:
            self.checkpoints.prune()
        except OSError as error:
            self._context.tell(f"an old checkpoint in {self.checkpoints.store.place!r} could not be deleted ({error})")


def _remedy(error: OSError, size: int) -> str:
    if error.errno in NO_ROOM:
        return f"free {math.ceil(size / 1e6):,} MB there, or lower loop.keep_checkpoints"
    if error.errno in NO_RIGHT:
        return "give the right to write there"
    return "see that the storage can be reached and written to"
