"""Population-based training (arXiv 1711.09846): members that take over the weights of better ones in mid-run.

A member trains in parts, from one evaluation to the next. Each part is a trial like any other, in a folder of its own,
so that its settings are those that it was trained with; it begins from a copy of a checkpoint. What follows from a
generation depends on its records and the seed alone: a sweep that was ended decides the same again, unless a member
that failed succeeds when it is tried again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines import storage
from pipelines.config import SweepConfig, override
from pipelines.errors import StageError, UserError
from pipelines.running import progress
from pipelines.running.run_folder import CHECKPOINTS, TRIALS
from pipelines.storage.checkpoint_backend import checkpoint_backend, copy_latest
from pipelines.tuning import records
from pipelines.tuning.draws import Values, as_setting, drawn, settings_of
from pipelines.tuning.records import Record
from pipelines.tuning.search_space import Choice, Dimension, text_of
from pipelines.tuning.trials import Objective, TrialSettings, seeds_of, trial_of

ADJUSTABLE = (
    *("optim.lr", "optim.weight_decay", "optim.clip_norm"),
    *("lsmcl.mask_ratio", "lsmcl.temperature"),
    *("views.flip", "views.jitter", "views.jitter_share", "views.grey"),
)
"""Settings that may change in mid-run: neither the weights' shapes nor the order of clips depend on them."""
QUANTILE = 0.25
"""Share of the members that is replaced, and that replaces them."""
REDRAWN = 0.25
"""Share of taken-over values that are drawn anew; the others go up or down by `FACTOR`, or to a neighbouring choice."""
FACTOR = 1.2


def first_settings(config: SweepConfig, dimensions: Mapping[str, Dimension]) -> list[Values]:
    """Return the values that members begin with.

    Raises:
        UserError: the space has a setting that cannot change in mid-run, or fewer settings than members.
    """
    for key in dimensions:
        if key.removeprefix(f"{config.stages}.") not in ADJUSTABLE:
            raise UserError(
                f"space has {key}: search pbt changes settings in mid-run, which this one does not allow; give some of "
                f"{', '.join(ADJUSTABLE)}, or another --search"
            )
    found = settings_of(config, dimensions)
    if len(found) < config.samples:
        raise UserError(
            f"samples is {config.samples}: the space has about {len(found)} settings only, and each member begins with "
            "another one; give fewer samples or more values"
        )
    return found


class Population:
    """The members of a population, generation by generation.

    Args:
        config: the sweep.
        dimensions: its space.
        objective: what members are compared by.

    Raises:
        UserError: as `first_settings`.
    """

    def __init__(self, config: SweepConfig, dimensions: Mapping[str, Dimension], objective: Objective) -> None:
        self._config, self._dimensions, self._objective = config, dimensions, objective
        loop = getattr(config, config.stages).loop
        self.ends = [*range(loop.evaluate_every, loop.epochs, loop.evaluate_every), loop.epochs]
        """Epochs after which generations end."""
        first = first_settings(config, dimensions)
        self.trials = [self._part(number, values, self.ends[0]) for number, values in enumerate(first)]
        """Those of the present generation, by member."""
        self._past: list[list[TrialSettings]] = []

    @property
    def total(self) -> int:
        """Trials of all generations."""
        return len(self.trials) * len(self.ends)

    def resume(self) -> dict[str, Record]:
        """Move on to the last generation that an earlier start has begun, and return all records that are there.

        What failed is tried again only where the next generation has not begun.
        """
        found: dict[str, Record] = {}
        while here := self._records():
            found |= here
            trials = self.trials
            ended = len(here) == len(trials) and all(record.status in records.ENDED for record in here.values())
            if not self._move_on(here):
                break
            if not ended and not self._records():
                self.trials = self._past.pop()
                break
        return found

    def advance(self, known: dict[str, Record]) -> list[TrialSettings]:
        """Return the trials of the next generation; none after the last one, or where no member has reached anything.

        Checkpoints of the generations before the one that has ended are deleted.

        Args:
            known: records, of which those of deleted checkpoints are replaced.
        """
        if not self._move_on(self._records()):
            return []
        sources = {trial.out: trial for trial in self._past[-1]}
        for trial in self.trials:
            source = sources[trial.start]
            if source.setting != trial.setting:
                values = ", ".join(f"{key} {text_of(value)}" for key, value in trial.values.items())
                progress.info("sweep", f"{trial.setting} takes over {source.name}, and goes on with {values}")
        while len(self._past) > 1:
            for trial in self._past.pop(0):
                _delete_checkpoints(trial)
                if record := known.get(trial.out):
                    known[trial.out] = records.write(trial, replace(record, checkpoint=""))
        return self.trials

    def _records(self) -> dict[str, Record]:
        """Return the records of the present generation that are there."""
        paths = {trial.out: records.path_of(trial) for trial in self.trials}
        return {out: records.read(path) for out, path in paths.items() if storage.exists(path)}

    def _move_on(self, here: Mapping[str, Record]) -> bool:
        """Decide on the next generation from the records of the present one; return whether there is one."""
        generation = self.ends.index(self.trials[0].epoch) + 1
        reached = [self._reached(here.get(trial.out)) for trial in self.trials]
        if generation == len(self.ends) or all(map(math.isinf, reached)):
            return False
        ranked = sorted(range(len(reached)), key=lambda number: reached[number])
        count = min(math.ceil(QUANTILE * len(ranked)), len(ranked) // 2)
        best = [number for number in ranked[:count] if math.isfinite(reached[number])]
        following = []
        for number, trial in enumerate(self.trials):
            source, values = trial, trial.values
            if number in ranked[-count:] or math.isinf(reached[number]):
                draw = random.Random(f"{self._config.seed} {generation} {number}")
                source = self.trials[draw.choice(best)]
                values = self._explored(source.values, draw)
            following.append(self._part(number, values, self.ends[generation], source.out))
        self._past.append(self.trials)
        self.trials = following
        return True

    def _reached(self, record: Record | None) -> float:
        """Return what a trial is ranked by, the lowest first; infinity where it failed."""
        value = record.metrics.get(self._objective.metric) if record and record.status == "finished" else None
        if value is None or not math.isfinite(value):
            return math.inf
        return value if self._objective.mode == "min" else -value

    def _explored(self, values: Values, draw: random.Random) -> Values:
        """Return values near others, some of them drawn anew (the paper's `explore`)."""
        return {key: self._near(key, dimension, values[key], draw) for key, dimension in self._dimensions.items()}

    def _near(self, key: str, dimension: Dimension, value: Any, draw: random.Random) -> Any:
        if draw.random() < REDRAWN:
            return drawn(self._config, key, dimension, draw)
        up = draw.random() < 0.5
        if isinstance(dimension, Choice):
            place = dimension.values.index(value) + (1 if up else -1)
            return dimension.values[min(max(place, 0), len(dimension.values) - 1)]
        return as_setting(self._config, key, dimension, value * FACTOR if up else value / FACTOR)

    def _part(self, number: int, values: Values, end: int, start: str = "") -> TrialSettings:
        """Return the trial of a member up to an epoch.

        Args:
            number: the member's.
            values: its values.
            end: the epoch.
            start: folder of the trial that it goes on from.
        """
        stage: str = self._config.stages
        whole = trial_of(self._config, values, seeds_of(self._config).start)
        settings = override(whole.stages[stage], {"loop.stop_after_epoch": end % self.ends[-1]})
        member = f"member={number:0{len(str(self._config.samples - 1))}d}"
        part = replace(whole, name=f"{member},epoch={end}", setting=member, stages={stage: settings})
        folder = storage.join(storage.absolute(self._config.out), TRIALS, f"{member},{part.length}")
        placed = {stage: replace(settings, out=storage.join(folder, stage))}
        return replace(part, out=folder, stages=placed, epoch=end, start=start)


def begin(trial: TrialSettings) -> None:
    """Give a trial of a population, where it goes on, a copy of the checkpoint that it begins from.

    Raises:
        StageError: there is none.
    """
    for stage, settings in trial.stages.items() if trial.start else ():
        source = storage.join(trial.start, stage, CHECKPOINTS)
        if not copy_latest(source, storage.join(settings.out, CHECKPOINTS)):
            raise StageError(f"there is no checkpoint in {source!r} to go on from: give another --out")


def line_of(trial: Record, known: Mapping[str, Record]) -> list[Record]:
    """Return the records of the parts that made a member's weights, the first one first.

    Args:
        trial: the last part.
        known: all records, by their folders.
    """
    found = [trial]
    while found[0].start:
        found.insert(0, known[found[0].start])
    return found


def _delete_checkpoints(trial: TrialSettings) -> None:
    for settings in trial.stages.values():
        backend = checkpoint_backend(storage.join(settings.out, CHECKPOINTS))
        for name in backend.listing():
            backend.remove(name)
