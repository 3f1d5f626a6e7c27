"""The command line: `python -m pipelines STAGE [--preset NAME | --config FILE] [--a.b.c VALUE ...] [--dry-run]`."""

from __future__ import annotations

import errno
import importlib
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from signal import SIGPIPE

from pipelines import preflight
from pipelines.config import STAGES, PredictConfig, RecipeConfig, StageConfig, override, unknown
from pipelines.config.arguments import parse_settings
from pipelines.config.paper import RECIPES
from pipelines.config.presets import preset
from pipelines.config.recipes import GROUPS
from pipelines.errors import StageError, UserError, missing_package
from pipelines.usage import COMPLETION, NODES, USAGE, print_completion, settings_help


def main(argv: Sequence[str]) -> int:
    """Run a stage and return the exit status: 0 done, 1 failed, 2 the user's mistake, 128 + signal when stopped."""
    try:
        return _run(argv)
    except UserError as error:
        return _say(error, 2)
    except StageError as error:
        return _say(error, error.code)
    except ModuleNotFoundError as error:
        return _say(missing_package(error), 2)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            reason = "the program that read the output has ended: run the same command again to resume"
            return _without_output(reason, 128 + SIGPIPE)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            if _output_is_full():
                return _without_output("the output cannot be written, its disk is full: make room and run it again", 1)
            return _say(f"the disk is full ({error.filename or '--out'}): make room and run the same command again", 1)
        return _say(f"{error.filename or 'storage'}: {error.strerror or error}", 1)


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, flush=True)
        return 0 if argv else 2
    if argv[0] == COMPLETION:
        print_completion([*argv[1:]])
    node, argv = take_dry_run(argv)
    if not argv:
        print(USAGE, flush=True)
        return 2
    name, config = parse(argv)
    preflight.check(name, config, dry_run=node is not None)
    if plan := _dry_run(name, config, node):
        print(plan, flush=True)
        return 0
    # Not before: this, and a stage, take seconds to import.
    startup = importlib.import_module("pipelines.running.startup")
    with startup.without_garbage_collection():
        startup.start_ray_and_import(name, config)
        stage = importlib.import_module(f"pipelines.stages.{name}")
    result = stage.run(config)
    # What `predict` prints on stdout is for programs.
    stream = sys.stderr if isinstance(config, PredictConfig) else sys.stdout
    for line in importlib.import_module("pipelines.closing").closing(config, result):
        print(f"[{name}] {line}", file=stream, flush=True)
    return 0


def _dry_run(name: str, config: StageConfig, node: str | None) -> str:
    """Return the text of a dry run, empty where none is asked for."""
    if isinstance(config, RecipeConfig) and config.dry_run:
        return str(importlib.import_module("pipelines.recipes.dry_run").plan_of(config))
    return str(importlib.import_module("pipelines.dry_run").plan_of(name, config, node)) if node else ""


def parse(argv: Sequence[str]) -> tuple[str, StageConfig]:
    """Return the stage and its checked settings for a command line without the program's name.

    Raises:
        UserError: unknown stage, preset or setting, a bad value, or a run.json that is missing or of another stage.
        SystemExit: `--help` (status 0).
    """
    name, *rest = argv
    if name not in STAGES:
        raise UserError(unknown("stage", name, STAGES))
    if name == "recipe" and rest and not rest[0].startswith("-"):
        if rest[0] not in RECIPES:
            raise UserError(unknown("recipe", rest[0], tuple(RECIPES)))
        rest = ["--preset", *rest]
    chosen, rest = _take(rest, "preset")
    path, rest = _take(rest, "config")
    if chosen is not None and path is not None:
        raise UserError("--preset and --config exclude each other: a saved run.json holds every setting")
    config: StageConfig = getattr(preset(chosen or "base"), name)
    if path is not None:
        config = _saved(name, config, path)
    if "--help" in rest or "-h" in rest:
        settings_help(name, config)
    groups = tuple(GROUPS.values()) if name == "recipe" else ()
    words = "videos" if name == "predict" else ""
    return name, override(config, parse_settings(rest, config, groups, words))


def take_dry_run(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the node of a dry run, None where none is asked for, and the arguments without it.

    Those of a recipe are settings of its own.

    Raises:
        UserError: the node is given without a dry run, or is none whose rates were measured; or --dry-run has a value.
    """
    if argv[0] == "recipe":
        return None, [*argv]
    for argument in argv:
        if argument != "--dry-run" and argument.partition("=")[0].replace("_", "-") in ("--dry-run", "--no-dry-run"):
            raise UserError(f"{argument} is no option: write --dry-run, which takes no value, or leave it out")
    rest = [argument for argument in argv if argument != "--dry-run"]
    dry_run = len(rest) < len(argv)
    node, rest = _take(rest, "node")
    if node is not None and not dry_run:
        raise UserError(f"--node is {node!r}: it is of --dry-run; give both or neither")
    if node is not None and node not in NODES:
        raise UserError(f"--node is {node!r}: rates were measured on {' and '.join(NODES)}; give one of them")
    if rest[:1] == ["recipe"]:
        raise UserError("--dry-run stands before recipe: write the stage first, as in `recipe NAME --dry-run`")
    return (node or NODES[0]) if dry_run else None, rest


def _take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """Return the value of an option, if it is there, and the arguments without it."""
    values, others, left = [], [], iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        if flag != f"--{option}":
            others.append(argument)
        elif (found := value if equals else next(left, None)) is not None:
            values.append(found)
        else:
            raise UserError(f"--{option} is given without a value")
    if len(values) > 1:
        raise UserError(f"--{option} is given {len(values)} times ({', '.join(values)}): give one")
    return (values[0] if values else None), others


def _saved(name: str, config: StageConfig, path: str) -> StageConfig:
    """Return the settings that a run.json, or a file of settings in YAML or JSON, holds."""
    # YAML takes as long to import as all else here.
    from pipelines.config.settings_files import read_settings

    try:
        content = _read_bytes(path)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise UserError(f"--config is {path!r}: {reason}; give the run.json of an earlier run") from None
    return override(config, read_settings(name, config, path, content))


def _read_bytes(path: str) -> bytes:
    if "://" not in path:
        return Path(path).expanduser().read_bytes()
    from pipelines import storage

    return storage.read_bytes(path)


def _reader_left() -> bool:
    """Whether it is the output's pipe that is broken, and not a connection to a server."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _output_is_full() -> bool:
    """Whether it is the output that has no room for another line, and not another file."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _without_output(reason: str, code: int) -> int:
    """End as a shell's tools do when their output cannot be written, as to `| head` that has left."""
    # What is still buffered would raise again when it is flushed.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _say(reason, code)


def _say(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
