"""Cached features: tokens of a frozen backbone in Arrow files, beside what made them.

FEATURES/features.json         `FeatureMeta`; it comes last, so that features without it are known to be unfinished
FEATURES/index.parquet         a row of INDEX for each video of the manifest, in its order
FEATURES/padding.npy           tokens (N, D) of a black frame, for what lies beyond the end of a video
FEATURES/shards/00012.arrow    frames of some videos: `time_s` and `tokens`; a record batch is a chunk of one video
FEATURES/shards/00012.parquet  their rows of the index; it comes last, so that a shard without it is recomputed

Arrow's file format is not compressed: a local shard is a memory map, of which only the frames of the clips are read. Of
a shard in an object store the chunks that hold them are fetched, again each time. Features are never all in memory.

Shapes: T frames, N tokens a frame, D width.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs

from pipelines import storage
from pipelines.errors import UserError
from pipelines.running.run_folder import SHARDS
from s5.config import BackboneConfig
from s5.errors import VideoError
from s5.video.clip_times import TOLERANCE_S

TokenArray = npt.NDArray[np.float16]
FloatArray = npt.NDArray[np.float64]

FORMAT = 1
META, INDEX_FILE, PADDING = "features.json", "index.parquet", "padding.npy"
INDEX = pa.schema(
    [
        ("video_id", pa.string()),
        ("uri", pa.string()),
        ("shard", pa.int64()),
        ("batch", pa.int64()),
        ("frames", pa.int64()),
        ("start_s", pa.float64()),
        ("reason", pa.string()),
    ]
)
"""Where a video's frames are: shard, first record batch, their number and the first one's time; `reason` says why there
are none."""
OPEN_SHARDS = 64
"""Shards that a reader keeps open."""
# Settings of the backbone that do not change its tokens, or that the digest of its weights stands for.
FREE = ("weights", "frozen")


@dataclass(frozen=True, kw_only=True)
class FeatureMeta:
    """What cached features were made from."""

    backbone: dict[str, Any]
    """Settings of the backbone (BackboneConfig), `weights` and `frozen` apart."""
    weights: str
    """Digest of its weights."""
    mean: list[float]
    """Mean of the colours, 0 to 255, that was subtracted."""
    std: list[float]
    """Standard deviation of the colours that was divided by."""
    precision: str
    """Precision of the computation."""
    frames_per_second: float
    """Frames of a second: frame k of a video is the one on screen k / frames_per_second after its `start_s`."""
    manifest: str
    """Digest of the manifest."""
    tokens: int
    """Tokens N of a frame."""
    width: int
    """Width D of a token."""
    chunk_frames: int
    """Frames of a record batch, the last one of each video apart."""
    dtype: str = "float16"
    """Type of the tokens."""
    format: int = FORMAT
    """Version of this layout."""

    @property
    def digest(self) -> str:
        """What identifies the features."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=12).hexdigest()


def backbone_settings(config: BackboneConfig) -> dict[str, Any]:
    """Return the settings of a backbone that its tokens depend on, its weights apart."""
    return {name: value for name, value in asdict(config).items() if name not in FREE}


def frame_times(start_s: float, end_s: float, frames_per_second: float) -> FloatArray:
    """Return the times (T,) of the frames of a stretch at a constant rate: those before its end, at least one."""
    count = max(1, math.ceil((end_s - start_s - TOLERANCE_S) * frames_per_second))
    return start_s + np.arange(count, dtype=np.float64) / frames_per_second


# --- writing --------------------------------------------------------------------------------------------------------


def shard_path(folder: str, shard: int, suffix: str) -> str:
    """Return the name of one of a shard's two files."""
    return storage.join(folder, SHARDS, f"{shard:05d}.{suffix}")


def finished_shards(folder: str) -> set[int]:
    """Return the shards that are complete, after deleting what an ended run has left of others on a local disk."""
    system, inner = storage.filesystem(storage.join(folder, SHARDS))
    infos = system.get_file_info(fs.FileSelector(inner, allow_not_found=True))
    for info in infos:
        if info.extension == "part":
            system.delete_file(info.path)
    return {int(info.base_name.partition(".")[0]) for info in infos if info.extension == "parquet"}


class ShardWriter:
    """Writes a shard's frames chunk by chunk."""

    def __init__(self, path: str, meta: FeatureMeta) -> None:
        tokens = pa.list_(pa.float16(), meta.tokens * meta.width)
        self._schema = pa.schema(
            [("time_s", pa.float64()), ("tokens", tokens)], metadata={"features": json.dumps(asdict(meta))}
        )
        self._writer = pa.ipc.new_file(path, self._schema)
        self.batches = 0

    def add(self, times_T: FloatArray, tokens_TND: TokenArray) -> None:
        """Append frames of one video: a record batch."""
        flat = pa.array(np.ascontiguousarray(tokens_TND).reshape(-1))
        columns = [pa.array(times_T), pa.FixedSizeListArray.from_arrays(flat, type=self._schema.field("tokens").type)]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self.batches += 1

    def close(self) -> None:
        """Write what makes the file whole."""
        self._writer.close()


@contextmanager
def shard_writer(folder: str, shard: int, meta: FeatureMeta) -> Iterator[ShardWriter]:
    """Give a writer for a shard's frames; the file is there once the block ends without an error."""
    with storage.written(shard_path(folder, shard, "arrow")) as part:
        writer = ShardWriter(part, meta)
        try:
            yield writer
        finally:
            writer.close()


def finish(folder: str, meta: FeatureMeta, shards: int, padding_ND: TokenArray) -> pa.Table:
    """Write what makes the features whole, and return the index."""
    index = pa.concat_tables([storage.read_table(shard_path(folder, shard, "parquet")) for shard in range(shards)])
    storage.write_table(storage.join(folder, INDEX_FILE), index)
    buffer = io.BytesIO()
    np.save(buffer, padding_ND)
    storage.write_bytes(storage.join(folder, PADDING), buffer.getvalue())
    storage.write_json(storage.join(folder, META), asdict(meta))
    return index


# --- reading --------------------------------------------------------------------------------------------------------


def read_meta(folder: str) -> FeatureMeta:
    """Return what cached features were made from.

    Raises:
        UserError: there are none, they are unfinished or damaged, or their layout is of another version.
    """
    path = storage.join(storage.absolute(folder), META)
    if not storage.exists(path):
        raise UserError(f"features is {folder!r}: there is no {META}; run `python -m pipelines features` to its end")
    try:
        meta = FeatureMeta(**storage.read_json(path))
    except (ValueError, TypeError) as error:
        raise UserError(f"features is {folder!r}: {META} is damaged ({error}); recompute them") from None
    if meta.format != FORMAT:
        raise UserError(f"features is {folder!r}: layout {meta.format}, this version reads {FORMAT}; recompute them")
    return meta


def check_fresh(folder: str, meta: FeatureMeta, backbone: BackboneConfig, weights: str, manifest: str) -> None:
    """Compare what features were made from with what is to be trained.

    Args:
        folder: the features.
        meta: what they were made from.
        backbone: settings of the backbone.
        weights: digest of its weights.
        manifest: digest of the manifest.

    Raises:
        UserError: they differ; says in what.
    """
    stale = f"features is {folder!r}: made"
    for name, value in backbone_settings(backbone).items():
        if meta.backbone.get(name) != value:
            there = meta.backbone.get(name)
            raise UserError(
                f"{stale} with model.backbone.{name} {there!r}, not {value!r}; recompute them or give "
                f"--model.backbone.{name} {there}"
            )
    if meta.weights != weights:
        raise UserError(
            f"{stale} by other weights of the backbone than this run's; recompute them, or give the checkpoint or "
            "model.backbone.weights that they were made with"
        )
    if meta.manifest != manifest:
        raise UserError(f"{stale} from another manifest, or it has changed since; recompute them")


@dataclass(frozen=True)
class Place:
    """A video's row of the index."""

    shard: int
    batch: int
    frames: int
    start_s: float
    reason: str


class FeatureReader:
    """Reads the tokens of clips, for several threads at once. What it has opened is closed with its last reference."""

    def __init__(self, folder: str) -> None:
        self.folder = storage.absolute(folder)
        self.meta = read_meta(folder)
        index = storage.read_table(storage.join(self.folder, INDEX_FILE))
        names = index["video_id"].to_pylist()
        columns = [index[name].to_pylist() for name in ("shard", "batch", "frames", "start_s", "reason")]
        self._places = {name: Place(*row) for name, *row in zip(names, *columns, strict=True)}
        self._padding: TokenArray = np.load(io.BytesIO(storage.read_bytes(storage.join(self.folder, PADDING))))
        # Not a method, whose cache would hold the reader and its files for ever.
        self._shard = lru_cache(OPEN_SHARDS)(partial(_opened, self.folder))

    def frames(self, video_id: str, times_T: FloatArray) -> npt.NDArray[np.int64]:
        """Return which frames (T,) of a video are on screen at the given times; beyond its end the last one.

        Raises:
            VideoError: the video has no features; says why.
        """
        place = self._place(video_id)
        count_T = np.floor((times_T - place.start_s + TOLERANCE_S) * self.meta.frames_per_second)
        return np.clip(count_T, 0, place.frames - 1).astype(np.int64)

    def read(self, video_id: str, frames_T: npt.NDArray[np.int64], out_TND: TokenArray) -> None:
        """Copy the tokens of a video's frames to `out_TND`; a frame -1 is black.

        Raises:
            VideoError: the video has no features; says why.
            UserError: its shard is missing or damaged.
        """
        place = self._place(video_id)
        batch_T, row_T = np.divmod(frames_T, self.meta.chunk_frames)
        for batch in np.unique(batch_T):
            here = np.flatnonzero(batch_T == batch)
            if batch < 0:
                out_TND[here] = self._padding
                continue
            tokens_TND = self._tokens(place.shard, place.batch + int(batch))
            # Runs of frames: numpy copies a slice without Python's lock, but has to get it back after each one.
            breaks = np.flatnonzero((np.diff(here) != 1) | (np.diff(row_T[here]) != 1)) + 1
            for target_R in np.split(here, breaks):
                first, row, count = target_R[0], row_T[target_R[0]], len(target_R)
                out_TND[first : first + count] = tokens_TND[row : row + count]

    def _place(self, video_id: str) -> Place:
        place = self._places.get(video_id)
        if place is None or place.reason:
            raise VideoError(f"no cached features: {place.reason if place else 'not in their index'}")
        return place

    def _tokens(self, shard: int, batch: int) -> TokenArray:
        """Return the tokens (T, N, D) of a record batch: a view of the memory map where there is one."""
        content, lock = self._shard(shard)
        # Arrow does not say that a file may be asked by several threads.
        with lock:
            column = content.get_batch(batch).column("tokens")
        flat: TokenArray = column.values.to_numpy(zero_copy_only=True)
        return flat.reshape(-1, self.meta.tokens, self.meta.width)


def _opened(folder: str, shard: int) -> tuple[Any, Lock]:
    path = shard_path(folder, shard, "arrow")
    system, inner = storage.filesystem(path)
    try:
        local = isinstance(system, fs.LocalFileSystem)
        return pa.ipc.open_file(pa.memory_map(inner) if local else system.open_input_file(inner)), Lock()
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise UserError(f"features is {folder!r}: {path} is missing or damaged ({error}); recompute them") from None
