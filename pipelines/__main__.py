"""Entry of `python -m pipelines` and of the command `s5`."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import NoReturn

OLDEST = (3, 11)


def entry() -> NoReturn:
    """Run the command line, and end the process with its status as soon as all exit handlers have run.

    What Python does after them, taking the interpreter and its libraries apart, takes seconds once torch and Ray are
    loaded.
    """
    ended: list[int] = []

    def end() -> None:
        if ended:
            for stream in (sys.stdout, sys.stderr):
                # A process started without one has None; a reader that has left needs no more.
                with contextlib.suppress(AttributeError, BrokenPipeError):
                    stream.flush()
            os._exit(ended[0])

    # What is registered first runs last.
    atexit.register(end)
    ended.append(main())
    sys.exit(ended[0])


def main() -> int:
    """Run the command line, or say in a sentence what it needs; return the exit status."""
    if sys.version_info < OLDEST:
        found = ".".join(map(str, sys.version_info[:3]))
        print(f"error: Python is {found}: give 3.11 or later, as in .venv after `make setup`", file=sys.stderr)
        return 2
    # Below `uv run`, or in a job on a head that was started by it, Ray would start each worker by uv too, in a copy of
    # this folder. The nodes have the environment anyway. Ray reads it when it is imported.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        from pipelines import command_line
    except ModuleNotFoundError as error:
        # As in `command_line.main`, which could not be imported.
        from pipelines.errors import missing_package

        print(f"error: {missing_package(error)}", file=sys.stderr)
        return 2
    return command_line.main(sys.argv[1:])


if __name__ == "__main__":
    entry()
