"""What a sweep's settings make it run."""

from __future__ import annotations

from typing import Any

from pipelines.config import SweepConfig
from pipelines.tuning import draws, search_space, trials


def values_of(*entries: str, **changes: Any) -> list[dict[str, Any]]:
    config = SweepConfig(space=entries, **changes)
    return draws.settings_of(config, search_space.parse(config))


def trials_of(config: SweepConfig) -> list[trials.TrialSettings]:
    settings = draws.settings_of(config, search_space.parse(config))
    return [trials.trial_of(config, values, seed) for seed in trials.seeds_of(config) for values in settings]
