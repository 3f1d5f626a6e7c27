"""A stage's --out: the names below it, and what an earlier run left there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.config import BEFORE, INPUTS, RUN, StageConfig, leaves_of, to_json
from pipelines.config.recipes import GROUPS
from pipelines.errors import UserError

RESULT = "result.json"
REJECTS = "rejects.parquet"
# Folders below --out from which a run resumes: checkpoints; a sweep's trials; transcoded videos; cached features,
# labels, predictions or outputs of an evaluation.
CHECKPOINTS, TRIALS, VIDEOS, SHARDS = "checkpoints", "trials", "videos", "shards"
PRETRAINED = "pretrained"
"""Folder of what several trials of a sweep start from."""
# These say where and how fast a stage runs, not what it computes: they may change when it resumes.
FREE_SETTINGS = (
    *("scale.", "tracking.", "data."),
    *("loop.keep_checkpoints", "loop.log_every", "loop.micro_batch", "loop.recompute", "loop.compile"),
    *("loop.max_skipped", "loop.profile_steps", "loop.stop_after_epoch", "optim.fused", "concurrent_trials"),
    "measured_videos",
    *("node", "chunk_segments", "batch_size"),
)
# What a stage compares for itself, since more of it extends an earlier run.
EXTENDED = {
    "sweep": (
        *("space", "search", "samples", "seeds", "pretrain.loop.epochs", "pretrain.loop.steps"),
        *("finetune.loop.epochs", "finetune.loop.steps"),
    )
}
# Of stages whose settings another stage holds: a sweep, a recipe.
STAGE_GROUPS = ("", *(f"{group}." for group in GROUPS.values()))


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run of a stage, resolved once: absolute, or a URI."""

    stage: str
    config: StageConfig
    inputs: Mapping[str, str]
    """Digests of what the stage reads, by name: another digest means another run."""
    root: str

    @classmethod
    def of(cls, stage: str, config: StageConfig, inputs: Mapping[str, str] | None = None) -> RunFolder:
        """Return the folder that a stage's settings name."""
        return cls(stage, config, dict(inputs or {}), storage.absolute(config.out))

    def path(self, *parts: str) -> str:
        """Return a name below the folder."""
        return storage.join(self.root, *parts)

    def exists(self, *parts: str) -> bool:
        """Return whether there is such a file or folder."""
        return storage.exists(self.path(*parts))

    def remove(self, *parts: str) -> None:
        """Delete a file, if there is one."""
        storage.remove(self.path(*parts))

    def write(self, name: str, content: bytes) -> str:
        """Write a file and return its path."""
        storage.write_bytes(self.path(name), content)
        return self.path(name)

    def write_table(self, name: str, table: pa.Table) -> str:
        """Write a parquet file and return its path."""
        storage.write_table(self.path(name), table)
        return self.path(name)

    def write_json(self, name: str, value: Any) -> str:
        """Write a JSON file and return its path."""
        storage.write_json(self.path(name), value)
        return self.path(name)

    def check(self) -> None:
        """Check that a run of the stage can begin here.

        Raises:
            UserError: the folder cannot be written to, or holds a run of another stage.
        """
        self.check_stage()
        storage.check_writable(self.root)

    def begin(self) -> None:
        """Write run.json and delete the result of an earlier run."""
        self.write_json(RUN, self._settings())
        self.remove(RESULT)

    def finished(self) -> dict[str, Any] | None:
        """Return the result of an earlier, finished run of the same stage with the same settings, if any.

        Raises:
            UserError: the folder holds a run of another stage, or one that began with other settings or inputs.
        """
        earlier = self.check_stage()
        if earlier is None:
            return None
        done = self.exists(RESULT)
        if done or any(self.exists(folder) for folder in (CHECKPOINTS, TRIALS, VIDEOS, SHARDS)):
            self._check_same(earlier)
        result = dict(storage.read_json(self.path(RESULT))) if done else None
        return None if result is not None and self._goes_on(result) else result

    def _goes_on(self, result: Mapping[str, Any]) -> bool:
        """Return whether an earlier result is of a part of what this run trains."""
        was, now = (_ends(leaves_of(each)) for each in (result.get("config", {}), to_json(self.stage, self.config)))
        return any(end > was.get(loop, end) for loop, end in now.items())

    def _settings(self) -> dict[str, Any]:
        return to_json(self.stage, self.config) | {INPUTS: dict(self.inputs)}

    def _earlier(self) -> dict[str, Any] | None:
        """Return the run.json of an earlier start."""
        if not self.exists(RUN):
            return None
        try:
            return dict(storage.read_json(self.path(RUN)))
        except ValueError as error:
            raise UserError(
                f"--out {self.root!r} holds a damaged {RUN} ({error}): delete it or give another --out"
            ) from None

    def check_stage(self) -> dict[str, Any] | None:
        """Return the run.json of an earlier start, if any.

        Raises:
            UserError: the folder holds a run of another stage, or a run.json that cannot be read.
        """
        earlier = self._earlier()
        if earlier is not None and earlier.get("stage") != self.stage:
            raise UserError(
                f"--out {self.config.out!r} holds a run of stage {earlier.get('stage')!r}: give another folder"
            )
        return earlier

    def _check_same(self, earlier: dict[str, Any]) -> None:
        """Raise `UserError` where the earlier run differs from this one in what it computes."""
        out = self.config.out
        # A run of an earlier version lacks the settings that came later: it had what is their default, or was before.
        defaults = leaves_of(to_json(self.stage, type(self.config)()))
        defaults |= {key: value for key in defaults for end, value in BEFORE.items() if key.endswith(end)}
        before, now = _fixed(defaults | leaves_of(earlier)), _fixed(leaves_of(self._settings()))
        for key in sorted((before.keys() | now.keys()) - set(EXTENDED.get(self.stage, ()))):
            if before.get(key) == now.get(key):
                continue
            if key.startswith(f"{INPUTS}."):
                what = key.removeprefix(f"{INPUTS}.")
                raise UserError(
                    f"--out {out!r} holds a run on another {what}, which has changed since: give another --out"
                )
            raise UserError(
                f"--out {out!r} holds a run with {key} {before.get(key)!r}, not {now.get(key)!r}: "
                "give another --out, or the same settings to resume"
            )


def _ends(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Return the epoch after which each loop among the settings of a stage ends."""
    name = "loop.stop_after_epoch"
    loops = {key.removesuffix(name): value for key, value in leaves.items() if key.endswith(name)}
    return {loop: min(stop or math.inf, leaves[f"{loop}loop.epochs"]) for loop, stop in loops.items()}


def _fixed(leaves: dict[str, Any]) -> dict[str, Any]:
    free = tuple(f"{prefix}{name}" for name in FREE_SETTINGS for prefix in STAGE_GROUPS)
    return {key: value for key, value in leaves.items() if key != "out" and not key.startswith(free)}
