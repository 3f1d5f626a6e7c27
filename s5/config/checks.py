"""What all settings share: checks of values, what names a path, and reading from JSON."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_type_hints

Config = TypeVar("Config")


@dataclass(frozen=True)
class PathRole:
    """Marks a setting that names a file or folder, in `typing.Annotated`."""

    kind: Literal["input", "output", "scope"]
    """`input`: it has to exist; `output`: it is written; `scope`: what lies below it or is like it is meant."""
    what: Literal["file", "folder", "file or folder", "manifest", "checkpoint", "features", "weights"]
    """What is named."""
    not_paths: tuple[str, ...] = ("",)
    """Values that name nothing."""
    or_name: bool = False
    """Whether it may be a plain name instead, such as that of a model on a hub."""

    def is_path(self, value: str) -> bool:
        """Return whether a value names a file or folder; one that may be a plain name does so if it exists."""
        if value in self.not_paths or not self.or_name:
            return value not in self.not_paths
        return value.startswith(("/", ".", "~")) or "://" in value or os.path.exists(value)


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise `ValueError` that names the setting, its value and the remedy unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}: {remedy}")


def from_json(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Return a config of that class from nested values as JSON gives them.

    Raises:
        ValueError: a key that the class lacks, or a value out of range.
    """
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        require(key in known, key, values[key], f"{cls.__name__} has no such setting")
    built = {
        key: from_json(hints[key], value)
        if dataclasses.is_dataclass(hints[key])
        else tuple(value)
        if isinstance(value, list)
        else value
        for key, value in values.items()
    }
    return cls(**built)


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise `ValueError` unless `low <= value <= high`; NaN fails."""
    require(low <= value <= high, name, value, f"give a value from {low:g} to {high:g}")
