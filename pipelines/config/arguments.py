"""Settings on the command line: `--a.b.c VALUE`, `--a.b.c=VALUE`, `--flag`, `--no-flag`, `--flag True`."""

from __future__ import annotations

import keyword
import types
import typing
from collections.abc import Sequence
from typing import Any

from pipelines.config.dotted import convert, hints, unknown
from pipelines.config.recipes import IN_WORKERS_ONLY
from pipelines.errors import UserError

BOOLEANS = ("true", "false", "yes", "no", "1", "0")


def parse_settings(
    arguments: Sequence[str], config: Any, groups: Sequence[str] = (), words: str = ""
) -> dict[str, Any]:
    """Return the settings that arguments give, under dotted keys, as their types have them.

    Dashes and underscores in keys are the same. A setting of several values takes all up to the next option.

    Args:
        arguments: what the command line says.
        config: the settings that it changes.
        groups: of its groups, those that hold the settings of a stage each: `--loop.epochs` sets that of all of them
            which have it, but for a 0 in those of `IN_WORKERS_ONLY`. What a stage has alone, outside of a group of its
            own, such as `task`, needs its full name.
        words: the setting of several values that takes words beside options, if any.

    Raises:
        UserError: an unknown setting, one without a value, a value of the wrong type, or a word beside options.
    """
    known = hints(config)
    changes: dict[str, Any] = {}
    rest, beside = list(arguments), []
    while rest:
        option = rest.pop(0)
        if words and not option.startswith("-"):
            beside.append(option)
            continue
        if not option.startswith("--"):
            raise UserError(f"{option!r} belongs to no option: write --setting {option}")
        name, has_value, text = option.removeprefix("--").partition("=")
        keys, negated = _keys(name, known, groups)
        values = [text] if has_value else []
        if not has_value and not negated:
            values = _values_of(known[keys[0]], rest)
        given = {key: _value(known[key], key, values, negated) for key in keys}
        if len(given) > 1:
            given = {key: value for key, value in given.items() if value or key not in IN_WORKERS_ONLY}
        changes |= given
    if beside and words in changes:
        raise UserError(f"{words} is given with --{words} and without ({beside[0]!r}): give all of them in one way")
    return changes | ({words: value_of(known[words], words, beside)} if beside else {})


def _keys(name: str, known: dict[str, Any], groups: Sequence[str]) -> tuple[list[str], bool]:
    """Return the dotted keys that an option sets, and whether it is the negation of a flag."""
    key = name.replace("-", "_")
    if found := _known(key, known, groups):
        return found, False
    *parents, leaf = key.split(".")
    positive = _known(".".join([*parents, leaf.removeprefix("no_")]), known, groups)
    if leaf.startswith("no_") and positive and known[positive[0]] is bool:
        return positive, True
    raise UserError(unknown("setting", key, known))


def _known(key: str, known: dict[str, Any], groups: Sequence[str]) -> list[str]:
    """Return the settings of that name: the one itself, or else those of the groups."""
    # A word of Python has an underscore behind it as a field's name.
    key = f"{key}_" if keyword.iskeyword(key) else key
    if key in known or "." not in key:
        return [key] if key in known else []
    return [full for group in groups if (full := f"{group}.{key}") in known]


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
    if not negated:
        return value_of(hint, key, values)
    if values:
        raise UserError(f"{key} is negated and has the value {values[0]!r}: give --{key} or --no-{key} alone")
    return False


def value_of(hint: Any, key: str, values: Sequence[str]) -> Any:
    """Return the value of a setting, as its type has it, from texts: several where it has several.

    Raises:
        UserError: none is given, several for a setting of one, or one of the wrong type.
    """
    if typing.get_origin(hint) is tuple:
        return convert(hint, key, tuple(values))
    if len(values) != 1:
        raise UserError(f"--{key} is given {'several values: give one' if values else 'without a value'}")
    # `None` stands for a setting that is left out, where it may be.
    if values[0] in ("None", "none") and type(None) in members(hint):
        return None
    return convert(hint, key, values[0])


def members(hint: Any) -> tuple[Any, ...]:
    """Return the types of which a setting's value may be one, where there are several."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
