"""What the workers of a run and its driver tell each other.

It has a file of its own, without torch, since an actor's process imports all of its class's file.
"""

from __future__ import annotations

from s5.video import Failure


class Mailbox:
    """Actor between workers and driver: rows of metrics one way, the wish to stop the other.

    The driver alone talks to MLflow, so that no worker needs to reach the tracking database.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._rejects: list[Failure] = []
        self._stop = False
        self._failure = ""

    def put(self, metrics: dict[str, float], step: int) -> None:
        """Take a row."""
        self._rows.append((step, metrics))

    def reject(self, failures: list[Failure]) -> None:
        """Take videos that could not be read."""
        self._rejects += failures

    def take(self) -> tuple[list[tuple[int, dict[str, float]]], list[Failure]]:
        """Hand over the rows and the rejected videos since the last call."""
        taken = self._rows, self._rejects
        self._rows, self._rejects = [], []
        return taken

    def request_stop(self) -> None:
        """Ask the workers to save and stop."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Return whether the workers are to stop."""
        return self._stop

    def fail(self, message: str) -> None:
        """Note an error that a restart of the workers would meet again."""
        self._failure = self._failure or message

    def failure(self) -> str:
        """Return the first such error, or nothing."""
        return self._failure
