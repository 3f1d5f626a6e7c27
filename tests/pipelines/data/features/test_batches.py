"""Memory of batches from cached features: used again, and never while anything refers to what it holds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.data.clip_order import ClipOrder
from pipelines.data.features.batches import BufferPool, CachedClips
from pipelines.data.features.cache import (
    INDEX,
    FeatureMeta,
    finish,
    frame_times,
    shard_path,
    shard_writer,
)
from pipelines.data.features.reader import FeatureReader
from pipelines.data.manifest import SCHEMA
from s5.batch import ClipBatch
from s5.config import ClipConfig
from s5.video.clip_times import clip_seed, long_short_times

VIDEOS, FRAMES, TOKENS, WIDTH, CHUNK, CLIP = 4, 23, 3, 8, 5, 7
CLIPS = ClipConfig(frames=CLIP, long_stride=1.0)
Float16Array = npt.NDArray[np.float16]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pa.Table, Float16Array]:
    """Write features of random tokens, two videos a shard, and return their folder, manifest and values."""
    folder = str(tmp_path_factory.mktemp("features"))
    layout = {"tokens": TOKENS, "width": WIDTH, "chunk_frames": CHUNK, "frames_per_second": 1.0}
    meta = FeatureMeta(backbone={}, weights="", mean=[], std=[], precision="fp32", manifest="", **layout)  # type: ignore[arg-type]
    shape = (VIDEOS, FRAMES, TOKENS, WIDTH)
    tokens_VTND = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)
    times_T = frame_times(0, FRAMES, 1.0)
    for shard in range(VIDEOS // 2):
        rows: list[dict[str, Any]] = []
        with shard_writer(folder, shard, meta) as writer:
            for video in (2 * shard, 2 * shard + 1):
                place = {"shard": shard, "batch": writer.batches, "frames": FRAMES, "start_s": 0.0}
                rows.append({"video_id": f"v{video}", "uri": "", "reason": ""} | place)
                for first in range(0, FRAMES, CHUNK):
                    chunk = slice(first, first + CHUNK)
                    writer.add(times_T[chunk], tokens_VTND[video, chunk])
        storage.write_table(shard_path(folder, shard, "parquet"), pa.Table.from_pylist(rows, INDEX))
    facts = {"uri": "", "split": "train", "width": 1, "height": 1, "start_s": 0.0, "end_s": float(FRAMES)}
    facts |= {"duration_s": float(FRAMES), "fps": 25.0, "num_frames": 25 * FRAMES}
    manifest = pa.Table.from_pylist([{"video_id": f"v{video}"} | facts for video in range(VIDEOS)], SCHEMA)
    finish(folder, meta, manifest, VIDEOS // 2, np.full((TOKENS, WIDTH), 7, np.float16))
    return folder, manifest, tokens_VTND


def source(folder: str, prefetch: int) -> CachedClips:
    data = DataConfig(prefetch_batches=prefetch)
    return CachedClips(features=folder, clips=CLIPS, frame_size=1, data=data, protocol="windows")


def training(folder: str, manifest: pa.Table, prefetch: int, steps: int = 24) -> Generator[ClipBatch]:
    return source(folder, prefetch).training(manifest, ClipOrder(VIDEOS, 2, epochs=1, seed=3, steps=steps), 5)


def test_any_frames_are_read_in_any_order(written: tuple[str, pa.Table, Float16Array]) -> None:
    folder, _, tokens_VTND = written
    reader = FeatureReader(folder)
    rng = np.random.default_rng(1)
    black = np.full((TOKENS, WIDTH), 7, np.float16)
    for frames in (
        [4, 5],
        [0, 1, 2, 9, 10, 3, 3],
        [-1, 0, 1, -1, -1, 4, 5],
        [22, 21, 20],
        rng.integers(-1, FRAMES, 40),
    ):
        frames_T = np.array(frames, np.int64)
        found_TND = np.empty((len(frames_T), TOKENS, WIDTH), np.float16)
        reader.read("v3", frames_T, found_TND)
        # Frame by frame, from the values that were written.
        slow_TND = np.stack([black if frame < 0 else tokens_VTND[3, frame] for frame in frames_T])
        np.testing.assert_array_equal(found_TND, slow_TND)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 6])
def test_batches_that_are_held_keep_their_tokens(written: tuple[str, pa.Table, Float16Array], prefetch: int) -> None:
    folder, manifest, _ = written
    truth = [batch.long.clone() for batch in training(folder, manifest, 0)]
    assert len({tuple(long.flatten().tolist()) for long in truth}) > 8
    # Of each batch something else is held: nothing, all, a view, and numpy's view of a view.
    kept: list[Callable[[torch.Tensor], Any]] = [
        lambda long: None,
        lambda long: long,
        lambda long: long[1, 2:].transpose(0, 1),
        lambda long: long[0].numpy()[3],
    ]
    held = []
    for step, batch in enumerate(training(folder, manifest, prefetch)):
        torch.testing.assert_close(batch.long, truth[step], rtol=0, atol=0)
        held.append((kept[step % 4](batch.long), kept[step % 4](truth[step])))
    for found, wanted in held:
        if wanted is not None:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_pairs_are_the_planned_long_and_short_clips(written: tuple[str, pa.Table, Float16Array], prefetch: int) -> None:
    folder, manifest, tokens_VTND = written
    clips = ClipConfig(frames=4, long_stride=3.0, short_stride=1.0)
    paired = replace(source(folder, prefetch), clips=clips, pairs=True, protocol="uniform")
    shown = 0
    for batch in paired.training(manifest, ClipOrder(VIDEOS, 2, epochs=3, seed=3), 5):
        assert batch.short is not None
        for name, seed, long, short in zip(batch.video_ids, batch.seeds.tolist(), batch.long, batch.short, strict=True):
            assert seed == clip_seed(5, batch.epoch, name)
            for times_T, found in zip(long_short_times(clips, 0.0, FRAMES, 25.0, seed), (long, short), strict=True):
                frames = [int(time + 1e-3) for time in times_T]
                np.testing.assert_array_equal(found.numpy(), tokens_VTND[int(name[1:])][frames])
                shown += 1
    assert shown == 2 * 3 * VIDEOS
    (evaluated, *_) = paired.evaluation(manifest, 1, VIDEOS)
    assert evaluated.short is None
    assert evaluated.long.shape[:2] == (VIDEOS, 4)


def places(batches: Iterable[ClipBatch]) -> set[int]:
    """Return where in memory batches lay that are dropped one by one."""
    return {batch.long.data_ptr() for batch in batches}


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has pinned memory in its own cache")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_memory_of_dropped_batches_is_reused(written: tuple[str, pa.Table, Float16Array], prefetch: int) -> None:
    folder, manifest, _ = written
    made = places(training(folder, manifest, prefetch))
    assert len(made) <= prefetch + 2
    evaluated = source(folder, prefetch).evaluation(manifest, 1, 3)
    sizes = [(len(batch.video_ids), batch.long.clone()) for batch in evaluated]
    assert sum(count for count, _ in sizes) == VIDEOS * (FRAMES - CLIP + 1)
    # The last batch is a smaller one, in the memory of a larger one.
    assert sizes[-1][0] < 3


def test_the_pool_reuses_only_memory_without_references() -> None:
    memory = BufferPool(keep=1)
    first, second = memory.take((4, 5)), memory.take((4, 5))
    places = first.data_ptr(), second.data_ptr()
    assert places[0] != places[1]
    view = first[2]
    del first
    third = memory.take((4, 5))
    assert third.data_ptr() not in places
    del view
    assert memory.take((2, 3)).data_ptr() == places[0]
    assert memory.take((4, 6)).data_ptr() not in (places[1], third.data_ptr())


def test_files_are_closed_with_the_last_batch(written: tuple[str, pa.Table, Float16Array]) -> None:
    folder, manifest, _ = written
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no list of this process's maps")
    gc.disable()
    try:
        batches = training(folder, manifest, 2)
        held = next(batches)
        assert folder in maps.read_text()
        batches.close()
        assert folder not in maps.read_text()
        assert len(held.video_ids) == 2
    finally:
        gc.enable()
