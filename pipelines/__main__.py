"""The command line: `python -m pipelines STAGE [--preset NAME | --config run.json] [--a.b.c VALUE ...]`."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from pipelines import storage
from pipelines.config import STAGES, StageConfig, flatten, override, unknown
from pipelines.config.presets import PRESETS, preset
from pipelines.errors import StageError, UserError
from pipelines.running import stage

USAGE = f"""usage: python -m pipelines STAGE [--preset NAME | --config run.json] [--a.b.c VALUE ...]

stages:   {", ".join(STAGES)}
presets:  {", ".join(PRESETS)}

python -m pipelines STAGE --help lists a stage's settings; every stage takes --out, a folder or a URI."""


def main(argv: Sequence[str]) -> int:
    """Run a stage and return the exit status: 0 done, 1 failed, 2 the user's mistake, 128 + signal when stopped."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    try:
        name, config = parse(argv)
        importlib.import_module(f"pipelines.stages.{name}").run(config)
    except UserError as error:
        return _say(error, 2)
    except StageError as error:
        return _say(error, error.code)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _say(f"the disk is full ({error.filename or '--out'}): make room and run the same command again", 1)
        return _say(f"{error.filename or 'storage'}: {error.strerror or error}", 1)
    return 0


def parse(argv: Sequence[str]) -> tuple[str, StageConfig]:
    """Return the stage and its checked settings for a command line without the program's name.

    Raises:
        UserError: unknown stage, preset or setting, or a run.json that is missing or of another stage.
        SystemExit: `--help` (status 0), or a value of the wrong type, explained on stderr (status 2).
    """
    name, *rest = argv
    if name not in STAGES:
        raise UserError(unknown("stage", name, STAGES))
    chosen, rest = _take(rest, "preset")
    path, rest = _take(rest, "config")
    if chosen is not None and path is not None:
        raise UserError("--preset and --config exclude each other: a saved run.json holds every setting")
    config: StageConfig = getattr(preset(chosen or "base"), name)
    if path is not None:
        config = _saved(name, config, path)
    keys = flatten(config)
    for argument in rest:
        key = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and key not in keys and key != "help" and key.replace("no_", "") not in keys:
            raise UserError(unknown("setting", key, keys))
    description = f"{(type(config).__doc__ or '').strip()}\n\nPresets: {', '.join(PRESETS)}"
    parsed: StageConfig = tyro.cli(
        type(config), default=config, args=rest, prog=f"python -m pipelines {name}", description=description
    )
    return name, parsed


def _take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """Return the value of an option, if it is there, and the arguments without it."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"--{option}="):
            return argument.partition("=")[2], arguments[:i] + arguments[i + 1 :]
        if argument == f"--{option}":
            if i + 1 == len(arguments):
                raise UserError(f"--{option} is given without a value")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


def _saved(name: str, config: StageConfig, path: str) -> StageConfig:
    """Return the settings that a run.json holds."""
    try:
        values: Any = storage.read_json(path)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise UserError(f"--config is {path!r}: {reason}; give the run.json of an earlier run") from None
    except ValueError as error:
        raise UserError(f"--config is {path!r}: not JSON: {error}") from None
    if not isinstance(values, dict) or values.pop("stage", name) != name:
        raise UserError(f"--config is {path!r}: it is not of stage {name!r}; give a run.json of that stage")
    values.pop(stage.INPUTS, None)
    return override(config, stage.from_json(values))


def _say(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
