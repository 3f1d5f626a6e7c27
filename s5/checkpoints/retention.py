"""Which checkpoints of a run are sound, which is the best, which is gone on from, and which go."""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from s5 import distributed
from s5.checkpoints.backend import Store
from s5.checkpoints.checkpoint import META, Meta, parse_meta, verify
from s5.errors import CheckpointError, DamagedError

NAME = re.compile(r"step_(\d{8,})")
# Folders of layout 1, which Ray Train named.
FORMER = "checkpoint_"
CUT = f"its save was cut short (no {META})"


@dataclass(frozen=True)
class Choice:
    """The checkpoint that all workers go on from."""

    name: str = ""
    """Of its folder; empty to start from the beginning."""
    files: dict[str, str] = field(default_factory=dict)
    """Digests of its files."""
    passed: dict[str, str] = field(default_factory=dict)
    """Later checkpoints that are not sound, and why."""
    error: str = ""
    """Why there is nothing to go on from, though there should be."""


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    store: Store
    keep: int = 2
    """How many of the last ones are kept."""
    best: tuple[str, str] | None = None
    """Metric of the evaluation by which the best one is kept too, and `max` or `min`."""
    passed: dict[str, str] = field(default_factory=dict)
    """Those found not to be sound, and why; they go after the next one that is saved."""

    def metas(self) -> dict[str, Meta]:
        """Return what the complete checkpoints say of themselves, by name, the latest last.

        Raises:
            OSError: the store cannot be read.
        """
        found = {}
        for name, files in self._listing().items():
            if META not in files or name in self.passed:
                continue
            try:
                found[name] = parse_meta(self.store.read(name, META), self.store.path(name))
            except DamagedError as error:
                self.passed[name] = error.reason
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
        """Make room for a checkpoint: what cut saves have left goes, and what has its name.

        Raises:
            OSError: the store fails.
        """
        for other, files in self._listing().items():
            if META not in files or other == name:
                self.store.remove(other)
                self.passed.pop(other, None)

    def prune(self) -> None:
        """Delete what need not be kept; to be called after a checkpoint was saved, which is sound.

        Raises:
            OSError: the store fails.
        """
        metas = self.metas()
        kept = {*list(metas)[-self.keep :]}
        if best := self.best_of(metas):
            kept.add(best[0])
        for name in self._listing():
            if name not in kept:
                self.store.remove(name)
                self.passed.pop(name, None)

    @contextmanager
    def resumed(self, rank: int, tell: Callable[[str], None]) -> Iterator[Path | None]:
        """Give the folder of the checkpoint to go on from, on all workers the same; None from the beginning.

        Worker 0 takes the latest whose files are what was saved, and tells which it passed over. Every worker has to
        call it.

        Raises:
            CheckpointError: there were checkpoints and none is sound, or they are of another layout, or this worker
                does not see what worker 0 does.
            OSError: the store cannot be read.
        """
        with ExitStack() as stack:
            folder, choice = self._choose(stack) if rank == 0 else (None, Choice())
            choice = distributed.gather_objects(choice)[0]
            if choice.error:
                raise CheckpointError(choice.error)
            self.passed |= choice.passed
            if rank == 0:
                _tell(choice, tell)
            elif choice.name:
                folder = self._same(choice, rank, stack)
            yield folder

    def _choose(self, stack: ExitStack) -> tuple[Path | None, Choice]:
        passed: dict[str, str] = {}
        listing = self._listing()
        for name in reversed(listing):
            try:
                if META not in listing[name]:
                    raise DamagedError(name, CUT)
                with ExitStack() as attempt:
                    folder = attempt.enter_context(self.store.local(name))
                    meta = verify(folder)
                    stack.push(attempt.pop_all())
                return folder, Choice(name, meta.files, passed)
            except DamagedError as error:
                passed[name] = error.reason
            except CheckpointError as error:
                return None, Choice(error=str(error))
        # The very first save may be cut; later there is a complete one before it.
        if not passed or list(passed.values()) == [CUT]:
            return None, Choice(passed=passed, error=self._former())
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed.items())
        return None, Choice(
            error=f"no checkpoint in {self.store.place!r} is sound ({reasons}): put a copy of one back, or give "
            "another --out to train from the start"
        )

    def _same(self, choice: Choice, rank: int, stack: ExitStack) -> Path:
        """Return another worker's choice as this one sees it."""
        try:
            folder = stack.enter_context(self.store.local(choice.name))
            same = verify(folder).files == choice.files
            reason = "it is another one"
        except (DamagedError, FileNotFoundError) as error:
            same, reason = False, error.reason if isinstance(error, DamagedError) else "it is not there"
        if not same:
            raise CheckpointError(
                f"worker {rank} on {socket.gethostname()} does not see the checkpoint that worker 0 resumes from, "
                f"{self.store.path(choice.name)!r} ({reason}): --out has to be a folder that all machines share, or in "
                "an object store"
            )
        return folder

    def _listing(self) -> dict[str, set[str]]:
        """Return all folders of checkpoints, by their steps, with the names of their files."""
        found = {name: files for name, files in self.store.listing().items() if NAME.fullmatch(name)}
        return dict(sorted(found.items(), key=lambda item: step_of(item[0])))

    def _former(self) -> str:
        former = sorted(name for name in self.store.listing() if name.startswith(FORMER))
        if not former:
            return ""
        return (
            f"{self.store.path(former[-1])!r} is a checkpoint of an earlier version, in a layout that this one cannot "
            "read: use the version that made it, or give another --out to train from the start"
        )


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Return the step that a checkpoint's name says."""
    return int(name.removeprefix("step_"))


def _tell(choice: Choice, tell: Callable[[str], None]) -> None:
    onward = f"going on from the checkpoint of step {step_of(choice.name)}" if choice.name else "starting from step 0"
    reasons = [f"checkpoint {name} is passed over: {reason}" for name, reason in choice.passed.items()]
    if reasons or choice.name:
        tell("; ".join([*reasons, onward]))
