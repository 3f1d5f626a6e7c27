"""What the command line says of itself: its usage, a stage's settings, and the completion of a shell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

from pipelines.config import STAGES, RunConfig, StageConfig, flatten, unknown
from pipelines.config.dotted import hints
from pipelines.config.paper import RECIPES
from pipelines.config.presets import PRESETS
from pipelines.config.recipes import NodeName
from pipelines.errors import UserError

COMPLETION = "completion"
Shell = Literal["bash", "zsh", "fish"]
NODES: tuple[str, ...] = get_args(NodeName)
USAGE = f"""usage: python -m pipelines STAGE [--preset NAME | --config FILE] [--a.b.c VALUE ...] [--dry-run]

stages:   {", ".join(STAGES)}
presets:  {", ".join(name for name in PRESETS if name not in RECIPES)}
recipes:  {", ".join(RECIPES)}

python -m pipelines recipe NAME runs all stages of a recipe; --preset NAME has its settings for a stage alone.
python -m pipelines STAGE --help lists a stage's settings; every stage takes --out, a folder or a URI.
--config takes the run.json of an earlier run, or settings that you have written, in YAML (NAME.yaml) or JSON.
--dry-run prints the settings and what the stage would read, train and write, and stops; the hours are reckoned from
rates measured on --node {" or ".join(NODES)}.
s5 {COMPLETION} {"|".join(get_args(Shell))} prints a shell's completion; s5 is this program, installed beside python."""


def settings_help(name: str, config: StageConfig) -> NoReturn:
    """Print a stage's settings and end (`SystemExit`, status 0)."""
    import tyro

    description = f"{(type(config).__doc__ or '').strip()}\n\nPresets: {', '.join(PRESETS)}"
    program = f"python -m pipelines {name}"
    tyro.cli(type(config), default=config, args=["--help"], prog=program, description=description)
    raise AssertionError("help ends the process")


def print_completion(arguments: list[str]) -> NoReturn:
    """Print the completion of a shell and end (`SystemExit`, status 0).

    Args:
        arguments: the shell's name.

    Raises:
        UserError: there is no completion of that shell.
    """
    import tyro

    shells = get_args(Shell)
    if len(arguments) != 1:
        raise UserError(f"{COMPLETION} takes the name of a shell: give one of {', '.join(shells)}")
    if arguments[0] not in shells:
        raise UserError(unknown("shell", arguments[0], shells))
    stages: dict[str, Callable[..., Any]] = {name: _options(getattr(RunConfig(), name)) for name in STAGES}
    tyro.extras.subcommand_cli_from_dict(stages, args=["--tyro-print-completion", arguments[0]], prog="s5")
    raise AssertionError("completion ends the process")


def _options(config: StageConfig) -> type:
    """Return a class with a field for each option of a stage, without help: bash would offer its lines as options."""
    import tyro

    options: list[tuple[str, Any, Any]] = [
        ("preset", Literal[*PRESETS], "base"),
        ("config", Path, Path("run.json")),
        ("dry-run", bool, False),
        ("node", NodeName, NODES[0]),
    ]
    values, names = flatten(config), {name for name, _, _ in options}
    for key, hint in hints(config).items():
        name = key.removesuffix("_").replace("_", "-")
        options += [] if name in names else [(name, hint, values[key])]
    fields = [
        (f"option_{i}", Annotated[hint, tyro.conf.arg(name=name, help="")], dataclasses.field(default=value))
        for i, (name, hint, value) in enumerate(options)
    ]
    return dataclasses.make_dataclass("Options", fields, kw_only=True)
