"""Files of features as other programs write them, imported without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import save_file as save_arrays

from pipelines.data.features.cache import (
    IMPORTED,
    FeatureMeta,
    finish,
)
from pipelines.data.features.importing import (
    import_shard,
    list_files,
    plan,
)
from pipelines.data.features.reader import FeatureReader
from pipelines.data.manifest import SCHEMA

Array = npt.NDArray[Any]
TOKENS, WIDTH = 3, 8


def frames(count: int, seed: int = 0, tokens: int = TOKENS, width: int = WIDTH) -> Array:
    return np.random.default_rng(seed).standard_normal((count, tokens, width)).astype(np.float32)


def write(path: Path, array: Array, file_format: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match file_format or path.suffix[1:]:
        case "npy":
            np.save(path, array)
        case "npz":
            np.savez_compressed(path, labels=np.zeros(2), features=array)
        case "pt":
            torch.save({"features": torch.from_numpy(array), "fps": 1.0}, path)
        case "safetensors":
            save_arrays({"x": array}, path)
        case "h5":
            h5py = pytest.importorskip("h5py")
            with h5py.File(path, "w") as file:
                file["features"] = array


def video(name: str, seconds: float, start_s: float = 0.0, end_s: float | None = None, uri: str = "") -> dict[str, Any]:
    facts = {"duration_s": seconds, "fps": 25.0, "num_frames": 1, "width": 1, "height": 1, "split": "train"}
    end = seconds if end_s is None else end_s
    return facts | {"video_id": name, "uri": uri or f"/videos/{name}.mp4", "start_s": start_s, "end_s": end}


def manifest(*videos: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(videos), SCHEMA)


def meta_of(fps: float = 1.0, name: str = "vit-l") -> FeatureMeta:
    return FeatureMeta(
        backbone={"name": name},
        weights=f"{IMPORTED}0",
        mean=[],
        std=[],
        precision="",
        frames_per_second=fps,
        manifest="m",
        tokens=TOKENS,
        width=WIDTH,
        chunk_frames=4,
    )


def imported(
    folder: Path, out: Path, videos: pa.Table, shard_bytes: float = 1e9, fps: float = 1.0
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Import all shards here, in this process; return the rows of the index and the files of no video."""
    files, _ = list_files(str(folder), "auto")
    rows, strangers = plan(videos, files, str(folder), shard_bytes)
    shards = rows["shard"].to_pylist()
    for shard in range(shards[-1] + 1):
        import_shard(rows.slice(shards.index(shard), shards.count(shard)), str(out), meta_of(fps))
    index = finish(str(out), meta_of(fps), videos, shards[-1] + 1, np.zeros((TOKENS, WIDTH), np.float16))
    return index.to_pylist(), strangers


def stored(out: Path, name: str, count: int) -> Array:
    tokens = np.empty((count, TOKENS, WIDTH), np.float16)
    FeatureReader(str(out)).read(name, np.arange(count), tokens)
    return tokens
