"""Saving while training continues: the loop waits for a copy to host memory, a thread writes it.

At most one save is being written and one is pending. One that comes due meanwhile replaces the pending one, unless
that was evaluated, and so may be the best: then the loop waits. Host memory holds a checkpoint once, and twice from the
first time that a save is pending.

Why not `torch.distributed.checkpoint.async_save` (torch 2.15): it refuses a process group without a CPU backend, such
as one of NCCL alone; its safetensors writer knows local folders only, copies the checkpoint once more in memory, holds
Python's lock (GIL) meanwhile, which stops training, and after a full disk or a kill leaves a part of a file under its
final name. Digests, retries, retention and the free-space check would remain to be written around it.
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
from s5.checkpoints.history import CheckpointHistory, checkpoint_name
from s5.checkpoints.host_buffer import FileBuffer, HostBuffer
from s5.errors import SaveError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


class SaveListener(Protocol):
    """What is called, also from the thread, with the outcome of saves; a `WorkerContext` is one."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log a row of metrics."""

    def notify(self, message: str) -> None:
        """Show the user a sentence."""

    def saved(self, step: int) -> None:
        """Record that the checkpoint of that step is stored."""

    def beat(self, phase: str) -> None:
        """Record that the process is alive and what it does next."""


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint on its way from host memory to the backend."""

    meta: Meta
    buffer: HostBuffer
    blocked: float
    """Seconds that the loop waited."""


class CheckpointWriter:
    """Writes a run's checkpoints in a thread; a context manager, which waits for the last one at its end.

    Args:
        checkpoints: of the run.
        context: is called, also from the thread, with messages to the user, the steps of stored checkpoints, and the
            metrics of each save: `train/save_seconds` in the loop, `train/save_write_seconds` in the thread, and
            `train/save_failures`, the number of saves given up. It gets a beat while the loop waits, as long as
            writing makes progress.
        last: step of the checkpoint that the run resumes from, 0 for none.
    """

    retry_seconds: tuple[float, ...] = (1.0, 4.0, 16.0, 60.0)
    """Waits before each retry; after the last one a save is given up, and the next is tried when it is due."""

    def __init__(self, checkpoints: CheckpointHistory, context: SaveListener, last: int = 0) -> None:
        self.checkpoints = checkpoints
        self.failures = self.replaced = 0
        self.row: dict[str, float] = {}
        self._context = context
        self._last = self._step = last
        self._changed = threading.Condition()
        # A stack: the second gets memory only when both are in use.
        self._free = [HostBuffer(), HostBuffer()]
        self._pending: PendingSave | None = None
        self._writing: PendingSave | None = None
        self._closed = self._ending_early = False
        self._failed = ""
        self._error: BaseException | None = None
        self._blocks = 0
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._changed:
            # After an error, pending saves are still written, but not retried.
            self._ending_early = error is not None
            self._closed = True
            self._changed.notify_all()
            self._wait(self._is_idle)
        if error is not None:
            return
        if self._error is not None:
            raise self._error
        if self._failed:
            raise SaveError(f"the last checkpoint is not saved: {self._failed}; then run the same command again")

    def save(self, task: nn.Module, optimizer: torch.optim.Optimizer, meta: Meta) -> None:
        """Copy a checkpoint to host memory and return; it is written later.

        Raises:
            ValueError: a tensor is of a type that safetensors does not know.
        """
        began = time.perf_counter()
        self._step = meta.step
        buffer = self._free_buffer(meta.step)
        buffer.copy_from(checkpoint.contents(task, optimizer))
        with self._changed:
            self._pending = PendingSave(meta, buffer, time.perf_counter() - began)
            self._changed.notify_all()

    def _free_buffer(self, step: int) -> HostBuffer:
        """Return memory for a checkpoint: free, or that of a pending save that can be left out."""
        with self._changed:
            if self._error is not None:
                raise self._error
            replaced = self._pending
            if replaced is None or replaced.meta.evaluated:
                self._wait(lambda: self._pending is None and bool(self._free))
                if self._error is not None:
                    raise self._error
                return self._free.pop()
            self._pending = None
        self.replaced += 1
        if self.replaced == 1:
            self._context.notify(
                f"the checkpoint of step {replaced.meta.step} is left out for that of step {step}, since the one "
                "before is still being written: raise loop.checkpoint_every if this repeats"
            )
        return replaced.buffer

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until the thread has got so far, or has failed."""
        seen = -1
        while not self._changed.wait_for(lambda: ready() or self._error is not None, timeout=1.0):
            # No beat where the backend hangs.
            if self._blocks != seen:
                seen = self._blocks
                self._context.beat(f"step {self._step}: saving")

    def _is_idle(self) -> bool:
        return self._pending is None and self._writing is None

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._pending is not None or self._closed)
                    if self._pending is None:
                        return
                    save = self._writing = self._pending
                    self._pending = None
                    self._changed.notify_all()
                self._process(save)
                with self._changed:
                    self._free.append(save.buffer)
                    self._writing = None
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  raised again in the loop's thread, whatever it is
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _process(self, save: PendingSave) -> None:
        """Write a checkpoint, with retries, and log what that took."""
        began = time.perf_counter()
        save.buffer.wait()
        for seconds in (*self.retry_seconds, None):
            try:
                self._write(save)
            except OSError as error:
                self._discard(save)
                if seconds is None or self._is_given_up(save, seconds):
                    self._fail(save, error)
                    break
            else:
                self._last, self._failed = save.meta.step, ""
                self._context.saved(save.meta.step)
                self._prune()
                break
        self.row = {"train/save_seconds": save.blocked, "train/save_write_seconds": time.perf_counter() - began}
        self.row["train/save_failures"] = float(self.failures)
        self._context.log(self.row, save.meta.step)

    def _write(self, save: PendingSave) -> None:
        backend, name = self.checkpoints.backend, checkpoint_name(save.meta.step)
        self.checkpoints.clear(name)
        backend.check_free_space(save.buffer.size)
        digests = {}
        for file, content in save.buffer.files.items():
            digest = hashlib.sha256()
            backend.put(name, file, self._hashed(content, digest.update))
            digests[file] = digest.hexdigest()
        backend.put(name, META, [memoryview(checkpoint.meta_bytes(replace(save.meta, files=digests)))])

    def _hashed(self, content: FileBuffer, update: Callable[[memoryview], None]) -> Iterator[memoryview]:
        for block in content.blocks():
            update(block)
            self._blocks += 1
            yield block

    def _discard(self, save: PendingSave) -> None:
        """Delete what was not written completely, to free its space."""
        try:
            self.checkpoints.backend.remove(checkpoint_name(save.meta.step))
        except OSError:
            # The next save will try again.
            return

    def _is_given_up(self, save: PendingSave, seconds: float) -> bool:
        """Wait before a retry; return whether a newer save, or the end of the run, makes it needless."""

        def needless() -> bool:
            return self._ending_early or (self._pending is not None and not save.meta.evaluated)

        with self._changed:
            return self._changed.wait_for(needless, timeout=seconds)

    def _fail(self, save: PendingSave, error: OSError) -> None:
        self.failures += 1
        before = f"the checkpoint of step {self._last} remains" if self._last else "there is none before it"
        self._failed = (
            f"step {save.meta.step} could not be written to {self.checkpoints.backend.location!r} "
            f"({error.strerror or error}), {before}: {_remedy(error, save.buffer.size)}"
        )
        self._context.notify(f"WARNING: {self._failed}; training continues, and the next save is tried when it is due")

    def _prune(self) -> None:
        try:
            self.checkpoints.prune()
        except OSError as error:
            self._context.notify(
                f"an old checkpoint in {self.checkpoints.backend.location!r} could not be deleted ({error})"
            )


def _remedy(error: OSError, size: int) -> str:
    if error.errno in NO_SPACE:
        return f"free {math.ceil(size / 1e6):,} MB there, or lower loop.keep_checkpoints"
    if error.errno in NO_PERMISSION:
        return "give write permission there"
    return "check that the storage can be reached and written to"
