"""Cached features: tokens of a frozen backbone in Arrow files, with a record of what produced them.

FEATURES/features.json         `FeatureMeta`; written last, so that features without it are known to be unfinished
FEATURES/index.parquet         a row of INDEX per video of the manifest, in its order
FEATURES/videos.parquet        what the manifest says of these videos, labels and splits apart
FEATURES/padding.npy           tokens (N, D) of a black frame, used beyond the end of a video
FEATURES/shards/00012.arrow    frames of some videos: `time_s` and `tokens`; a record batch is a chunk of one video
FEATURES/shards/00012.parquet  their rows of the index; written last, so that a shard without it is recomputed

Arrow's file format is not compressed: a local shard is memory-mapped, and only the frames of the clips are read. From a
shard in an object store, the chunks with these frames are fetched each time. Features are never all in memory.

Shapes: T frames, N tokens a frame, D width.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from pipelines import storage
from pipelines.data.manifest import SCHEMA, digest
from pipelines.errors import UserError, last_line
from pipelines.running.run_folder import SHARDS
from s5.config import SEGMENTS, BackboneConfig
from s5.video.clip_times import TOLERANCE_S

TokenArray = npt.NDArray[np.float16]
FloatArray = npt.NDArray[np.float64]

FORMAT = 1
META, INDEX_FILE, PADDING, VIDEOS = "features.json", "index.parquet", "padding.npy", "videos.parquet"
OF_VIDEO = tuple(name for name in SCHEMA.names if name not in ("dataset", "split", "label", "class_name", "target"))
"""Columns of a manifest that features may depend on."""
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
"""Where the frames of a video are: shard, first record batch, number of frames, time of the first; or why there are
none (`reason`)."""
# Settings of the backbone that do not change its tokens, or that the digest of its weights covers.
NOT_COMPARED = ("weights", "frozen", "tokens", "width", "made_by")
AGAIN = "recompute or import them again"
"""What helps where features do not fit a manifest."""
IMPORTED = "imported: "
"""Begins what stands for the digest of the weights where the features come from files of another program."""


@dataclass(frozen=True, kw_only=True)
class FeatureMeta:
    """What produced cached features."""

    backbone: dict[str, Any]
    """Settings of the backbone (BackboneConfig), `weights` and `frozen` apart."""
    weights: str
    """Digest of its weights; of imported features `IMPORTED` and the digest of their files."""
    mean: list[float]
    """Mean of the colours, 0 to 255, that was subtracted."""
    std: list[float]
    """Standard deviation of the colours that was divided by."""
    precision: str
    """Precision of the computation."""
    frames_per_second: float
    """Frames per second: frame k of a video is the one on screen k / frames_per_second after its `start_s`."""
    manifest: str
    """Digest of the manifest."""
    tokens: int
    """Tokens N of a frame."""
    width: int
    """Width D of a token."""
    chunk_frames: int
    """Frames of a record batch; the last one of a video may have fewer."""
    dtype: str = "float16"
    """Type of the tokens."""
    format: int = FORMAT
    """Version of this layout."""

    @property
    def imported(self) -> bool:
        """Whether they stand for a frame encoder: features of another program, of whose backbone the name alone is
        known, or embeddings of segments."""
        return self.weights.startswith(IMPORTED) or self.backbone["name"] == SEGMENTS

    @property
    def digest(self) -> str:
        """Digest that identifies the features."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=12).hexdigest()


def backbone_settings(config: BackboneConfig) -> dict[str, Any]:
    """Return the settings of a backbone that its tokens depend on, without its weights."""
    return {name: value for name, value in asdict(config).items() if name not in NOT_COMPARED}


def frame_times(start_s: float, end_s: float, frames_per_second: float) -> FloatArray:
    """Return the times (T,) of a segment's frames at a constant rate: those before its end, at least one."""
    count = max(1, math.ceil((end_s - start_s - TOLERANCE_S) * frames_per_second))
    return start_s + np.arange(count, dtype=np.float64) / frames_per_second


def segment_times(starts_U: FloatArray, segment_s: float, end_s: float, frames: int) -> FloatArray:
    """Return the times (U x T,) of the frames of segments, each in the middle of one of T equal parts.

    The last segment of a video may be shorter.
    """
    parts_U = (np.minimum(starts_U + segment_s, end_s) - starts_U) / frames
    times_UT: FloatArray = starts_U[:, None] + parts_U[:, None] * (np.arange(frames) + 0.5)
    return times_UT.reshape(-1)


# --- writing --------------------------------------------------------------------------------------------------------


def shard_path(folder: str, shard: int, suffix: str) -> str:
    """Return the name of one of a shard's two files."""
    return storage.join(folder, SHARDS, f"{shard:05d}.{suffix}")


def finished_shards(folder: str) -> set[int]:
    """Return the complete shards, after deleting partial files that an earlier run left on a local disk."""
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
        """Append frames of one video as a record batch."""
        flat = pa.array(np.ascontiguousarray(tokens_TND).reshape(-1))
        columns = [pa.array(times_T), pa.FixedSizeListArray.from_arrays(flat, type=self._schema.field("tokens").type)]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self.batches += 1

    def close(self) -> None:
        """Write the end of the file."""
        self._writer.close()


@contextmanager
def shard_writer(folder: str, shard: int, meta: FeatureMeta) -> Iterator[ShardWriter]:
    """Yield a writer for a shard's frames; the file appears when the block ends without an error."""
    with storage.atomic_write(shard_path(folder, shard, "arrow")) as part:
        writer = ShardWriter(part, meta)
        try:
            yield writer
        finally:
            writer.close()


def finish(folder: str, meta: FeatureMeta, manifest: pa.Table, shards: int, padding_ND: TokenArray) -> pa.Table:
    """Write the files that complete the features, and return the index."""
    index = pa.concat_tables([storage.read_table(shard_path(folder, shard, "parquet")) for shard in range(shards)])
    storage.write_table(storage.join(folder, INDEX_FILE), index)
    storage.write_table(storage.join(folder, VIDEOS), unlabelled(manifest))
    buffer = io.BytesIO()
    np.save(buffer, padding_ND)
    storage.write_bytes(storage.join(folder, PADDING), buffer.getvalue())
    storage.write_json(storage.join(folder, META), asdict(meta))
    return index


# --- reading --------------------------------------------------------------------------------------------------------


def read_meta(folder: str) -> FeatureMeta:
    """Return what produced cached features.

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


def with_imported(config: BackboneConfig, folder: str) -> BackboneConfig:
    """Return settings of a backbone with the tokens and width of imported features, which stand in its place.

    Raises:
        UserError: the features are imported and were made by another backbone, or are of another size.
    """
    meta = read_meta(folder) if folder else None
    if meta is None or not meta.imported:
        if meta is not None and config.name == SEGMENTS:
            raise UserError(
                f"features is {folder!r}: they are tokens of frames, not embeddings of segments; give "
                f"--model.backbone.name {meta.backbone['name']}, or the --out of `features --segment-s`"
            )
        return config
    name = meta.backbone["name"]
    if name != config.name:
        raise UserError(
            f"features is {folder!r}: imported from {name!r}, not {config.name!r}; give --model.backbone.name {name}, "
            "or other features"
        )
    for key, there in (("tokens", meta.tokens), ("width", meta.width)):
        if (here := getattr(config, key)) not in (0, there):
            raise UserError(f"features is {folder!r}: model.backbone.{key} is {there} there, not {here}; give {there}")
    off = {"no-cls-token": config.cls_token, "tubelet 1": config.tubelet != 1}
    if remedies := [f"--model.backbone.{remedy}" for remedy, given in off.items() if given]:
        raise UserError(
            f"features is {folder!r}: imported features are taken as they are; give {' and '.join(remedies)}"
        )
    made_by = meta.weights if name == SEGMENTS else ""
    if config.made_by not in ("", made_by):
        raise UserError(
            f"features is {folder!r}: embeddings of another encoder than the model was trained on; give those"
        )
    return replace(config, tokens=meta.tokens, width=meta.width, weights="", made_by=made_by)


def check_fresh(folder: str, meta: FeatureMeta, backbone: BackboneConfig, weights: str, manifest: pa.Table) -> None:
    """Check that features were produced by the backbone of this run, from the videos of its manifest.

    A manifest may have fewer videos than there are features of, or other labels and splits.

    Args:
        folder: the features.
        meta: what produced them.
        backbone: settings of the backbone.
        weights: digest of its weights.
        manifest: the manifest.

    Raises:
        UserError: they differ; names the difference.
    """
    check_backbone(folder, meta, backbone)
    stale = f"features is {folder!r}: computed"
    if not meta.imported and meta.weights != weights:
        raise UserError(
            f"{stale} with other weights of the backbone than this run's; recompute them, or give the checkpoint or "
            "model.backbone.weights that they were computed with"
        )
    if meta.manifest == digest(manifest):
        return
    stored, videos = _stored(folder), unlabelled(manifest)
    strange = videos.filter(pc.invert(pc.is_in(_keys(videos), _keys(stored)))).sort_by("video_id")
    if len(strange):
        (first,) = strange.slice(0, 1).to_pylist()
        raise UserError(
            f"{stale} from another manifest, which lacks {len(strange)} of the {len(manifest)} videos or has other "
            f"facts of them, such as {first['video_id']!r}{_difference(first, stored)}; {AGAIN}"
        )


def unlabelled(manifest: pa.Table) -> pa.Table:
    """Return a manifest without labels and splits, and without what gives access to its files."""
    table = manifest.select(OF_VIDEO)
    uris = pa.array([storage.redacted(uri) for uri in table["uri"].to_pylist()], pa.string())
    return table.set_column(table.schema.get_field_index("uri"), "uri", uris)


def _difference(video: dict[str, Any], stored: pa.Table) -> str:
    """Return in which fact a video differs from the one of its id that features are of, if there is one."""
    for other in stored.filter(pc.equal(stored["video_id"], video["video_id"])).to_pylist():
        name = next(name for name in OF_VIDEO if repr(video[name]) != repr(other[name]))
        return f" (its {name} is {video[name]!r}, there {other[name]!r})"
    return ""


def _keys(videos: pa.Table) -> pa.ChunkedArray:
    """Return all columns of each video in one text, in which a null is one too."""
    texts = [pc.cast(column, pa.string()) for column in videos.columns]
    return pc.binary_join_element_wise(*texts, "\x00", null_handling="replace", null_replacement="\x01")


def _stored(folder: str) -> pa.Table:
    """Return the videos that features are of.

    Raises:
        UserError: they are of a version that did not store them, or damaged.
    """
    path = storage.join(storage.absolute(folder), VIDEOS)
    if not storage.exists(path):
        raise UserError(f"features is {folder!r}: computed from another manifest, or it has changed since; {AGAIN}")
    try:
        return storage.read_table(path).select(OF_VIDEO)
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise UserError(f"features is {folder!r}: {VIDEOS} is damaged ({last_line(str(error))}); {AGAIN}") from None


def check_backbone(folder: str, meta: FeatureMeta, backbone: BackboneConfig) -> None:
    """Check that features are those of a backbone, as far as its settings say.

    Raises:
        UserError: they differ; names the difference.
    """
    stale = f"features is {folder!r}: computed"
    if meta.imported and not backbone.tokens:
        raise UserError(
            f"features is {folder!r}: imported ones of {meta.backbone['name']!r}, where the model has a frame encoder "
            f"of its own, {backbone.name!r}; give features that it computed, or a model trained on these"
        )
    with_imported(backbone, folder)
    if backbone.tokens and not meta.imported:
        raise UserError(
            f"{stale} by the backbone {meta.backbone['name']!r}, where the model was made for imported features of "
            f"{backbone.name!r}; give those"
        )
    for name, value in () if meta.imported else backbone_settings(backbone).items():
        if meta.backbone.get(name) != value:
            there = meta.backbone.get(name)
            raise UserError(
                f"{stale} with model.backbone.{name} {there!r}, not {value!r}; recompute them or give "
                f"--model.backbone.{name} {there}"
            )
