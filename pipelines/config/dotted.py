"""The one language in which settings are changed: the dotted key.

`override(config, {"optim.lr": 3e-4})` serves presets, the command line, saved `run.json` files and sweeps alike.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from pipelines.errors import UserError
from s5.config import PathRole

Config = TypeVar("Config")

RENAMED = {"lsmcl.jitter": "views.jitter"}
"""Settings of earlier versions, and what they are called."""
BEFORE = {"model.decoder.selection.noise": "training"}
"""What settings were before there was a choice, where that is not their default."""
RUN = "run.json"
"""The file in a stage's --out that holds its settings."""
INPUTS = "inputs"
"""Key of run.json with the digests of what a stage reads."""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a config dataclass under their dotted keys, in order."""
    leaves: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{f.name}.")
        else:
            leaves[prefix + f.name] = value
    return leaves


def to_json(stage: str, config: Any) -> dict[str, Any]:
    """Return what run.json holds: the stage and its settings as nested values that JSON knows."""
    nested: dict[str, Any] = {"stage": stage}
    for key, value in flatten(config).items():
        *groups, leaf = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = list(value) if isinstance(value, tuple) else value
    return nested


def leaves_of(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested values, such as run.json's, under their dotted keys: what `override` takes.

    Settings of earlier versions are found under the names that they have.
    """
    leaves: dict[str, Any] = {}
    for key, item in nested.items():
        if isinstance(item, dict):
            leaves |= leaves_of(item, f"{prefix}{key}.")
        else:
            leaves[current(prefix + key)] = item
    return leaves


def current(key: str) -> str:
    """Return the dotted key of a setting that an earlier version may have had under another."""
    for old, new in RENAMED.items():
        if key == old or key.endswith(f".{old}"):
            return key.removesuffix(old) + new
    return key


def hints(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the type of every leaf, `Annotated` ones with what they are annotated with, under its dotted key."""
    kind: Any = type(config)
    types = _types(kind, annotated=True)
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found |= hints(value, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = types[f.name]
    return found


def paths(config: Any) -> dict[str, tuple[str, PathRole]]:
    """Return the settings that name files or folders, with their roles, under their dotted keys.

    The second of several folders is under `KEY[1]`.
    """
    values = flatten(config)
    found: dict[str, tuple[str, PathRole]] = {}
    for key, hint in hints(config).items():
        found |= paths_in(key, hint, values[key])
    return found


def paths_in(key: str, hint: Any, value: Any) -> dict[str, tuple[str, PathRole]]:
    """Return the files or folders that a value of a setting names, as `paths` does.

    Args:
        key: the setting.
        hint: its type, with what it is annotated with.
        value: a value of that type.
    """
    is_several = get_origin(hint) is tuple
    given = value if is_several else (value,)
    one = get_args(hint)[0] if is_several else hint
    roles = [role for role in get_args(one) if isinstance(role, PathRole)]
    named = {f"{key}[{i}]" if i else key: (path, role) for role in roles for i, path in enumerate(given)}
    return {place: (path, role) for place, (path, role) in named.items() if role.is_path(path)}


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a copy of a config with the leaves at the given dotted keys replaced.

    Values are checked against the field's type: text is converted (`"3e-4"` to a float), JSON lists to tuples.

    Raises:
        UserError: a key that does not exist (names the closest one), or a value of the wrong type or out of range.
    """
    known = flatten(config)
    for key in changes:
        if key not in known:
            raise UserError(unknown("setting", key, known))
    changed: Config = _replace(config, dict(changes))
    return changed


def _replace(config: Any, changes: Mapping[str, Any], prefix: str = "") -> Any:
    """`override` for keys that are known to exist."""
    kind: Any = type(config)
    types = _types(kind)
    fields: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            fields[head] = convert(types[head], prefix + head, value)
    for head, part in nested.items():
        fields[head] = _replace(getattr(config, head), part, f"{prefix}{head}.")
    try:
        return dataclasses.replace(config, **fields)
    except ValueError as error:
        raise UserError(str(error)) from None


def convert(hint: Any, key: str, value: Any) -> Any:
    """Return a value as a setting's type has it.

    Raises:
        UserError: it cannot be converted; names the key and the value.
    """
    if isinstance(value, list):
        value = tuple(value)
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{key} is {value!r}: {error.errors()[0]['msg'].lower()}") from None


# A sweep changes hundreds of settings of the same few types.
@cache
def _types(kind: Any, annotated: bool = False) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=annotated)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def unknown(what: str, name: str, valid: Mapping[str, Any] | tuple[str, ...]) -> str:
    """Return the sentence for a name that does not exist, with the closest valid one."""
    names = list(valid)
    same_leaf = [n for n in names if n.rpartition(".")[2] == name.rpartition(".")[2]]
    close = sorted(same_leaf, key=len) or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names[:20])}"
    return f"unknown {what} {name!r}: {hint}"
