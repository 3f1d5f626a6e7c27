"""Spaces by name, and spaces in files: both become entries of text, as they are written on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pipelines.config import SweepConfig, unknown
from pipelines.errors import UserError

KEEP_RATIO = "model.decoder.selection.keep_ratio"
MASK_RATIO = "lsmcl.mask_ratio"
SPACES: dict[str, tuple[str, ...]] = {
    "mask-ratio": (f"{MASK_RATIO}=0,0.25,0.5,0.75",),
    "clip-length": ("clips.frames=60,80,100,120",),
    # The figure that motivates S5 (arXiv 2303.14526): gain or loss against no masking, over frames and masking ratio.
    "mask-ratio-x-frames": ("clips.frames=60,80,100,120", f"{MASK_RATIO}=0,0.2,0.4,0.6,0.8"),
    "keep-ratio": (f"{KEEP_RATIO}=[0.25],[0.5],[0.75],[1.0]",),
    "mask-generator": ("model.decoder.selection.generator=linear,transformer,random,none",),
    "lr": ("optim.lr=0.0001,0.0003,0.001,0.003,0.01",),
}
ENDINGS = (".yaml", ".yml", ".json")
SHAPE = "a file of a space holds keys, each with a list of values or a text such as uniform(0.1,0.9)"


def resolved(config: SweepConfig) -> SweepConfig:
    """Return the settings with every ready space and every file replaced by the entries that it stands for.

    Raises:
        UserError: there is no such space (names the closest), or a file that cannot be read or holds something else.
    """
    entries: list[str] = []
    for entry in config.space:
        if "=" in entry:
            entries.append(entry)
        elif entry.endswith(ENDINGS):
            entries += _in_file(entry)
        elif entry in SPACES:
            entries += SPACES[entry]
        else:
            raise UserError(
                f"space is {entry!r}: write key=value,value, or give a ready space: {unknown('space', entry, SPACES)}"
            )
    return replace(config, space=tuple(entries))


def _in_file(path: str) -> list[str]:
    try:
        # Its words are texts, as on a command line, until their settings' types make them something else.
        content = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"space is {path!r}: it cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"space is {path!r}: it is no YAML ({reason}); {SHAPE}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"space is {path!r}: it holds no keys; {SHAPE}")
    return [f"{key}={_text(path, key, value)}" for key, value in content.items()]


def _text(path: str, key: Any, value: Any) -> str:
    """Return the values of a key as text."""
    if isinstance(value, dict) or not value:
        raise UserError(f"space is {path!r}: {key} is {value!r}; {SHAPE}, and keys in one line, such as {MASK_RATIO}")
    if isinstance(value, str):
        return value
    return ",".join(
        f"[{','.join(_word(path, key, part) for part in each)}]" if isinstance(each, list) else _word(path, key, each)
        for each in value
    )


def _word(path: str, key: Any, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or any(mark in value for mark in ",[]"):
        raise UserError(f"space is {path!r}: {key} has the value {value!r}; write values without commas and brackets")
    return value
