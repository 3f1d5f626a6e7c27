"""What produced a result: versions of the packages and the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "timm", "ray", "mlflow", "decord", "av", "pyarrow", "numpy")
COMMIT_VARIABLE = "S5_COMMIT"


def versions() -> dict[str, str]:
    """Return the version of Python and of each installed package that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        # decord has no wheels for some machines.
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment() -> dict[str, Any]:
    """Return what a run depends on beside its settings and its commit: the machine and the versions."""
    return {
        "machine": platform.node(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(),
    }


def commit() -> str:
    """Return the commit of the code, with `+changes` if the checkout has any, or `unknown`.

    A job's code is shipped without `.git`; there the commit comes from S5_COMMIT, which is set at submission.
    """
    if shipped := os.environ.get(COMMIT_VARIABLE):
        return shipped
    here = Path(__file__).parent
    try:
        revision = _git(here, "rev-parse", "HEAD")
        return f"{revision}+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else revision
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
