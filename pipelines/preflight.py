"""What is checked before a stage is imported: mistakes are answered at once, without torch, Ray or MLflow."""

from __future__ import annotations

import difflib
import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from pipelines import storage, tracking
from pipelines.config import REGISTERED, PredictConfig, RecipeConfig, StageConfig, SweepConfig, flatten, paths, paths_in
from pipelines.config.recipes import GROUPS, LINKS
from pipelines.errors import UserError
from pipelines.recipes import steps as recipes
from pipelines.running import lease
from pipelines.running.run_folder import RunFolder
from pipelines.tuning import draws, ready_spaces, search_space
from pipelines.tuning.trials import objective_of
from s5.config import PathRole

TRACKING_URI = "tracking.uri"
ROOM_BYTES = 1 << 20
"""Written and removed again, to see that a disk has room for what every stage writes first."""


def used_paths(config: StageConfig) -> dict[str, tuple[str, PathRole]]:
    """Return the files and folders, under dotted keys, that a stage reads or writes.

    A sweep's trials have an --out of their own, and where they pretrain they fine-tune from that; what its space names
    is under `space KEY`. A recipe connects its stages itself.

    Raises:
        UserError: a sweep's space cannot be read.
    """
    found = paths(config)
    if isinstance(config, RecipeConfig):
        given = {f"{GROUPS[stage]}.{name}" for stage, names in LINKS.items() for name in names}
        return {key: value for key, value in found.items() if key not in given}
    if isinstance(config, PredictConfig) and config.checkpoint.startswith(REGISTERED):
        del found["checkpoint"]
    if isinstance(config, SweepConfig):
        stages = config.stages.split("+")
        unused = {"pretrain.out", "finetune.out"} | ({"finetune.checkpoint"} if "pretrain" in stages else set())
        used = ("", *stages)
        found = {k: v for k, v in found.items() if k not in unused and k.rpartition(".")[0].partition(".")[0] in used}
        found |= paths_in_space(config)
    return found


def paths_in_space(config: SweepConfig) -> dict[str, tuple[str, PathRole]]:
    """Return the files and folders among the values of a sweep's space, as `paths` does, under `space KEY`.

    Raises:
        UserError: the space cannot be read.
    """
    found: dict[str, tuple[str, PathRole]] = {}
    for key, (hint, values) in search_space.listed(ready_spaces.resolved(config)).items():
        for number, value in enumerate(values):
            found |= paths_in(f"space {key}[{number}]" if number else f"space {key}", hint, value)
    return found


def check(stage: str, config: StageConfig, dry_run: bool = False) -> None:
    """Check what a stage reads, where it writes unless it is a dry run, and its tracking URI.

    Raises:
        UserError: one of them is wrong.
    """
    check_credentials(config)
    if isinstance(config, SweepConfig):
        check_space(config)
    check_inputs(config)
    if isinstance(config, RecipeConfig):
        recipes.check(config)
        dry_run = config.dry_run
    if dry_run or (isinstance(config, PredictConfig) and not config.out):
        return
    tracking.resolve_uri(config.tracking, config.out)
    if not storage.is_uri(storage.absolute(config.out)):
        folder = RunFolder.of(stage, config)
        folder.check_stage()
        if isinstance(config, RecipeConfig):
            recipes.refuse_another(config)
        check_out(config.out)
        lease.refuse_where_held(folder.root)


def check_space(config: SweepConfig) -> None:
    """Check what a sweep varies, how many settings that gives, and what they are compared by.

    Raises:
        UserError: names the entry, the value or the metric.
    """
    config = ready_spaces.resolved(config)
    draws.check_size(config, search_space.parse(config))
    objective_of(config)


def check_credentials(config: StageConfig) -> None:
    """Check that no path and no tracking URI holds credentials, those that go unused too: run.json holds all
    settings, and a job's record the variable.

    Raises:
        UserError: one holds some; the message does not show them. Or a sweep's space cannot be read.
    """
    named = paths(config) | (paths_in_space(config) if isinstance(config, SweepConfig) else {})
    for value, _ in named.values():
        storage.check_no_credentials(value)
    for key, value in flatten(config).items():
        if key == TRACKING_URI or key.endswith(f".{TRACKING_URI}"):
            tracking.check_without_credentials(value, f"--{key}")
    tracking.check_without_credentials(os.environ.get(tracking.VARIABLE, ""), tracking.VARIABLE)


def check_inputs(config: StageConfig) -> None:
    """Check the local files and folders that a stage reads.

    Raises:
        UserError: one does not exist, or is not what its setting names.
    """
    for key, (value, role) in used_paths(config).items():
        if role.kind != "input" or storage.is_uri(storage.absolute(value)):
            continue
        path = Path(value.removeprefix("file://")).expanduser()
        # A keyword of Python is no name of a field, but it is one of an option.
        key = key.removesuffix("_")
        if not path.exists():
            kind, remedy = MISSING.get(role.what, (role.what, "give one that exists"))
            raise UserError(f"{key} is {value!r}: there is no such {kind}; {_nearby(path) or remedy}")
        if role.what in CHECKS:
            CHECKS[role.what](key, value)


def check_out(out: str) -> None:
    """Make a local --out and see that it can be written to.

    Raises:
        UserError: it cannot, or its disk is full.
    """
    folder = Path(storage.absolute(out))
    probe = folder / f".{uuid.uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(bytes(ROOM_BYTES))
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"--out is {out!r}: its disk is full; make room there or give another folder") from None
        raise UserError(
            f"--out is {out!r}: it cannot be written to ({error.strerror}); give a folder that can"
        ) from None


def _nearby(path: Path) -> str:
    """Return a hint at a name like that one in the same folder."""
    if not path.parent.is_dir():
        return ""
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"did you mean {path.parent / close[0]}?" if close else ""


def _manifest(key: str, value: str) -> None:
    from pipelines.data.manifest import read_manifest

    read_manifest(value)


def _checkpoint(key: str, value: str) -> None:
    folder = Path(value)
    if not any((folder / name).exists() for name in ("meta.json", "result.json")):
        raise UserError(f"{key} is {value!r}: neither a checkpoint nor the --out of a finished stage")


def _features(key: str, value: str) -> None:
    if not (Path(value) / "features.json").exists():
        raise UserError(f"{key} is {value!r}: there are no finished features; give the --out of `features`")


# What does not exist, and the remedy.
MISSING = {
    "manifest": ("file", "run `python -m pipelines index` first, or give its --out"),
    "checkpoint": ("folder", "give a checkpoint or the --out of a stage"),
    "features": ("folder", "give the --out of `features`"),
    "weights": ("file", "give a file of weights, `timm`, or leave it out"),
}
CHECKS: dict[str, Callable[[str, str], None]] = {
    "manifest": _manifest,
    "checkpoint": _checkpoint,
    "features": _features,
}
