"""The checkpoints of a run: which are sound, which is the best, which are retained, and from which it resumes."""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from s5 import distributed
from s5.checkpoints.backend import CheckpointBackend
from s5.checkpoints.checkpoint import META, Meta, parse_meta, verify
from s5.errors import CheckpointError, DamagedError

NAME = re.compile(r"step_(\d{8,})")
# Folders of format 1, named by Ray Train.
FORMER_PREFIX = "checkpoint_"
# In the folder of a run: what it says at its end, and its checkpoints.
RESULT, CHECKPOINTS = "result.json", "checkpoints"
INTERRUPTED = f"its save was interrupted (no {META})"


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that all workers resume from."""

    name: str = ""
    """Name of its folder; empty to start from step 0."""
    files: dict[str, str] = field(default_factory=dict)
    """Digests of its files."""
    unsound: dict[str, str] = field(default_factory=dict)
    """Later checkpoints that are not sound, and why."""
    error: str = ""
    """Why there is nothing to resume from, though there should be."""


@dataclass
class CheckpointHistory:
    """The checkpoints of one run on a backend."""

    backend: CheckpointBackend
    retain: int = 2
    """How many of the latest are retained."""
    best: tuple[str, str] | None = None
    """Evaluation metric by which the best one is retained too, and `max` or `min`."""
    unsound: dict[str, str] = field(default_factory=dict)
    """Those found not to be sound, and why; they are deleted after the next save."""

    def metas(self) -> dict[str, Meta]:
        """Return the meta data of the complete checkpoints, by name, the latest last.

        Raises:
            OSError: the backend cannot be read.
        """
        found = {}
        for name, files in self._listing().items():
            if META not in files or name in self.unsound:
                continue
            try:
                found[name] = parse_meta(self.backend.read(name, META), self.backend.path(name))
            except DamagedError as error:
                self.unsound[name] = error.reason
        return found

    def best_of(self, metas: dict[str, Meta]) -> tuple[str, float] | None:
        """Return the name and score of the best checkpoint, the first of equals; None where none was evaluated."""
        if self.best is None:
            return None
        metric, end = self.best
        scores = {name: meta.evaluated[metric] for name, meta in metas.items() if metric in meta.evaluated}
        scores = {name: score for name, score in scores.items() if math.isfinite(score)}
        if not scores:
            return None
        name = (max if end == "max" else min)(scores, key=lambda name: scores[name])
        return name, scores[name]

    def clear(self, name: str) -> None:
        """Delete what interrupted saves have left, and any checkpoint of that name.

        Raises:
            OSError: the backend fails.
        """
        for other, files in self._listing().items():
            if META not in files or other == name:
                self.backend.remove(other)
                self.unsound.pop(other, None)

    def prune(self) -> None:
        """Delete what is not retained; to be called after a save, whose checkpoint is sound.

        Raises:
            OSError: the backend fails.
        """
        metas = self.metas()
        retained = {*list(metas)[-self.retain :]}
        if best := self.best_of(metas):
            retained.add(best[0])
        for name in self._listing():
            if name not in retained:
                self.backend.remove(name)
                self.unsound.pop(name, None)

    @contextmanager
    def resume_folder(self, rank: int, notify: Callable[[str], None]) -> Iterator[Path | None]:
        """Yield the folder of the checkpoint to resume from, on all workers the same; None to start from step 0.

        Worker 0 takes the latest one whose files match their digests, and notifies of those that it skips. Every worker
        has to call this.

        Raises:
            CheckpointError: there are checkpoints and none is sound, or they have another format, or this worker
                does not see what worker 0 sees.
            OSError: the backend cannot be read.
        """
        with ExitStack() as stack:
            folder, point = self._find_resume_point(stack) if rank == 0 else (None, ResumePoint())
            point = distributed.gather_objects(point)[0]
            if point.error:
                raise CheckpointError(point.error)
            self.unsound |= point.unsound
            if rank == 0:
                _notify(point, notify)
            elif point.name:
                folder = self._folder_of(point, rank, stack)
            yield folder

    def _find_resume_point(self, stack: ExitStack) -> tuple[Path | None, ResumePoint]:
        unsound: dict[str, str] = {}
        listing = self._listing()
        for name in reversed(listing):
            try:
                if META not in listing[name]:
                    raise DamagedError(name, INTERRUPTED)
                with ExitStack() as attempt:
                    folder = attempt.enter_context(self.backend.local(name))
                    meta = verify(folder)
                    stack.push(attempt.pop_all())
                return folder, ResumePoint(name, meta.files, unsound)
            except DamagedError as error:
                unsound[name] = error.reason
            except CheckpointError as error:
                return None, ResumePoint(error=str(error))
        # Only the very first save can leave nothing complete when it is interrupted.
        if not unsound or list(unsound.values()) == [INTERRUPTED]:
            return None, ResumePoint(unsound=unsound, error=self._former_error())
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unsound.items())
        return None, ResumePoint(
            error=f"no checkpoint in {self.backend.location!r} is sound ({reasons}): restore one from a copy, or give "
            "another --out to train from the start"
        )

    def _folder_of(self, point: ResumePoint, rank: int, stack: ExitStack) -> Path:
        """Return the folder of worker 0's resume point as this worker sees it."""
        try:
            folder = stack.enter_context(self.backend.local(point.name))
            same = verify(folder).files == point.files
            reason = "its content differs"
        except (DamagedError, FileNotFoundError) as error:
            same, reason = False, error.reason if isinstance(error, DamagedError) else "it is not there"
        if not same:
            raise CheckpointError(
                f"worker {rank} on {socket.gethostname()} does not see the checkpoint that worker 0 resumes from, "
                f"{self.backend.path(point.name)!r} ({reason}): --out has to be a folder that all machines share, or "
                "in an object store"
            )
        return folder

    def _listing(self) -> dict[str, set[str]]:
        """Return all folders of checkpoints in the order of their steps, with the names of their files."""
        found = {name: files for name, files in self.backend.listing().items() if NAME.fullmatch(name)}
        return dict(sorted(found.items(), key=lambda item: checkpoint_step(item[0])))

    def _former_error(self) -> str:
        former = sorted(name for name in self.backend.listing() if name.startswith(FORMER_PREFIX))
        if not former:
            return ""
        return (
            f"{self.backend.path(former[-1])!r} is a checkpoint of an earlier version, in a format that this one "
            "cannot read: use the version that made it, or give another --out to train from the start"
        )


def checkpoint_in(folder: Path) -> Path:
    """Return the checkpoint that a folder is, or of a finished run's folder the best one (the last where none is).

    A run's folder may have been moved: its checkpoints are looked for below it.

    Raises:
        CheckpointError: it is neither.
    """
    if (folder / META).exists():
        return folder
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint is {str(folder)!r}: there is no such folder")
    try:
        recorded = json.loads((folder / RESULT).read_bytes()).get("checkpoint")
    except (OSError, ValueError):
        raise CheckpointError(
            f"checkpoint is {str(folder)!r}: neither a checkpoint nor the --out of a finished stage"
        ) from None
    if not recorded:
        raise CheckpointError(
            f"checkpoint is {str(folder)!r}: that stage saved none; give the --out of pretrain or finetune"
        )
    below = folder / CHECKPOINTS / Path(recorded).name
    return below if below.exists() else Path(recorded)


def checkpoint_name(step: int) -> str:
    """Return the name of a step's checkpoint folder."""
    return f"step_{step:08d}"


def checkpoint_step(name: str) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(name.removeprefix("step_"))


def _notify(point: ResumePoint, notify: Callable[[str], None]) -> None:
    step = checkpoint_step(point.name) if point.name else 0
    outcome = f"resuming from the checkpoint of step {step}" if step else "starting from step 0"
    reasons = [f"checkpoint {name} is skipped: {reason}" for name, reason in point.unsound.items()]
    if reasons or point.name:
        notify("; ".join([*reasons, outcome]))
