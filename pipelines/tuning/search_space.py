"""The space of a sweep as text: `key=1,2,3`, `key=[1,2],[3]`, and in place of the values `uniform(a,b)`,
`loguniform(a,b)` or `choice(value:weight,value:weight)`."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pipelines.config import FinetuneConfig, PretrainConfig, SweepConfig, unknown
from pipelines.config.dotted import convert, hints
from pipelines.errors import UserError


@dataclass(frozen=True)
class Choice:
    """Every one of some values, which are as their setting has them."""

    values: tuple[Any, ...]
    weights: tuple[float, ...] = ()
    """How often each is drawn, in proportion; empty for all alike."""


@dataclass(frozen=True)
class Range:
    """A number drawn between two bounds; both are included."""

    low: float
    high: float
    log: bool
    whole: bool = False
    """Whether it is a whole number, as its setting is."""


Dimension = Choice | Range
# Names and their parts are cut to these lengths: a name is also a folder, for which file systems allow 255 bytes; Ray
# Tune puts a trial's id of 11 before it, and the epochs come behind.
NAME_PART = 40
NAME_LENGTH = 180
FORM = re.compile(r"(uniform|loguniform|choice)\((.*)\)")
FORMS = "key=value,value or key=uniform(low,high), loguniform(low,high) or choice(value:weight,value:weight)"

SEPARATOR = re.compile(r",(?![^\[\]]*\])")
"""A comma that stands in no brackets."""


def parse(config: SweepConfig) -> dict[str, Dimension]:
    """Return the dimensions of a sweep by their keys.

    Raises:
        UserError: an entry that cannot be read, a value that its setting does not take, or a key that comes twice, that
            the sweep sets itself or that no swept stage has (names the closest).
    """
    dimensions: dict[str, Dimension] = {}
    known = _known(config)
    for entry in config.space:
        key, _, text = entry.partition("=")
        key = key.strip().replace("-", "_")
        if not text.strip(" ,"):
            raise UserError(f"space is {entry!r}: write {FORMS}")
        if key not in known:
            raise UserError(f"space is {entry!r}: {_of_another_stage(config, key) or unknown('setting', key, known)}")
        if key in dimensions:
            raise UserError(f"space is {entry!r}: {key} is there already; give all its values in one entry")
        _check_free(config, entry, key)
        try:
            dimensions[key] = _dimension(entry, text.strip(), key, known[key])
        except UserError as error:
            named = str(error).startswith("space is ")
            raise UserError(str(error) if named else f"space is {entry!r}: {error}") from None
    return dimensions


def listed(config: SweepConfig) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the type and the values, in order, of each setting whose values a sweep's space lists.

    Raises:
        UserError: as `parse`.
    """
    known, dimensions = _known(config), parse(config)
    return {key: (known[key], found.values) for key, found in dimensions.items() if isinstance(found, Choice)}


def stages(config: SweepConfig) -> list[str]:
    """Return the stages that a trial runs, in order."""
    return config.stages.split("+")


def _known(config: SweepConfig) -> dict[str, Any]:
    """Return the types of all settings of the swept stages, under their keys alone and with the stage before them."""
    own: dict[str, PretrainConfig | FinetuneConfig] = {stage: getattr(config, stage) for stage in stages(config)}
    types = {stage: hints(settings) for stage, settings in own.items()}
    known = {key: hint for each in reversed(types.values()) for key, hint in each.items()}
    return known | {f"{stage}.{key}": hint for stage, each in types.items() for key, hint in each.items()}


def _of_another_stage(config: SweepConfig, key: str) -> str:
    """Return what is said of a setting that only a stage has which the sweep does not run; empty for others."""
    for stage in ("pretrain", "finetune"):
        if stage not in stages(config) and key.removeprefix(f"{stage}.") in hints(getattr(config, stage)):
            return f"{key} is a setting of {stage}, which --stages {config.stages} leaves out; give pretrain+finetune"
    return ""


def _check_free(config: SweepConfig, entry: str, key: str) -> None:
    """Raise `UserError` for a setting that the sweep itself gives to its trials."""
    own = re.sub(r"^(pretrain|finetune)\.", "", key)
    if own == "loop.seed":
        raise UserError(f"space is {entry!r}: seeds are an axis of their own; give --seeds N, from loop.seed on")
    if own == "loop.stop_after_epoch":
        raise UserError(f"space is {entry!r}: trials train to their end, for comparison; leave it out")
    if own == "checkpoint" and len(stages(config)) > 1:
        raise UserError(f"space is {entry!r}: trials fine-tune what they pretrain; give --stages finetune")
    if own == "out" or own.startswith("tracking."):
        raise UserError(f"space is {entry!r}: each trial has its own; leave it out")


def _dimension(entry: str, text: str, key: str, hint: Any) -> Dimension:
    match = FORM.fullmatch(text)
    if match is None:
        values = [_value(entry, part, key, hint) for part in _parts(text)]
        return Choice(tuple(dict.fromkeys(values)))
    if match[1] == "choice":
        return _weighted(entry, match[2], key, hint)
    try:
        low, high = (float(bound) for bound in match[2].split(","))
    except ValueError:
        raise UserError(f"space is {entry!r}: a range has two bounds, which are numbers") from None
    log = match[1] == "loguniform"
    if not -float("inf") < low < high < float("inf") or (log and low <= 0):
        raise UserError(f"space is {entry!r}: give low < high{', both above 0' if log else ''}")
    whole = int in (hint, *get_args(hint)) and float not in (hint, *get_args(hint))
    for bound in (low, high):
        if not isinstance(_number(convert(hint, key, (bound,) if get_origin(hint) is tuple else bound)), int | float):
            raise UserError(f"space is {entry!r}: {key} takes no numbers; give its values with commas between them")
    return Range(low, high, log, whole)


def _number(value: Any) -> Any:
    """Return a value that is none of True and False, which are numbers to Python."""
    value = value[0] if isinstance(value, tuple) and value else value
    return None if isinstance(value, bool) else value


def _parts(text: str) -> list[str]:
    return [part.strip() for part in SEPARATOR.split(text) if part.strip()]


def _weighted(entry: str, text: str, key: str, hint: Any) -> Choice:
    weights: dict[Any, float] = {}
    for part in _parts(text):
        value, _, weight = part.rpartition(":")
        try:
            number = float(weight) if value else float("nan")
        except ValueError:
            number = float("nan")
        if not 0 < number < float("inf"):
            raise UserError(f"space is {entry!r}: write choice(value:weight,value:weight), with weights above 0")
        if (found := _value(entry, value.strip(), key, hint)) in weights:
            raise UserError(f"space is {entry!r}: {value.strip()} is there twice; give it one weight")
        weights[found] = number
    if not weights:
        raise UserError(f"space is {entry!r}: write {FORMS}")
    return Choice(tuple(weights), tuple(weights.values()))


def _value(entry: str, text: str, key: str, hint: Any) -> Any:
    """Return a value as its setting has it; what stands in brackets is a list, and a single value is one as well."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else None
    if any(bracket in (text if inner is None else inner) for bracket in "[]"):
        raise UserError(f"space is {entry!r}: write a list as [value,value], and a comma between two lists")
    if text.lower() == "none" and type(None) in get_args(hint):
        return None
    if inner is not None:
        return convert(hint, key, tuple(value.strip() for value in inner.split(",") if value.strip()))
    return convert(hint, key, (text,) if get_origin(hint) is tuple else text)


def holds(dimension: Dimension, value: Any) -> bool:
    """Return whether a value belongs to a dimension; that of a range as its setting has it, a list of one too."""
    if isinstance(dimension, Choice):
        return value in dimension.values
    number = _number(value)
    return isinstance(number, int | float) and dimension.low <= number <= dimension.high


def configured(config: SweepConfig, stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes that a trial's values make to one of its stages."""
    types = hints(getattr(config, stage))
    changes = {key: value for key, value in values.items() if key in types}
    return changes | {key.removeprefix(f"{stage}."): v for key, v in values.items() if key.startswith(f"{stage}.")}


# --- names ----------------------------------------------------------------------------------------------------------


def name_of(values: Mapping[str, Any]) -> str:
    """Return a trial's name, which is also its folder: `frames=8,mask_ratio=0.5`; other values, another name."""
    parts = {key: "+".join(map(str, v)) if isinstance(v, tuple) else str(v) for key, v in sorted(values.items())}
    name = ",".join(f"{key.rpartition('.')[2]}={_in_name(part)}" for key, part in parts.items())
    if len(name) <= NAME_LENGTH and len({key.rpartition(".")[2] for key in parts}) == len(parts):
        return name
    # The names of the last values are cut off, or two keys look the same: a checksum of all tells two trials apart.
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
