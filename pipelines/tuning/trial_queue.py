"""The order in which Tune gets a sweep's trials, each one when it is its turn: as what it starts from is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ray.tune.search import Searcher

from pipelines import storage
from pipelines.config import SweepConfig
from pipelines.errors import UserError
from pipelines.running import progress
from pipelines.running.run_folder import RESULT, TRIALS
from pipelines.tuning import records
from pipelines.tuning.draws import Values
from pipelines.tuning.placement import Placement
from pipelines.tuning.population import Population
from pipelines.tuning.proposals import Proposals
from pipelines.tuning.records import Record
from pipelines.tuning.search_space import name_of
from pipelines.tuning.trials import Objective, TrialSettings, seeds_of, trial_of

TRIAL = "trial"
"""Key of Tune's settings that holds a trial."""
PRETRAINED, FAILURE, FAILED_IN, SECONDS = "pretrained", "failure", "failed_in", "seconds"
"""Of what a trial reports: that what it shares is pretrained; why it failed, and in which stage; how long it took."""


@dataclass
class Plan:
    """The trials of a sweep, as far as they are known: those to run, and what became of the others."""

    config: SweepConfig
    objective: Objective
    waiting: list[TrialSettings]
    """Those that are to run."""
    records: dict[str, Record]
    """What became of the others, by their folders."""
    inputs: Callable[[TrialSettings], Mapping[str, str]]
    """Gives the digests of what a trial reads."""
    proposals: Proposals | None = None
    """Where settings come from once none is waiting."""
    population: Population | None = None
    """Where the next generation comes from once the present one has ended."""

    @property
    def total(self) -> int:
        """Trials in all, those included that are yet to be proposed."""
        if self.population is not None:
            return self.population.total
        proposed = self.config.samples * self.config.seeds if self.proposals else 0
        return max(len(self.waiting) + len(self.records), proposed)

    @property
    def most_at_once(self) -> int:
        """Trials of which none waits for another to end."""
        return self.total if self.population is None else len(self.population.trials)


class TrialQueue(Searcher):
    """Gives Tune the trials of a plan one after another.

    Of trials that start from the same pretraining, one runs until that is done; the others have their turn then. Where
    it failed, they fail as well, without a start. The next generation of a population has its turn once the present one
    has ended.
    """

    def __init__(self, plan: Plan, placement: Placement) -> None:
        super().__init__(metric=plan.objective.metric, mode=plan.objective.mode)
        self._plan, self._placement = plan, placement
        self._running: dict[str, TrialSettings] = {}
        self._pretraining: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        self._seeds: dict[str, list[list[float]]] = {}
        for record in plan.records.values():
            self._tell(record.setting, record.values, self._reached(record.metrics | {SECONDS: record.seconds}))

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves it for a way to resume of its own; a sweep resumes from its records.
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: a sweep resumes from its records."""

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial, None while those left wait for others to end, or FINISHED where there is none."""
        while (trial := self._next()) is not None:
            try:
                placed = self._placement.placed(trial)
            except UserError as error:
                self._end_unstarted(trial, str(error))
                continue
            folder = trial.pretrained
            if folder and not storage.exists(storage.join(folder, RESULT)):
                self._pretraining[trial_id] = folder
            record = records.started(trial, self._plan.inputs(trial))
            self._plan.records[trial.out] = records.write(trial, record)
            self._running[trial_id] = trial
            return {TRIAL: placed}
        waits = self._plan.waiting or (self._plan.population is not None and self._running)
        return None if waits else Searcher.FINISHED

    def _next(self) -> TrialSettings | None:
        """Take the first trial that can start."""
        waiting = self._plan.waiting
        if not waiting:
            self._propose()
        if not waiting and not self._running and self._plan.population is not None:
            waiting += self._plan.population.advance(self._plan.records)
        for trial in list(waiting):
            if reason := self._failed.get(trial.pretrained):
                waiting.remove(trial)
                self._end_unstarted(trial, f"its pretraining failed in another trial: {reason}")
            elif trial.pretrained not in self._pretraining.values():
                waiting.remove(trial)
                return trial
        return None

    def _propose(self) -> None:
        """Put the trials of a proposed setting into the queue, one for each seed."""
        proposals, config = self._plan.proposals, self._plan.config
        while proposals is not None and not self._plan.waiting and (values := proposals.ask()) is not None:
            try:
                self._plan.waiting += [trial_of(config, values, seed) for seed in seeds_of(config)]
            except UserError as error:
                # Values that do not fit together, each of which alone would. Without settings it has no file either.
                setting = name_of(values)
                record = records.failed(Record(setting, seeds_of(config).start, values), str(error))
                self._plan.records[storage.join(storage.absolute(config.out), TRIALS, setting)] = record
                progress.info("sweep", f"trial {setting} failed: {record.failure}")
                proposals.tell(values, [])

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Let those start that wait for what this trial has pretrained."""
        if result.get(PRETRAINED):
            self._pretraining.pop(trial_id, None)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Let those start that wait for this trial, and tell TPE what it reached."""
        trial, found = self._running.pop(trial_id), result or {}
        folder = self._pretraining.pop(trial_id, "")
        if folder and found.get(FAILED_IN) == "pretrain":
            self._failed[folder] = str(found[FAILURE])
        self._tell(trial.setting, trial.values, [] if error or FAILURE in found else self._reached(found))

    def _end_unstarted(self, trial: TrialSettings, reason: str) -> None:
        """Record that a trial failed before it could start."""
        record = records.failed(records.started(trial, self._plan.inputs(trial)), reason)
        self._plan.records[trial.out] = records.write(trial, record)
        progress.info("sweep", f"trial {trial.name} failed: {record.failure}")
        self._tell(trial.setting, trial.values, [])

    def _reached(self, found: Mapping[str, Any]) -> list[float]:
        """Return what a trial is judged by; nothing where it has not got so far."""
        names = [self._plan.objective.metric] + ([SECONDS] if self._plan.config.against_seconds else [])
        values = [found.get(name) for name in names]
        return [float(value) for value in values if value is not None] if None not in values else []

    def _tell(self, setting: str, values: Values, reached: list[float]) -> None:
        """Tell TPE the mean over a setting's seeds once they all have ended."""
        if self._plan.proposals is None:
            return
        ended = self._seeds.setdefault(setting, [])
        ended.append(reached)
        if len(ended) == self._plan.config.seeds:
            means = [fmean(column) for column in zip(*(each for each in ended if each), strict=True)]
            self._plan.proposals.tell(values, means)
