"""What a job needs on the cluster: the code alone, of which the size is checked, and the Python that runs Ray there."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipelines.errors import UserError

ROOT = Path(__file__).parent.parent
CODE = ("s5", "pipelines", "clusters")
SUFFIXES = (".py", ".html")
"""Of files of the code: those of pages are what `report` fills in."""
PYTHON = "clusters/python.sh"
"""Runs the cluster's Python: what `python` is in the PATH of its head may be another one, or nothing."""
MOST_BYTES = 8_000_000
"""Of the code, which has 1.3 MB: every node unpacks it before the job's first task there."""
LARGEST = 3
"""Files that are named where it is more."""


def entrypoint(arguments: str) -> str:
    """Return the shell command with which a job runs Python, with arguments that need no quotes."""
    return f"sh {PYTHON} {arguments}"


def stage_code(folder: Path) -> None:
    """Copy the files of the code, and pyproject.toml, into a folder.

    Raises:
        UserError: it is too much.
    """
    sources = [path for package in CODE for path in (ROOT / package).rglob("*") if path.suffix in SUFFIXES]
    for source in (*sources, ROOT / PYTHON, ROOT / "pyproject.toml"):
        if source.is_file():
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    check_code(folder)


def check_code(folder: Path) -> None:
    """Refuse to ship much more than the code has, such as a page with data in it.

    Raises:
        UserError: names the largest files.
    """
    sizes = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:LARGEST]
        named = ", ".join(f"{path} ({sizes[path] / 1e6:.1f} MB)" for path in largest)
        raise UserError(
            f"the code to ship has {total / 1e6:.1f} MB, and {MOST_BYTES / 1e6:g} MB are the most; move what is no "
            f"code out of {', '.join(CODE)}; the largest files are {named}"
        )
