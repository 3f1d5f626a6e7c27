"""Settings on the command line: `--a.b.c VALUE`, `--a.b.c=VALUE`, `--flag`, `--no-flag`, `--flag True`."""

from __future__ import annotations

import keyword
import types
import typing
from collections.abc import Sequence
from typing import Any

from pipelines.config.dotted import convert, hints, unknown
from pipelines.errors import UserError

BOOLEANS = ("true", "false", "yes", "no", "1", "0")


def parse_settings(arguments: Sequence[str], config: Any) -> dict[str, Any]:
    """Return the settings that arguments give, under dotted keys, as their types have them.

    Dashes and underscores in keys are the same. A setting of several values takes all up to the next option.

    Raises:
        UserError: an unknown setting, one without a value, or a value of the wrong type.
    """
    known = hints(config)
    changes: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise UserError(f"{option!r} belongs to no option: write --setting {option}")
        name, has_value, text = option.removeprefix("--").partition("=")
        key, negated = _key(name, known)
        values = [text] if has_value else []
        if not has_value and not negated:
            values = _values_of(known[key], rest)
        changes[key] = _value(known[key], key, values, negated)
    return changes


def _key(name: str, known: dict[str, Any]) -> tuple[str, bool]:
    """Return the dotted key of an option, and whether it is the negation of a flag."""
    key = name.replace("-", "_")
    if key in known:
        return key, False
    if keyword.iskeyword(key) and f"{key}_" in known:
        return f"{key}_", False
    *groups, leaf = key.split(".")
    positive = ".".join([*groups, leaf.removeprefix("no_")])
    if leaf.startswith("no_") and known.get(positive) is bool:
        return positive, True
    raise UserError(unknown("setting", key, known))


def _values_of(hint: Any, rest: list[str]) -> list[str]:
    """Take the values that follow an option from the arguments that are left."""
    if hint is bool:
        return [rest.pop(0)] if rest and rest[0].lower() in BOOLEANS else ["true"]
    if typing.get_origin(hint) is not tuple:
        # A negative number is a value, and so is a word with one dash.
        return [rest.pop(0)] if rest and not rest[0].startswith("--") else []
    values = []
    while rest and not rest[0].startswith("--"):
        values.append(rest.pop(0))
    return values


def _value(hint: Any, key: str, values: list[str], negated: bool) -> Any:
    if negated:
        if values:
            raise UserError(f"{key} is negated and has the value {values[0]!r}: give --{key} or --no-{key} alone")
        return False
    if typing.get_origin(hint) is tuple:
        return convert(hint, key, tuple(values))
    if not values:
        raise UserError(f"--{key} is given without a value")
    # `None` stands for a setting that is left out, where it may be.
    if values[0] in ("None", "none") and type(None) in _members(hint):
        return None
    return convert(hint, key, values[0])


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
