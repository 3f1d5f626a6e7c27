"""A queue that a thread empties in order into a service that may be away for hours; only `flush` waits for it."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pipelines import storage

ROWS_A_REQUEST = 1000
GATHER_S = 0.5
BACKOFF_S = (1.0, 30.0)


class RefusedError(Exception):
    """The service says that the request is wrong: sending it again is of no use."""


class AwayError(Exception):
    """The service does not answer, for now."""


@dataclass(frozen=True)
class Row:
    """One value of one metric."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970."""
    step: int | None
    """None for a result that belongs to the last step."""


@dataclass(frozen=True)
class Call:
    """A request of its own, such as a file."""

    what: str
    """What it sends, for messages."""
    send: Callable[[], None]
    """Sends it; raises RefusedError or AwayError."""
    vital: bool = False
    """Whether nothing behind it can be sent when it is refused."""


class SendQueue:
    """Sends rows and calls in the order in which they were put, each until it is taken or refused for good.

    Args:
        service: name of the receiver, for the messages on stderr.
        send_rows: sends up to `ROWS_A_REQUEST` rows; raises RefusedError or AwayError.
    """

    def __init__(self, service: str, send_rows: Callable[[list[Row]], None]) -> None:
        self.refused = 0
        """Entries that were refused for good."""
        self.failure: RefusedError | AwayError | None = None
        """How the last failed try failed."""
        self.tried = threading.Event()
        """Set when the first entry was sent, or failed for the first time."""
        self._service = service
        self._send_rows = send_rows
        self._queue: deque[Row | Call] = deque()
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        self._closed = False
        self._away = False
        self._thread = threading.Thread(target=self._run, name="send_queue", daemon=True)
        self._thread.start()

    def put(self, *items: Row | Call) -> None:
        """Append entries; returns at once."""
        with self._changed:
            self._queue.extend(items)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> list[Row | Call]:
        """Wait until all is sent, at most so long; close, and return what was not sent."""
        deadline = time.monotonic() + timeout_s
        self._hurry.set()
        with self._changed:
            self._changed.notify_all()
            while self._queue and self._thread.is_alive() and time.monotonic() < deadline:
                self._changed.wait(0.2)  # short, to see when the thread ends
            self._closed = True
            self._changed.notify_all()
            return list(self._queue)

    def _run(self) -> None:
        try:
            self._send_all()
        finally:
            self.tried.set()

    def _send_all(self) -> None:
        pause = BACKOFF_S[0]
        limit = ROWS_A_REQUEST
        while head := self._head(limit):
            try:
                self._send(head)
            except AwayError as error:
                self._went_away(error)
                self._rest(pause)
                pause = min(2 * pause, BACKOFF_S[1])
                continue
            except RefusedError as error:
                if len(head) > 1:  # one bad row spoils a batch: find it
                    limit = len(head) // 2
                    continue
                if self._refuse(head[0], error):
                    return
            self._came_back()
            pause, limit = BACKOFF_S[0], ROWS_A_REQUEST
            with self._changed:
                for _ in head:
                    self._queue.popleft()
                self._changed.notify_all()
            self.tried.set()

    def _head(self, limit: int) -> list[Row | Call]:
        """Wait for work; return what goes into one request: a call, or rows. Nothing when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._queue and isinstance(self._queue[0], Row):
                self._changed.wait_for(lambda: self._closed or self._hurry.is_set(), GATHER_S)
            if self._closed:
                return []
            head: list[Row | Call] = []
            for item in self._queue:
                if len(head) == limit or (head and not _go_together(head[0], item)):
                    break
                head.append(item)
            return head

    def _send(self, head: list[Row | Call]) -> None:
        if isinstance(head[0], Call):
            head[0].send()
        else:
            self._send_rows([item for item in head if isinstance(item, Row)])

    def _rest(self, pause: float) -> None:
        """Pause between tries: shortly once somebody waits in `flush`."""
        if self._hurry.is_set():
            time.sleep(BACKOFF_S[0])
        else:
            self._hurry.wait(pause)

    def _refuse(self, item: Row | Call, error: RefusedError) -> bool:
        """Count an entry that will never be taken, and say so for the first. Return whether this is the end."""
        vital = isinstance(item, Call) and item.vital
        if self.tried.is_set() and (vital or not self.refused):
            what = item.what if isinstance(item, Call) else f"metric {item.key!r}"
            rest = "nothing can be sent" if vital else "it is left out, as will be others that are refused"
            say(f"{self._service} refuses {what} ({error}): {rest}")
        self.refused += 1
        self.failure = error
        return vital

    def _went_away(self, error: AwayError) -> None:
        if not self._away:
            self._away = True
            say(
                f"{self._service} does not answer ({error}); the stage continues, "
                "what it logs is kept and sent when the server is back"
            )
        self.failure = error
        self.tried.set()

    def _came_back(self) -> None:
        if self._away:
            self._away = False
            say(f"{self._service} answers again; what was kept is being sent")


def _go_together(a: Row | Call, b: Row | Call) -> bool:
    """Return whether two entries may share a request: results need all rows before them to be there."""
    return isinstance(a, Row) and isinstance(b, Row) and (a.step is None) == (b.step is None)


def reason(error: Exception) -> str:
    """Return what is wrong in a few words, of the many that a failed request says."""
    text = str(error)
    system = re.search(r"\[Errno -?\d+\] ([\w ]+)|(?:[Rr]ead|[Cc]onnection to \S+) timed out", text)
    return (system[1] or "timed out") if system else (text.splitlines() or [type(error).__name__])[0][:200]


def say(message: str) -> None:
    """Print a line about tracking on stderr."""
    print(f"[tracking] {message}", file=sys.stderr, flush=True)


def write_rows(path: str, rows: list[Row]) -> None:
    """Write rows as lines of JSON."""
    storage.write_bytes(path, "".join(json.dumps(vars(row)) + "\n" for row in rows).encode())


def read_rows(path: str) -> list[Row]:
    """Return the rows that `write_rows` wrote; none where there is no file."""
    if not storage.exists(path):
        return []
    return [Row(**json.loads(line)) for line in storage.read_bytes(path).decode().splitlines()]
