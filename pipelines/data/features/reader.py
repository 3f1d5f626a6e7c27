"""Reads the tokens of clips from cached features (`cache` has their layout).

Shapes: T frames of a clip, N tokens a frame, D width.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs

from pipelines import storage
from pipelines.data.features.cache import INDEX_FILE, PADDING, FloatArray, TokenArray, read_meta, shard_path
from pipelines.errors import UserError
from s5.errors import VideoError
from s5.video.clip_times import TOLERANCE_S

OPEN_SHARDS = 64
"""Shards that a reader keeps open."""


@dataclass(frozen=True)
class IndexEntry:
    """The row of the index for one video; see `cache.INDEX`."""

    shard: int
    batch: int
    frames: int
    start_s: float
    reason: str


class FeatureReader:
    """Reads the tokens of clips; safe for several threads. Files are closed with the last reference to the reader."""

    def __init__(self, folder: str) -> None:
        self.folder = storage.absolute(folder)
        self.meta = read_meta(folder)
        index = storage.read_table(storage.join(self.folder, INDEX_FILE))
        # Rows become entries when they are read: a million objects would take seconds, and their memory.
        self._rows = {name: row for row, name in enumerate(index["video_id"].to_pylist())}
        self._index = index.select([field.name for field in fields(IndexEntry)]).combine_chunks()
        self._padding: TokenArray = np.load(io.BytesIO(storage.read_bytes(storage.join(self.folder, PADDING))))
        # Not a cached method: its cache would keep the reader and its files alive for ever.
        self._shard = lru_cache(OPEN_SHARDS)(partial(_open_shard, self.folder))

    def frames(self, video_id: str, times_T: FloatArray) -> npt.NDArray[np.int64]:
        """Return which frames (T,) of a video are on screen at the given times; beyond its end, the last one.

        Raises:
            VideoError: the video has no features; gives the reason.
        """
        entry = self._entry(video_id)
        count_T = np.floor((times_T - entry.start_s + TOLERANCE_S) * self.meta.frames_per_second)
        return np.clip(count_T, 0, entry.frames - 1).astype(np.int64)

    def read(self, video_id: str, frames_T: npt.NDArray[np.int64], out_TND: TokenArray) -> None:
        """Copy the tokens of a video's frames to `out_TND`; a frame -1 is black.

        Raises:
            VideoError: the video has no features; gives the reason.
            UserError: its shard is missing or damaged.
        """
        entry = self._entry(video_id)
        batch_T, row_T = np.divmod(frames_T, self.meta.chunk_frames)
        for batch in np.unique(batch_T):
            here = np.flatnonzero(batch_T == batch)
            if batch < 0:
                out_TND[here] = self._padding
                continue
            tokens_TND = self._tokens(entry.shard, entry.batch + int(batch))
            # Copy runs of frames: numpy copies a slice without the GIL, but must reacquire it after each.
            breaks = np.flatnonzero((np.diff(here) != 1) | (np.diff(row_T[here]) != 1)) + 1
            for target_R in np.split(here, breaks):
                first, row, count = target_R[0], row_T[target_R[0]], len(target_R)
                out_TND[first : first + count] = tokens_TND[row : row + count]

    def _entry(self, video_id: str) -> IndexEntry:
        row = self._rows.get(video_id)
        entry = None if row is None else IndexEntry(*(column[row].as_py() for column in self._index.columns))
        if entry is None or entry.reason:
            raise VideoError(f"no cached features: {entry.reason if entry else 'not in their index'}")
        return entry

    def _tokens(self, shard: int, batch: int) -> TokenArray:
        """Return the tokens (T, N, D) of a record batch: a view of the memory map for local files."""
        content, lock = self._shard(shard)
        # Arrow does not document that a file may be read by several threads at once.
        with lock:
            column = content.get_batch(batch).column("tokens")
        flat: TokenArray = column.values.to_numpy(zero_copy_only=True)
        return flat.reshape(-1, self.meta.tokens, self.meta.width)


def _open_shard(folder: str, shard: int) -> tuple[Any, Lock]:
    path = shard_path(folder, shard, "arrow")
    system, inner = storage.filesystem(path)
    try:
        local = isinstance(system, fs.LocalFileSystem)
        return pa.ipc.open_file(pa.memory_map(inner) if local else system.open_input_file(inner)), Lock()
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise UserError(f"features is {folder!r}: {path} is missing or damaged ({error}); recompute them") from None
