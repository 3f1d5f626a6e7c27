"""The space of a sweep as text: `key=1,2,3`, `key=[1,2],[3]`, `key=uniform(a,b)`, `key=loguniform(a,b)`."""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_origin

from pipelines.config import FinetuneConfig, PretrainConfig, SweepConfig, flatten, override, unknown
from pipelines.config.dotted import hints
from pipelines.errors import UserError

Value = str | tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """Every one of some values; a list, as of a setting of several values, is a tuple."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Range:
    """A number drawn between two bounds."""

    low: float
    high: float
    log: bool


Dimension = Choice | Range
# Drawn values are rounded to this many digits, and names and their parts cut to these lengths: a name is also a folder,
# for which file systems allow 255 bytes; Ray Tune puts a trial's id of 11 before it.
DRAWN_DIGITS = 4
NAME_PART = 40
NAME_LENGTH = 200
RANGE = re.compile(r"(uniform|loguniform)\(\s*([^,\s]+)\s*,\s*([^,\s]+)\s*\)")

SEPARATOR = re.compile(r",(?![^\[\]]*\])")
"""A comma that stands in no brackets."""


def parse(config: SweepConfig) -> dict[str, Dimension]:
    """Return the dimensions of a sweep by their keys.

    Raises:
        UserError: an entry that cannot be read, or a key that comes twice or that no swept stage has (names the
            closest).
    """
    dimensions: dict[str, Dimension] = {}
    known = dict.fromkeys(
        key for stage in stages(config) for key in (*_leaves(config, stage), *_leaves(config, stage, stage))
    )
    for entry in config.space:
        key, _, text = entry.partition("=")
        key = key.strip().replace("-", "_")
        if not text.strip(" ,"):
            raise UserError(f"space is {entry!r}: write key=value,value or key=uniform(low,high)")
        if key not in known:
            raise UserError(f"space is {entry!r}: {unknown('setting', key, known)}")
        if key in dimensions:
            raise UserError(f"space is {entry!r}: {key} is there already; give all its values in one entry")
        dimensions[key] = _dimension(entry, text)
    return dimensions


def stages(config: SweepConfig) -> list[str]:
    """Return the stages that a trial runs, in order."""
    return config.stages.split("+")


def _leaves(config: SweepConfig, stage: str, prefix: str = "") -> list[str]:
    own: PretrainConfig | FinetuneConfig = getattr(config, stage)
    return [f"{prefix}.{key}" if prefix else key for key in flatten(own)]


def _dimension(entry: str, text: str) -> Dimension:
    match = RANGE.fullmatch(text.strip())
    if match is None:
        return Choice(_values(entry, text))
    try:
        low, high = float(match[2]), float(match[3])
    except ValueError:
        raise UserError(f"space is {entry!r}: the bounds of a range are numbers") from None
    log = match[1] == "loguniform"
    if not low < high or (log and low <= 0):
        raise UserError(f"space is {entry!r}: give low < high{', both above 0' if log else ''}")
    return Range(low, high, log)


def _values(entry: str, text: str) -> tuple[Value, ...]:
    """Return the values between the commas of a text; what stands in brackets is a list."""
    parts = [part.strip() for part in SEPARATOR.split(text) if part.strip()]
    values: list[Value] = []
    for part in parts:
        inner = part[1:-1] if part.startswith("[") and part.endswith("]") else None
        if any(bracket in (part if inner is None else inner) for bracket in "[]"):
            raise UserError(f"space is {entry!r}: write a list as [value,value], and a comma between two lists")
        values.append(part if inner is None else tuple(v.strip() for v in inner.split(",") if v.strip()))
    return tuple(values)


def combinations(dimensions: Mapping[str, Dimension]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the choices; a range stands at its two ends."""
    values = [d.values if isinstance(d, Choice) else (d.low, d.high) for d in dimensions.values()]
    for combination in itertools.product(*values):
        yield dict(zip(dimensions, combination, strict=True))


def trials(config: SweepConfig, dimensions: Mapping[str, Dimension]) -> list[dict[str, Any]]:
    """Return the values of every trial, each trial once; the same space, samples and seed give the same ones.

    Without a range these are the combinations of the choices; with one, each of them `samples` times, with new draws.
    """
    draw = random.Random(config.seed)
    choices = {key: d for key, d in dimensions.items() if isinstance(d, Choice)}
    found: dict[str, dict[str, Any]] = {}
    for _ in range(1 if len(choices) == len(dimensions) else config.samples):
        for chosen in combinations(choices):
            values = {k: chosen[k] if isinstance(d, Choice) else _drawn(d, draw) for k, d in dimensions.items()}
            found.setdefault(name_of(values), values)
    return list(found.values())


def _drawn(dimension: Range, draw: random.Random) -> float:
    low, high = dimension.low, dimension.high
    value = low * (high / low) ** draw.random() if dimension.log else low + (high - low) * draw.random()
    return min(max(float(f"{value:.{DRAWN_DIGITS}g}"), low), high)


def configured(config: SweepConfig, stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes that a trial's values make to one of its stages; a single value is a list of one as well."""
    types = hints(getattr(config, stage))
    changes = {key: value for key, value in values.items() if key in types}
    changes |= {key.removeprefix(f"{stage}."): v for key, v in values.items() if key.startswith(f"{stage}.")}
    of_lists = {key for key in changes if get_origin(types[key]) is tuple}
    return {key: (v,) if key in of_lists and not isinstance(v, tuple) else v for key, v in changes.items()}


def check(config: SweepConfig, dimensions: Mapping[str, Dimension]) -> None:
    """Apply every combination to its stages' settings; raise `UserError` for the first that is not valid."""
    for values in combinations(dimensions):
        for stage in stages(config):
            override(getattr(config, stage), configured(config, stage, values))


def name_of(values: Mapping[str, Any]) -> str:
    """Return a trial's name, which is also its folder: `mask_ratio=0.5,frames=8`; other values, another name."""
    parts = {key: "+".join(map(str, v)) if isinstance(v, tuple) else str(v) for key, v in values.items()}
    name = ",".join(f"{key.rpartition('.')[2]}={_in_name(part)}" for key, part in parts.items())
    if len(name) <= NAME_LENGTH:
        return name
    # The names of the last values are cut off: a checksum of all of them tells two trials apart.
    whole = repr(sorted((key, text_of(value)) for key, value in values.items()))
    return f"{name[:NAME_LENGTH]}-{zlib.crc32(whole.encode()):08x}"


def text_of(value: Any) -> str:
    """Return a trial's value as a text for people: a list as `[0.5,0.7]`."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _in_name(text: str) -> str:
    clean = re.sub(r"[^0-9A-Za-z.+-]", "_", text)
    if clean == text and len(text) <= NAME_PART:
        return text
    # Such as two paths that differ in what a name cannot hold: a checksum tells them apart.
    return f"{clean[-NAME_PART:]}-{zlib.crc32(text.encode()):08x}"
