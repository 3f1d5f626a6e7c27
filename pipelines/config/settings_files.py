"""Settings in a file: the run.json of an earlier run, or YAML or JSON that a person has written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from pipelines.config.arguments import members, value_of
from pipelines.config.dotted import INPUTS, current, flatten, hints, unknown
from pipelines.errors import UserError


class _Loader(yaml.BaseLoader):  # type: ignore[misc]
    """Takes each word of YAML as the text that stands there, but for null."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        # In quotes it is a text.
        return None if node.style is None and node.value in ("null", "Null", "NULL", "~") else node.value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
        return _once((key.value, self.construct_object(value, deep)) for key, value in node.value)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs of keys and values as a dictionary; raise `UserError` where a key stands there twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"{key} is given twice: leave one of them out")
        found[key] = value
    return found


def is_yaml(path: str) -> bool:
    """Return whether a file's name says that it is YAML."""
    return path.lower().endswith((".yaml", ".yml"))


def read_settings(stage: str, config: Any, path: str, content: bytes) -> dict[str, Any]:
    """Return the settings that a file gives, under dotted keys.

    They stand under dotted keys or nested, and not all need be there. A word of YAML is the text that stands there, as
    on a command line, until the setting's type makes it something else: `uri: off` is no boolean, `lr: 1e-3` a number.

    Args:
        stage: the stage that is to run.
        config: its settings, which those of the file change.
        path: the file's name, whose ending tells YAML from JSON.
        content: what it holds.

    Raises:
        UserError: it is damaged or of another stage, or has a setting twice, or one that the stage has not.
    """
    values = _read(path, content)
    if values.pop("stage", stage) != stage:
        raise UserError(f"--config is {path!r}: it is not of stage {stage!r}; give settings of that stage")
    values.pop(INPUTS, None)
    leaves, types = _once(_leaves(values)), hints(config)
    for key in leaves:
        if key not in types:
            within = [name for name in types if name.startswith(f"{key}.")]
            group = f"{key} is a group of settings: write one of them, as in {within[0]}" if within else ""
            raise UserError(group or unknown("setting", key, types))
    return {key: _typed(types[key], key, value) for key, value in leaves.items()} if is_yaml(path) else leaves


def _read(path: str, content: bytes) -> dict[str, Any]:
    try:
        values: Any = yaml.load(content, _Loader) if is_yaml(path) else json.loads(content, object_pairs_hook=_once)
    except UserError as error:
        raise UserError(f"--config is {path!r}: {error}") from None
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config is {path!r}: not {'YAML' if is_yaml(path) else 'JSON'}: {reason}") from None
    if not isinstance(values, dict):
        fault = "it holds no settings" if values is None else "it is no mapping of settings to their values"
        raise UserError(f"--config is {path!r}: {fault}; write some, as in `loop.epochs: 3`")
    return values


def _leaves(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of nested ones; an empty group is a value, so that it is refused as one."""
    for name, value in nested.items():
        key = f"{prefix}{name}".replace("-", "_")
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield current(key), value


def _typed(hint: Any, key: str, value: Any) -> Any:
    if value is not None:
        return value_of(hint, key, value if isinstance(value, list) else [value])
    if type(None) not in members(hint):
        raise UserError(f"{key} is null: leave it out")
    return None


def in_yaml(stage: str, config: Any) -> Iterator[str]:
    """Yield lines of YAML that give all settings of a stage, with its default where one has another value."""
    yield f"stage: {stage}"
    defaults = flatten(type(config)())
    for key, value in flatten(config).items():
        yield f"{key}: {_in_yaml(value)}" + (f"  # default {_in_yaml(defaults[key])}" if value != defaults[key] else "")


def _in_yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    # Behind a scalar comes a line that ends the document.
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.splitlines()[0]
