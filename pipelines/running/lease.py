"""The lease on --out: a stage holds it while it writes there, and another run into the same --out is refused meanwhile.

The holder writes the file `lease.json` again every `BEAT_S` seconds. One whose process has ended on this machine is
dead; one on another machine once its file stays the same for `SILENT_S` seconds, by the clock of whoever waits: clocks
of two machines are never compared. Whoever finds a dead holder takes the lease over.

A local disk gives the file to one alone. pyarrow offers no such request of an object store, so there, and whenever the
lease is taken over, one writes and looks a second later whether it is still its own file. Where a holder that was
silent for too long wakes up, or another wrote at the same moment too slowly to be seen, the one whose file it is not
stops at its next look.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipelines import storage
from pipelines.errors import StageError, UserError
from pipelines.running import progress

LEASE = "lease.json"
BEAT_S, SILENT_S = 10.0, 60.0
"""Seconds between two signs of life of a holder, and without one until it counts as dead."""
SETTLE_S = 1.0
"""Seconds after which two that wrote at the same moment see which of them was the later one."""
LOOK_S = 1.0
"""Seconds between two looks at another holder."""
BYTES = 1024
"""Length of the file. pyarrow reads as much of an object as it had when its length was asked for."""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray tells the process of a job about it."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease."""

    key: str
    """A name of this one lease."""
    stage: str
    host: str
    process: int
    machine: str
    """The same for all processes that see each other by their numbers; empty where that is not known."""
    started: str
    """When the process started, in the kernel's count: numbers of processes are used again."""
    job: str
    """Id of the job, of one that was submitted."""
    since: str

    @classmethod
    def here(cls, stage: str) -> Holder:
        """Return this process as a new holder."""
        process = os.getpid()
        return cls(
            key=uuid.uuid4().hex,
            stage=stage,
            host=platform.node(),
            process=process,
            machine=_machine(),
            started=_started(process),
            job=_job(),
            since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        )

    def is_near(self) -> bool:
        """Return whether its process could be seen from here."""
        return bool(self.machine) and self.machine == _machine()

    def has_ended(self) -> bool:
        """Return whether its process is known to have ended."""
        return self.is_near() and _started(self.process) != self.started

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.stage} (process {self.process} on {self.host}{job})"


@contextmanager
def held(out: str, stage: str) -> Iterator[Lease]:
    """Hold the lease on --out while the block runs.

    Raises:
        UserError: another run holds it.
        StageError: it was lost to another run.
    """
    lease = Lease(out, stage)
    lease.acquire()
    done = threading.Event()
    thread = threading.Thread(target=lease.keep, args=(done,), daemon=True, name="lease")
    thread.start()
    try:
        yield lease
    except BaseException:
        lease.check()
        raise
    finally:
        done.set()
        thread.join()
        lease.release()


def refuse_where_held(out: str) -> None:
    """Raise `UserError` where a living process of this machine holds the lease on a local --out."""
    content = _read(storage.join(out, LEASE))
    holder = _holder(content) if content else None
    if holder is not None and holder.is_near() and not holder.has_ended():
        raise _refusal(out, holder)


class Lease:
    """The lease on one --out, a resolved path or URI."""

    def __init__(self, out: str, stage: str) -> None:
        self._out = out
        self._path = storage.join(out, LEASE)
        self._own = Holder.here(stage)
        self._beats = 0
        self._lost = ""

    def acquire(self) -> None:
        """Take the lease, after waiting where its holder may be dead.

        Raises:
            UserError: another run holds it.
        """
        if storage.create_bytes(self._path, self._content()):
            if not storage.is_uri(self._path):
                return
        else:
            self._wait_for_end()
            storage.write_bytes(self._path, self._content())
        time.sleep(SETTLE_S)
        if not self._is_own(content := _read(self._path)):
            raise _refusal(self._out, _holder(content))

    def keep(self, done: threading.Event) -> None:
        """Give signs of life until `done`; signal the main thread to stop once another run has the lease."""
        while not done.wait(BEAT_S):
            try:
                content = _read(self._path)
                if content and not self._is_own(content):
                    self._lose(_holder(content))
                    return
                storage.write_bytes(self._path, self._content())
            except (OSError, UserError):
                # The store is away; who wants the lease has to reach it too.
                continue

    def check(self) -> None:
        """Raise `StageError` where another run has taken the lease over."""
        if self._lost:
            raise StageError(self._lost)

    def release(self) -> None:
        """Give the lease up, unless another run has it; one that cannot be removed counts as dead after a while."""
        try:
            if self._is_own(_read(self._path)):
                storage.remove(self._path)
        except (OSError, UserError) as error:
            self._say(f"{self._path} cannot be removed ({error}); the next run has to wait {SILENT_S:g} s")

    def _wait_for_end(self) -> None:
        """Return once the holder is known to be dead, or has given the lease up."""
        content, asked = _read(self._path), time.monotonic()
        if content is None:
            return
        holder = _holder(content)
        if holder is not None and holder.has_ended():
            self._say(f"{holder} has ended without giving --out up: taking over")
            return
        if holder is not None and holder.is_near():
            raise _refusal(self._out, holder)
        self._say(f"{self._out} is held by {holder or 'another run'}: waiting up to {SILENT_S:g} s for a sign of life")
        while time.monotonic() - asked < SILENT_S:
            time.sleep(LOOK_S)
            now = _read(self._path)
            if now is None:
                return
            if now != content:
                raise _refusal(self._out, _holder(now))
        self._say(f"no sign of life for {SILENT_S:g} s: taking over")

    def _lose(self, other: Holder | None) -> None:
        self._lost = (
            f"--out {self._out!r} was taken over by {other or 'another run'}, since this run gave no sign of life for "
            f"{SILENT_S:g} s; let one of them go on"
        )
        self._say(self._lost)
        _stop_main_thread()

    def _content(self) -> bytes:
        self._beats += 1
        return json.dumps(asdict(self._own) | {"beats": self._beats}, indent=2).encode().ljust(BYTES)

    def _is_own(self, content: bytes | None) -> bool:
        return content is not None and self._own.key.encode() in content

    def _say(self, message: str) -> None:
        progress.info(self._own.stage, message)


def _read(path: str) -> bytes | None:
    """Return the content of a lease; None where there is none."""
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return None


def _holder(content: bytes | None) -> Holder | None:
    """Return who holds a lease; None where it does not say, as for the moment in which it is made."""
    try:
        values = json.loads(content or b"")
        values.pop("beats")
        return Holder(**values)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _refusal(out: str, holder: Holder | None) -> UserError:
    since = f" since {holder.since}" if holder else ""
    return UserError(
        f"--out {out!r} is in use by {holder or 'another run'}{since}: wait for its end, stop it, or give another --out"
    )


def _stop_main_thread() -> None:
    # Jobs of Ray block SIGINT, and what a shell runs in the background ignores it.
    is_deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()) or (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    )
    # Only a signal to the thread itself wakes it where it waits.
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM if is_deaf else signal.SIGINT)


def _machine() -> str:
    """Return what processes share that see each other by their numbers: a start of the kernel, and a container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: int) -> str:
    """Return when a process started; empty where there is none, or one that has ended and is not waited for yet."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _job() -> str:
    """Return the id under which this process was submitted as a job; empty where it was not."""
    try:
        return str(json.loads(os.environ.get(JOB_VARIABLE, "{}"))["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""
