"""What a stage raises: the user's mistakes, and reasons why it could not finish."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's: shown as one sentence, exit status 2, no traceback."""


class StageError(Exception):
    """A stage that could not be finished for a reason that one sentence tells; `code` is the exit status."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class StoppedError(StageError):
    """A stage that a signal asked to stop and that saved its work; the exit status is 128 + the signal."""


def missing_package(error: ModuleNotFoundError) -> str:
    """Return what to do about a package that is not installed.

    Raises:
        ModuleNotFoundError: it is one of ours, whose absence is a fault of ours.
    """
    if (error.name or "").partition(".")[0] in ("s5", "pipelines"):
        raise error
    return f"the package {error.name} is missing: run `make setup`, then .venv/bin/python"


def last_line(text: str) -> str:
    """Return the last line of an error's text, stripped: it says what went wrong; empty where there is no text."""
    return text.strip().rpartition("\n")[2].strip()
