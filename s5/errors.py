"""The errors of s5, without torch: unreadable videos, checkpoints and training runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class VideoError(Exception):
    """A video that cannot be read; `reason` says why in one sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Failure:
    """A video that could not be read, and why."""

    video_id: str
    uri: str
    reason: str


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit; the message says which and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was saved: an earlier one may be sound."""

    def __init__(self, where: str, reason: str) -> None:
        # Both are arguments, so that it pickles.
        super().__init__(where, reason)
        self.reason = reason

    def __str__(self) -> str:
        where, reason = self.args
        return f"checkpoint {where!r} is damaged: {reason}"


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why and what to do."""


class SkippedStep(NamedTuple):
    """A step that changed no weight, optimiser state or moving average, since loss or gradient were not finite."""

    step: int
    """Number of the step, from 1."""
    video_ids: list[str]
    """Videos of its batch."""


class NotFiniteError(TrainingError):
    """Loss or gradient were not finite in too many steps in a row."""

    def __init__(self, skipped: list[SkippedStep]) -> None:
        first, last = skipped[0], skipped[-1]
        videos = ", ".join(last.video_ids[:3])
        super().__init__(
            f"loss or gradient are not finite in steps {first.step} to {last.step}, more in a row than "
            f"loop.max_skipped allows: lower optim.lr or raise optim.warmup with another --out, or look at the videos "
            f"of the last of them ({videos}{', ...' if len(last.video_ids) > 3 else ''}); the last checkpoint remains"
        )
        self.skipped = skipped


class SaveError(TrainingError):
    """The last checkpoint of a run could not be written; the message says where, why and what to do."""
