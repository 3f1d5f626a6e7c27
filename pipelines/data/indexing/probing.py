"""The facts of each video file, probed once by Ray Data tasks, in parts from which a run that was ended resumes.

    files -> known parts? -> Ray Data, PROBED_AT_ONCE files at a time -> a part every PART_S seconds -> facts by file

A part holds the facts of files whose size and time of change are the same when the next run begins; others are probed
again, and so are files that failed, since the reason may have passed.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.config import DecodeConfig
from pipelines.data.clip_batches import in_chunks, limit
from pipelines.data.decoding.decode_tasks import PROBED, probe_chunk
from pipelines.errors import UserError
from pipelines.running.resources import resources
from pipelines.running.stage import Stage
from pipelines.storage import provenance

Facts = dict[str, Any]
Stamp = tuple[int, int]
"""Size of a file in bytes and time of its last change in ns."""

PARTS = "probed"
"""Folder below --out of the facts that a run has found so far."""
PART_S = 30.0
"""Seconds of work that a run that is ended loses, at most, beside the videos that it was just reading."""
PROBED_AT_ONCE = 8192
"""Files of one Ray Data execution, whose tasks are all made in advance."""
FACT_NAMES = [name for name in PROBED.names if name != "reason"]
STAMP_NAMES = ("uri", "size", "changed_ns")
PART_SCHEMA = pa.schema(
    [("uri", pa.string()), ("size", pa.int64()), ("changed_ns", pa.int64()), *(PROBED.field(n) for n in FACT_NAMES)]
)
PROGRAM = b"program"
"""Key of a part's metadata that says which program probed; the facts of another one are not used."""


def probe_files(uris: list[str], stamps: Mapping[str, Stamp], data: DecodeConfig, stage: Stage) -> dict[str, Facts]:
    """Return the facts (PROBED) of each file, which hold the `reason` of one that cannot be read.

    Args:
        uris: the files, each once.
        stamps: size and time of change of files in object stores, by their URIs.
        data: decoding.
        stage: the running stage, below whose --out parts are kept until `remove_parts`.

    Raises:
        UserError: a task asks for more CPUs than there are.
    """
    parts = Parts(stage, stamps)
    facts = parts.known(set(uris))
    left = [uri for uri in uris if uri not in facts]
    if facts:
        stage.info(f"{len(facts)} of {len(uris)} files were probed by an earlier run and have not changed since")
    rejects = 0
    try:
        with stage.progress_bar("probed", len(left), "files") as bar:
            for uri, found in zip(left, _probed(left, data), strict=True):
                facts[uri] = found
                rejects += bool(found["reason"])
                parts.add(uri, found)
                bar.advance(f"{rejects} rejects")
    finally:
        parts.write()
    return facts


def remove_parts(stage: Stage) -> None:
    """Delete what `probe_files` keeps for a run that is ended, once the manifest is written."""
    storage.remove_folder(stage.path(PARTS))


class Parts:
    """The facts of files that a run has found so far, as Parquet files below its --out."""

    def __init__(self, stage: Stage, stamps: Mapping[str, Stamp]) -> None:
        self._stage, self._stamps = stage, stamps
        self._program = json.dumps([provenance.versions(), provenance.commit()]).encode()
        self._rows: list[Facts] = []
        self._written = time.monotonic()

    def known(self, uris: set[str]) -> dict[str, Facts]:
        """Return the facts of those files that earlier runs have probed and that have not changed since."""
        facts: dict[str, Facts] = {}
        for path in storage.files_below(self._stage.path(PARTS)):
            try:
                table = storage.read_table(path)
            except (pa.ArrowInvalid, OSError) as error:
                self._stage.info(f"{path} cannot be read ({str(error).splitlines()[0]}): its files are probed again")
                continue
            if (table.schema.metadata or {}).get(PROGRAM) != self._program:
                continue
            for row in table.to_pylist():
                stamp = row.pop("size"), row.pop("changed_ns")
                if (uri := row.pop("uri")) in uris and stamp == self._stamp(uri):
                    facts[uri] = {"reason": None} | row
        return facts

    def add(self, uri: str, found: Facts) -> None:
        """Add a file's facts, and write a part where the last one is PART_S seconds old."""
        if not found["reason"] and (stamp := self._stamp(uri)):
            self._rows.append(
                {name: found[name] for name in FACT_NAMES} | dict(zip(STAMP_NAMES, (uri, *stamp), strict=True))
            )
        if time.monotonic() - self._written > PART_S:
            self.write()

    def write(self) -> None:
        """Write what was added since the last part."""
        if self._rows:
            table = pa.Table.from_pylist(self._rows, PART_SCHEMA.with_metadata({PROGRAM: self._program}))
            storage.write_table(self._stage.path(PARTS, f"{uuid.uuid4().hex}.parquet"), table)
        self._rows, self._written = [], time.monotonic()

    def _stamp(self, uri: str) -> Stamp | None:
        """Return a file's size and time of change; None for one whose store does not state them, such as a server."""
        if storage.is_uri(uri):
            return self._stamps.get(uri)
        try:
            status = os.stat(uri)
        except OSError:
            return None
        return status.st_size, status.st_mtime_ns


def _probed(uris: list[str], data: DecodeConfig) -> Iterator[Facts]:
    """Yield the facts of each file in order, or the reason why there are none."""
    for first in range(0, len(uris), PROBED_AT_ONCE):
        table = pa.table({"uri": pa.array(uris[first : first + PROBED_AT_ONCE], pa.string())})
        yield from in_tasks(table, partial(probe_chunk, timeout_s=data.decode_timeout_s), data)


def in_tasks(rows: pa.Table, work: Callable[[pa.Table], pa.Table], data: DecodeConfig) -> Iterator[dict[str, Any]]:
    """Yield what `work` makes of chunks of rows, row by row in order; one Ray Data execution.

    Raises:
        UserError: a task asks for more CPUs than there are.
    """
    cpus = resources().get("CPU", 0.0)
    if data.cpus_per_decode > cpus:
        raise UserError(f"data.cpus_per_decode is {data.cpus_per_decode:g}: the cluster has {cpus:g} CPUs; lower it")
    if len(rows) == 0:
        return
    dataset = in_chunks(rows, data.clips_per_task)
    limit(dataset, (data.decode_tasks or int(cpus / data.cpus_per_decode)) * data.cpus_per_decode)
    done = dataset.map_batches(work, batch_size=None, batch_format="pyarrow", num_cpus=data.cpus_per_decode)
    batches: Any = done.iter_batches(batch_size=None, batch_format="pyarrow")
    for batch in batches:
        yield from batch.to_pylist()
