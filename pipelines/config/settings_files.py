"""Settings in a file: the run.json of an earlier run, or YAML or JSON that a person has written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from pipelines.config.arguments import value_of
from pipelines.config.dotted import INPUTS, flatten, hints, leaves_of, unknown
from pipelines.errors import UserError


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
        UserError: it is damaged or of another stage, or YAML has a setting that the stage has not.
    """
    try:
        values: Any = yaml.load(content, yaml.BaseLoader) if is_yaml(path) else json.loads(content)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config is {path!r}: not {'YAML' if is_yaml(path) else 'JSON'}: {reason}") from None
    if not isinstance(values, dict) or values.pop("stage", stage) != stage:
        raise UserError(f"--config is {path!r}: it is not of stage {stage!r}; give settings of that stage")
    values.pop(INPUTS, None)
    leaves = leaves_of(values)
    return _typed(config, leaves) if is_yaml(path) else leaves


def _typed(config: Any, leaves: dict[str, Any]) -> dict[str, Any]:
    types, typed = hints(config), {}
    for name, value in leaves.items():
        key = name.replace("-", "_")
        if key not in types:
            raise UserError(unknown("setting", key, types))
        texts = value if isinstance(value, list) else ["None" if value in ("null", "~") else value]
        typed[key] = value_of(types[key], key, texts)
    return typed


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
