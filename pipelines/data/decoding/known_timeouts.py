"""Which videos timed out, known to all processes of a job: a decoder that hangs costs its whole time limit once.

An actor knows it, which the first timeout starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray

from pipelines.data.decoding.video_process import STALLED, TIMED_OUT
from s5.errors import Failure

ACTOR, REPLY_S = "timed_out_videos", 2.0
"""Name of the actor, and seconds that a decode task waits for its answer."""
# Ray ends an actor, even a named one, once the handle is gone that started it; others do not count.
_kept_actor: list[Any] = []


class TimedOutVideos:
    """An actor's state: why videos, by URI, timed out in any decode task of a job."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def add(self, reasons: dict[str, str]) -> None:
        """Add videos; the first reason of each stays."""
        self._reasons = reasons | self._reasons

    def remove(self, uri: str) -> None:
        """Forget a video that could be read."""
        self._reasons.pop(uri, None)

    def known(self) -> dict[str, str]:
        """Return the reason of each video."""
        return self._reasons


def tell(failures: Iterable[Failure]) -> None:
    """Tell all decode tasks of the job which videos timed out; the first such call starts the actor.

    Call it in a process that lasts, such as a training worker: the actor ends with it.
    """
    reasons = {failure.uri: failure.reason for failure in failures if failure.reason.startswith((STALLED, TIMED_OUT))}
    if not reasons:
        return
    if (actor := _actor()) is None:
        actor = ray.remote(TimedOutVideos).options(name=ACTOR, get_if_exists=True, num_cpus=0).remote()
        _kept_actor[:] = [actor]
    actor.add.remote(reasons)


def known() -> dict[str, str]:
    """Return why videos timed out in other processes; nothing without Ray, or where no video has."""
    actor = _actor()
    if actor is None:
        return {}
    try:
        return dict(ray.get(actor.known.remote(), timeout=REPLY_S))
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        # It ended with a worker that is being replaced.
        return {}


def forget(uri: str) -> None:
    """Give a video, which could be read, its whole time again in all processes."""
    if (actor := _actor()) is not None:
        actor.remove.remote(uri)


def _actor() -> Any:
    if not ray.is_initialized():
        return None
    try:
        return ray.get_actor(ACTOR)
    except ValueError:
        return None
