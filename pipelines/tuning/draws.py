"""Which settings a grid or a random search tries; the same space, samples and seed give the same ones."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_origin

from pipelines.config import SweepConfig
from pipelines.config.dotted import hints
from pipelines.errors import UserError
from pipelines.tuning.search_space import Choice, Dimension, Range, name_of, stages

Values = dict[str, Any]
"""A setting: a value for each key of the space."""
DRAWN_DIGITS = 4
"""Digits that drawn values have, counted from the largest that varies in their range."""
DRAWN = ("random", "pbt")
"""Searches that draw `samples` settings."""
MOST = 1000
"""Settings that a grid may have."""
DRAWS_A_SAMPLE = 100
"""Draws after which a random search takes it that all of a small space has been drawn."""


def combinations(dimensions: Mapping[str, Dimension]) -> Iterator[Values]:
    """Yield every combination of the choices."""
    values = [dimension.values for dimension in dimensions.values() if isinstance(dimension, Choice)]
    keys = [key for key, dimension in dimensions.items() if isinstance(dimension, Choice)]
    for combination in itertools.product(*values):
        yield dict(zip(keys, combination, strict=True))


def check_size(config: SweepConfig, dimensions: Mapping[str, Dimension]) -> None:
    """Check that a grid has no more settings than anyone would run, and that a weight has an effect.

    Raises:
        UserError: gives the number, and the search that takes some of them.
    """
    choices = [dimension for dimension in dimensions.values() if isinstance(dimension, Choice)]
    count = math.prod(len(choice.values) for choice in choices)
    count *= config.samples if len(choices) < len(dimensions) else 1
    if config.search == "grid" and count > MOST:
        raise UserError(
            f"the space has {count} combinations, and a grid runs each of them, up to {MOST}: give --search random "
            "--samples N for N of them at random, or fewer values"
        )
    if config.search not in DRAWN and any(choice.weights for choice in choices):
        raise UserError(f"search is {config.search!r}: weights say how often a value is drawn; give --search random")
    if config.search == "grid" and config.samples > 1 and len(choices) == len(dimensions):
        raise UserError(
            f"samples is {config.samples}: a grid of single values has nothing to draw; give --search random, or "
            "--seeds to repeat each setting"
        )


def settings_of(config: SweepConfig, dimensions: Mapping[str, Dimension], known: Sequence[Values] = ()) -> list[Values]:
    """Return the settings of a grid or a random search, each once.

    Args:
        config: the sweep.
        dimensions: its space.
        known: settings in that space that an earlier start has begun; they come first, and count as samples.
    """
    found = {name_of(values): values for values in known}
    if config.search in DRAWN:
        draw = random.Random(config.seed)
        tries = 0
        while len(found) < config.samples and tries < DRAWS_A_SAMPLE * config.samples:
            values = {key: drawn(config, key, dimension, draw) for key, dimension in dimensions.items()}
            found.setdefault(name_of(values), values)
            tries += 1
        return list(found.values())
    choices = {key: d for key, d in dimensions.items() if isinstance(d, Choice)}
    samples = 1 if len(choices) == len(dimensions) else config.samples
    for chosen in combinations(choices):
        # From a seed of its own: one more value of a choice leaves the draws of the others as they are.
        draw, tries = random.Random(f"{config.seed} {name_of(chosen)}"), 0
        count = sum(all(values[key] == chosen[key] for key in chosen) for values in known)
        while count < samples and tries < DRAWS_A_SAMPLE * samples:
            values = {k: chosen[k] if k in choices else drawn(config, k, d, draw) for k, d in dimensions.items()}
            count += name_of(values) not in found
            found.setdefault(name_of(values), values)
            tries += 1
    return list(found.values())


def drawn(config: SweepConfig, key: str, dimension: Dimension, draw: random.Random) -> Any:
    """Draw a value of a dimension."""
    if isinstance(dimension, Choice):
        return draw.choices(dimension.values, dimension.weights or None)[0]
    low, high = dimension.low, dimension.high
    if dimension.whole:
        # Each whole number has the stretch up to the next one.
        high += 1
    number = low * (high / low) ** draw.random() if dimension.log else low + (high - low) * draw.random()
    return as_setting(config, key, dimension, number)


def as_setting(config: SweepConfig, key: str, dimension: Range, number: float) -> Any:
    """Return a number of a range as its setting has it: rounded, within the bounds, in a list where it is a list."""
    rounded: float = math.floor(number)
    if not dimension.whole:
        size = number if dimension.log else dimension.high - dimension.low
        rounded = round(number, DRAWN_DIGITS - 1 - math.floor(math.log10(abs(size))))
    value: float = min(max(rounded, dimension.low), dimension.high)
    value = int(value) if dimension.whole else value
    types = {name: hint for stage in stages(config) for name, hint in hints(getattr(config, stage)).items()}
    own = key if key in types else key.partition(".")[2]
    return (value,) if get_origin(types[own]) is tuple else value
