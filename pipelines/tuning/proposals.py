"""Settings that Optuna's TPE proposes from what the earlier ones reached (package `optuna`, imported only here)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config import SweepConfig
from pipelines.errors import UserError
from pipelines.tuning.draws import Values, as_setting
from pipelines.tuning.search_space import Choice, Dimension, name_of, text_of
from pipelines.tuning.trials import Objective

RANDOM_SHARE = 1 / 3
"""Share of the settings that are drawn before TPE has something to go by, and their most."""
RANDOM_MOST = 10
REPEATS = 100
"""Proposals in a row that have been tried, after which a small space is taken to be used up."""


class Proposals:
    """The settings of a search by TPE: asked for one after another, told what they reached.

    Args:
        config: the sweep.
        dimensions: its space.
        objective: what settings are compared by.

    Raises:
        UserError: the package is missing.
    """

    def __init__(self, config: SweepConfig, dimensions: Mapping[str, Dimension], objective: Objective) -> None:
        self._config, self._dimensions = config, dimensions
        try:
            self._optuna: Any = importlib.import_module("optuna")
        except ModuleNotFoundError:
            raise UserError(
                "search is 'tpe': the package optuna is missing; install the extra, pip install 's5-video[optuna]', or "
                "give --search random"
            ) from None
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        directions = ["minimize" if objective.mode == "min" else "maximize"]
        directions += ["minimize"] if config.against_seconds else []
        at_random = max(2, min(RANDOM_MOST, round(config.samples * RANDOM_SHARE)))
        # Settings that are being tried count as poor ones, so that those asked for beside them differ.
        sampler = self._optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=at_random, constant_liar=True)
        self._study = self._optuna.create_study(directions=directions, sampler=sampler)
        self._distributions = {key: self._distribution(dimension) for key, dimension in dimensions.items()}
        self._asked: dict[str, Any] = {}

    def _distribution(self, dimension: Dimension) -> Any:
        kinds = self._optuna.distributions
        if isinstance(dimension, Choice):
            return kinds.CategoricalDistribution([text_of(value) for value in dimension.values])
        if dimension.whole:
            return kinds.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
        return kinds.FloatDistribution(dimension.low, dimension.high, log=dimension.log)

    def begun(self, values: Values) -> None:
        """Count a setting that an earlier start has begun."""
        numbers = {key: value[0] if isinstance(value, tuple) else value for key, value in values.items()}
        texts = {key: text_of(values[key]) for key, d in self._dimensions.items() if isinstance(d, Choice)}
        self._study.enqueue_trial(numbers | texts)
        self._asked[name_of(values)] = self._study.ask(self._distributions)

    def ask(self) -> Values | None:
        """Return a new setting; None once there are `samples` of them, or the space holds no more."""
        for _ in range(REPEATS if len(self._asked) < self._config.samples else 0):
            trial = self._study.ask(self._distributions)
            values = {key: self._value(key, trial.params[key]) for key in self._dimensions}
            if name_of(values) not in self._asked:
                self._asked[name_of(values)] = trial
                return values
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return None

    def tell(self, values: Values, reached: Sequence[float]) -> None:
        """Tell what a setting reached: the metric and, where it is weighed against them, the seconds.

        Args:
            values: the setting.
            reached: nothing where it failed.
        """
        trial = self._asked[name_of(values)]
        if reached and all(math.isfinite(value) for value in reached):
            self._study.tell(trial, list(reached))
        else:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def _value(self, key: str, proposed: Any) -> Any:
        dimension = self._dimensions[key]
        if isinstance(dimension, Choice):
            return next(value for value in dimension.values if text_of(value) == proposed)
        return as_setting(self._config, key, dimension, proposed)
