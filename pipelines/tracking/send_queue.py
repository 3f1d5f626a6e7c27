"""A queue whose thread sends entries in order to a service that may be down for hours; only `flush` waits for it."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pipelines import storage

ROWS_A_REQUEST = 1000
GATHER_S = 0.5
"""Seconds that the first row of a request waits for others."""
BACKOFF_S = (1.0, 30.0)
"""First and longest pause between attempts."""


class RefusedError(Exception):
    """The service refuses the request for good: retrying is of no use."""


class UnavailableError(Exception):
    """The service does not answer at present."""


@dataclass(frozen=True)
class MetricRow:
    """One value of one metric."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970."""
    step: int | None
    """None for a final result, which belongs to the last step."""


@dataclass(frozen=True)
class Request:
    """An entry that is sent as a request of its own, such as a file."""

    what: str
    """What it sends, for messages."""
    send: Callable[[], None]
    """Sends it; raises RefusedError or UnavailableError."""
    required: bool = False
    """Nothing behind it can be sent when it is refused."""


class SendQueue:
    """Sends rows and requests in the order in which they were put, retrying each until it is accepted or refused.

    Args:
        service: name of the receiver, for the messages on stderr.
        send_rows: sends up to ROWS_A_REQUEST rows; raises RefusedError or UnavailableError.
    """

    def __init__(self, service: str, send_rows: Callable[[list[MetricRow]], None]) -> None:
        self.refused = 0
        """Number of entries that were refused."""
        self.failure: RefusedError | UnavailableError | None = None
        """The last failure."""
        self.attempted = threading.Event()
        """Set once the first entry was sent, or failed for the first time."""
        self._service = service
        self._send_rows = send_rows
        self._queue: deque[MetricRow | Request] = deque()
        self._changed = threading.Condition()
        self._flushing = threading.Event()
        self._closed = False
        self._unavailable = False
        self._thread = threading.Thread(target=self._run, name="send_queue", daemon=True)
        self._thread.start()

    def put(self, *items: MetricRow | Request) -> None:
        """Append entries; returns at once."""
        with self._changed:
            self._queue.extend(items)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> list[MetricRow | Request]:
        """Wait until everything is sent, at most `timeout_s` seconds; close the queue and return what was not sent."""
        deadline = time.monotonic() + timeout_s
        self._flushing.set()
        with self._changed:
            self._changed.notify_all()
            while self._queue and self._thread.is_alive() and time.monotonic() < deadline:
                self._changed.wait(0.2)  # short, to notice when the thread ends
            self._closed = True
            self._changed.notify_all()
            return list(self._queue)

    def _run(self) -> None:
        try:
            self._send_all()
        finally:
            self.attempted.set()

    def _send_all(self) -> None:
        pause = BACKOFF_S[0]
        limit = ROWS_A_REQUEST
        while batch := self._next_batch(limit):
            try:
                self._send(batch)
            except UnavailableError as error:
                self._record_unavailable(error)
                self._wait_before_retry(pause)
                pause = min(2 * pause, BACKOFF_S[1])
                continue
            except RefusedError as error:
                if len(batch) > 1:  # one bad row spoils a request: bisect to find it
                    limit = len(batch) // 2
                    continue
                if self._record_refusal(batch[0], error):
                    return
            self._record_available()
            pause, limit = BACKOFF_S[0], ROWS_A_REQUEST
            with self._changed:
                for _ in batch:
                    self._queue.popleft()
                self._changed.notify_all()
            self.attempted.set()

    def _next_batch(self, limit: int) -> list[MetricRow | Request]:
        """Wait for entries and return those of the next request: one `Request`, or rows; none once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._queue and isinstance(self._queue[0], MetricRow):
                self._changed.wait_for(lambda: self._closed or self._flushing.is_set(), GATHER_S)
            if self._closed:
                return []
            batch: list[MetricRow | Request] = []
            for item in self._queue:
                if len(batch) == limit or (batch and not _share_request(batch[0], item)):
                    break
                batch.append(item)
            return batch

    def _send(self, batch: list[MetricRow | Request]) -> None:
        if isinstance(batch[0], Request):
            batch[0].send()
        else:
            self._send_rows([item for item in batch if isinstance(item, MetricRow)])

    def _wait_before_retry(self, pause: float) -> None:
        """Wait for a pause, shortly once `flush` is waiting."""
        if self._flushing.is_set():
            time.sleep(BACKOFF_S[0])
        else:
            self._flushing.wait(pause)

    def _record_refusal(self, item: MetricRow | Request, error: RefusedError) -> bool:
        """Count a refused entry, print a message for the first, and return whether nothing more can be sent."""
        required = isinstance(item, Request) and item.required
        if self.attempted.is_set() and (required or not self.refused):
            what = item.what if isinstance(item, Request) else f"metric {item.key!r}"
            rest = "nothing can be sent" if required else "it is left out, as will be others that are refused"
            print_message(f"{self._service} refuses {what} ({error}): {rest}")
        self.refused += 1
        self.failure = error
        return required

    def _record_unavailable(self, error: UnavailableError) -> None:
        if not self._unavailable:
            self._unavailable = True
            print_message(
                f"{self._service} does not answer ({error}); the stage continues, "
                "and what it logs is queued and sent when the server is back"
            )
        self.failure = error
        self.attempted.set()

    def _record_available(self) -> None:
        if self._unavailable:
            self._unavailable = False
            print_message(f"{self._service} answers again; what was queued is being sent")


def _share_request(a: MetricRow | Request, b: MetricRow | Request) -> bool:
    """Return whether two entries may share a request: final results need all rows before them to be there."""
    return isinstance(a, MetricRow) and isinstance(b, MetricRow) and (a.step is None) == (b.step is None)


def print_message(message: str) -> None:
    """Print a line about tracking on stderr."""
    print(f"[tracking] {message}", file=sys.stderr, flush=True)


def write_rows(path: str, rows: list[MetricRow]) -> None:
    """Write rows as lines of JSON."""
    storage.write_bytes(path, "".join(json.dumps(vars(row)) + "\n" for row in rows).encode())


def read_rows(path: str) -> list[MetricRow]:
    """Return the rows that `write_rows` wrote; none where there is no file."""
    if not storage.exists(path):
        return []
    return [MetricRow(**json.loads(line)) for line in storage.read_bytes(path).decode().splitlines()]
