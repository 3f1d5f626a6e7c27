"""Batches of clips through a real Ray Data."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.config import DataConfig
from pipelines.data import clip_batches as clips_module
from pipelines.data.clip_batches import DecodedClips
from pipelines.data.clip_order import ClipOrder
from pipelines.data.decoding import decode_tasks
from pipelines.data.manifest import SCHEMA
from s5.batch import ClipBatch
from s5.config import ClipConfig, ViewsConfig
from s5.errors import VideoError
from s5.video.clip_times import clip_seed, evaluation_times, long_short_times, training_times
from s5.video.reading import probe, read_frames
from tests.s5.videos import numbers, truncate, write_coded, write_video

CLIPS = ClipConfig(frames=4, long_stride=1.0, short_stride=0.25)
SIZE = 32
VIDEOS = 10

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for index in range(VIDEOS):
        path = write_video(folder / f"v{index}.mp4", 40 + index, fps=8)
        facts = probe(path)
        rows.append(
            {
                "video_id": f"v{index}",
                # Both forms of a local name.
                "uri": path if index % 2 else f"file://{path}",
                "split": "train",
                "label": index % 3 if index else None,
                "target": index / 2 if index else None,
                "start_s": 0.0,
                "end_s": facts.duration_s,
                **{name: getattr(facts, name) for name in ("duration_s", "fps", "num_frames", "width", "height")},
            }
        )
    return pa.Table.from_pylist(rows, SCHEMA)


def _source(**changes: Any) -> DecodedClips:
    settings: dict[str, Any] = {
        "clips": CLIPS,
        "frame_size": SIZE,
        "data": DataConfig(clips_per_task=3),
        "decode_tasks": 2,
    }
    return DecodedClips(**(settings | changes))


def _train(manifest: pa.Table, plan: ClipOrder, **changes: Any) -> Iterator[ClipBatch]:
    start = changes.pop("start_step", 0)
    return _source(**({"pairs": True} | changes)).training(manifest, plan, 7, start)


def _broken(manifest: pa.Table, indices: list[int], folder: Path) -> pa.Table:
    """Return the manifest with some videos truncated."""
    rows = manifest.to_pylist()
    for index in indices:
        rows[index]["uri"] = truncate(write_video(folder / f"broken{index}.mp4", 40))
    return pa.Table.from_pylist(rows, SCHEMA)


def test_batches_follow_the_clip_order(manifest: pa.Table) -> None:
    plan = ClipOrder(VIDEOS, 4, epochs=2, seed=1)
    rows = plan.rows(0, plan.total_steps)
    batches = list(_train(manifest, plan))
    assert [batch.step for batch in batches] == [0, 1, 2, 3]
    assert [batch.epoch for batch in batches] == [0, 0, 1, 1]
    names = [name for batch in batches for name in batch.video_ids]
    assert names == [f"v{index}" for index in rows.video]
    for batch in batches:
        index = [int(name[1:]) for name in batch.video_ids]
        assert batch.failures == []
        assert batch.long.shape == (4, 4, SIZE, SIZE, 3)
        assert batch.long.dtype == torch.uint8
        assert batch.labels.tolist() == [i % 3 if i else -1 for i in index]
        expected = [i / 2 if i else float("nan") for i in index]
        torch.testing.assert_close(batch.targets, torch.tensor(expected), equal_nan=True)
        assert batch.seeds.tolist() == [clip_seed(7, batch.epoch, name) for name in batch.video_ids]


def test_a_pair_is_what_two_reads_give(manifest: pa.Table) -> None:
    batch = next(_train(manifest, ClipOrder(VIDEOS, 4, 1, seed=1)))
    assert batch.short is not None
    for row, name in enumerate(batch.video_ids):
        video = manifest.slice(int(name[1:]), 1).to_pylist()[0]
        long_T, short_T = long_short_times(CLIPS, 0, video["end_s"], video["fps"], int(batch.seeds[row]))
        path = video["uri"].removeprefix("file://")
        np.testing.assert_array_equal(batch.long[row].numpy(), read_frames(path, long_T, SIZE))
        np.testing.assert_array_equal(batch.short[row].numpy(), read_frames(path, short_T, SIZE))


def test_without_pairs_the_long_clips_are_the_same(manifest: pa.Table) -> None:
    plan = ClipOrder(VIDEOS, 4, 1, seed=1)
    for pair, single in zip(_train(manifest, plan), _train(manifest, plan, pairs=False), strict=True):
        assert single.short is None
        assert torch.equal(pair.long, single.long)


def test_two_workers_and_a_resumed_run_see_what_one_worker_sees(
    manifest: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ClipOrder(VIDEOS, 4, epochs=2, seed=1)
    whole = list(_train(manifest, plan))
    # Executions of two steps each, so that one ends and the next is started ahead.
    monkeypatch.setattr(clips_module, "SEGMENT_ROWS", 4)
    parts = [list(_train(manifest, plan, rank=rank, world_size=2, start_step=1)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 3
    for one, first, second in zip(whole[1:], *parts, strict=True):
        assert one.step == first.step == second.step
        assert one.video_ids == first.video_ids + second.video_ids
        assert torch.equal(one.long, torch.cat([first.long, second.long]))


def test_crops_are_those_of_one_worker(manifest: pa.Table, tmp_path: Path) -> None:
    rows = manifest.to_pylist()
    for row in rows:
        row["uri"] = write_coded(tmp_path / f"{row['video_id']}.mp4", frames=40, fps=8)
    coded = pa.Table.from_pylist(rows, SCHEMA)
    plan, views = ClipOrder(VIDEOS, 4, epochs=1, seed=1), ViewsConfig(crop_scale=(0.1, 0.5))
    whole = list(_train(coded, plan, views=views))
    parts = [list(_train(coded, plan, views=views, rank=rank, world_size=2)) for rank in range(2)]
    for one, *shares, centre in zip(whole, *parts, _train(coded, plan), strict=True):
        for name in ("long", "short"):
            clips = getattr(one, name)
            assert torch.equal(clips, torch.cat([getattr(share, name) for share in shares]))
            assert not torch.equal(clips, getattr(centre, name))
    (plain,), (cropped,) = (list(_source(**c).evaluation(coded.slice(0, 2), 1, 2)) for c in ({}, {"views": views}))
    assert torch.equal(plain.long, cropped.long)


def test_a_broken_video_is_replaced_by_its_spare_and_listed(manifest: pa.Table, tmp_path: Path) -> None:
    plan = ClipOrder(VIDEOS, 4, 1, seed=1)
    rows = plan.rows(0, plan.total_steps)
    row = 2
    broken, spare = int(rows.video[row]), int(rows.spares[row, 0])
    table = _broken(manifest, [broken], tmp_path)
    good, batch = next(_train(manifest, plan)), next(_train(table, plan))
    assert batch.video_ids == [*good.video_ids[:row], f"v{spare}", *good.video_ids[row + 1 :]]
    assert batch.long.shape == good.long.shape
    assert torch.equal(batch.long[:row], good.long[:row])
    assert int(batch.seeds[row]) == clip_seed(7, 0, f"v{spare}")
    (failure,) = batch.failures
    assert (failure.video_id, failure.uri) == (f"v{broken}", table["uri"][broken].as_py())
    assert failure.reason


def test_training_stops_where_all_spares_fail(manifest: pa.Table, tmp_path: Path) -> None:
    plan = ClipOrder(VIDEOS, 4, 1, seed=1)
    rows = plan.rows(0, plan.total_steps)
    table = _broken(manifest, [int(rows.video[0]), *map(int, rows.spares[0])], tmp_path)
    with pytest.raises(VideoError, match=rf"step 0: .*broken{rows.spares[0, 1]}.mp4"):
        next(_train(table, plan))


def test_a_video_shorter_than_its_clip_is_a_failure_not_a_crash(manifest: pa.Table) -> None:
    rows = manifest.to_pylist()
    plan = ClipOrder(VIDEOS, 4, 1, seed=1)
    rows[int(plan.order(0)[0])]["end_s"] = 1.0
    batch = next(_train(pa.Table.from_pylist(rows, SCHEMA), plan))
    assert "clips.long_stride" in batch.failures[0].reason


def test_closing_the_batches_early_frees_the_cluster(manifest: pa.Table) -> None:
    import ray

    batches = _train(manifest, ClipOrder(VIDEOS, 4, 50, seed=1))
    assert len(list(islice(batches, 2))) == 2
    batches.close()  # type: ignore[attr-defined]
    # The next execution needs both CPUs: it would wait for ever.
    assert len(list(_train(manifest, ClipOrder(VIDEOS, 4, 1, seed=1)))) == 2
    assert ray.is_initialized()


@pytest.mark.parametrize("bound", [1, 2])
def test_no_more_tasks_run_than_the_user_allows(
    manifest: pa.Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bound: int
) -> None:
    def chunk(rows: pa.Table, spec: Any) -> Any:
        """Note how many tasks run, of which each waits a while for a second one."""
        here = Path(tempfile.mkdtemp(dir=tmp_path))
        for _ in range(20):
            running = len(list(tmp_path.glob("tmp*")))
            (tmp_path / f"seen-{running}").touch()
            if running > 1:
                break
            time.sleep(0.02)
        columns = decode_tasks.decode_chunk(rows, spec)
        here.rmdir()
        return columns

    monkeypatch.setattr(clips_module, "decode_chunk", chunk)
    # The CPUs would allow more.
    data = DataConfig(clips_per_task=1, decode_tasks=bound, cpus_per_decode=0.25)
    batches = list(_train(manifest, ClipOrder(VIDEOS, 4, 2, seed=1), data=data, decode_tasks=bound))
    assert len(batches) == 4
    assert {path.name for path in tmp_path.glob("seen-*")} == {f"seen-{count}" for count in range(1, bound + 1)}


def _evaluate(manifest: pa.Table, **changes: Any) -> list[ClipBatch]:
    clips_per_video, batch_size = changes.pop("clips_per_video", 3), changes.pop("batch_size", 4)
    return list(_source(**changes).evaluation(manifest, clips_per_video, batch_size))


def test_evaluation_reads_even_clips_in_manifest_order(manifest: pa.Table) -> None:
    batches = _evaluate(manifest)
    assert [len(batch.video_ids) for batch in batches] == [4] * 7 + [2]
    assert [batch.step for batch in batches] == list(range(8))
    names = [name for batch in batches for name in batch.video_ids]
    assert names == [f"v{index}" for index in range(VIDEOS) for _ in range(3)]
    shown = [numbers(clip.numpy()) for batch in batches for clip in batch.long]
    end_s = manifest["end_s"][1].as_py()
    times = evaluation_times(CLIPS, 0, end_s, 8, 3)
    assert shown[3:6] == (np.floor(times * 8 + 1e-3)).astype(int).tolist()


def test_evaluation_is_shared_among_workers_and_lists_failures(manifest: pa.Table, tmp_path: Path) -> None:
    table = _broken(manifest, [2, 3], tmp_path)
    parts = [_evaluate(table, rank=rank, world_size=2, clips_per_video=1) for rank in range(2)]
    names = [[name for batch in part for name in batch.video_ids] for part in parts]
    assert names == [["v0", "v4", "v6", "v8"], ["v1", "v5", "v7", "v9"]]
    assert [[failure.video_id for batch in part for failure in batch.failures] for part in parts] == [["v2"], ["v3"]]
    assert all(len(batch.long) == len(batch.video_ids) == len(batch.labels) for part in parts for batch in part)


@pytest.mark.parametrize("part_clips", [1, 2, 100])
def test_windows_are_read_in_parts_and_padded_with_black(
    manifest: pa.Table, monkeypatch: pytest.MonkeyPatch, part_clips: int
) -> None:
    # A part holds so many windows; the frames of v0 (5 s) and v1 (5.1 s) say which they are.
    monkeypatch.setattr(clips_module, "PART_BYTES", part_clips * 3 * SIZE**2 * 3)
    clips = ClipConfig(frames=3, long_stride=1.0, short_stride=1.0)
    two = manifest.slice(0, 2)
    batches = _evaluate(two, clips=clips, protocol="windows", batch_size=5)
    names = [name for batch in batches for name in batch.video_ids]
    assert names == ["v0"] * 3 + ["v1"] * 3
    assert max(len(batch.long) for batch in batches) <= 5
    shown = [numbers(clip.numpy()) for batch in batches for clip in batch.long]
    assert shown == 2 * [[0, 8, 16], [8, 16, 24], [16, 24, 32]]

    short = two.set_column(two.column_names.index("end_s"), SCHEMA.field("end_s"), [[1.5, 2.0]])
    padded = [clip for batch in _evaluate(short, clips=clips, protocol="windows") for clip in batch.long]
    assert [numbers(clip.numpy())[:2] for clip in padded] == [[0, 8], [0, 8]]
    assert not any(clip[2].any() for clip in padded)


def test_a_video_of_which_a_part_of_the_windows_fails_is_listed(
    manifest: pa.Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clips_module, "PART_BYTES", 2 * 3 * SIZE**2 * 3)
    clips = ClipConfig(frames=3, long_stride=1.0, short_stride=1.0)
    batches = _evaluate(_broken(manifest, [1], tmp_path).slice(0, 2), clips=clips, protocol="windows")
    assert [failure.video_id for batch in batches for failure in batch.failures] == ["v1", "v1"]
    assert [name for batch in batches for name in batch.video_ids] == ["v0"] * 3


def test_training_on_windows_takes_one_a_video(manifest: pa.Table) -> None:
    clips = ClipConfig(frames=3, long_stride=1.0, short_stride=1.0)
    plan = ClipOrder(VIDEOS, 4, 2, seed=1)
    for batch in _train(manifest, plan, clips=clips, pairs=False, protocol="windows"):
        for row, name in enumerate(batch.video_ids):
            end_s, seed = manifest["end_s"][int(name[1:])].as_py(), int(batch.seeds[row])
            times = training_times("windows", clips, 0.0, end_s, 8, seed)
            assert numbers(batch.long[row].numpy()) == (times * 8).astype(int).tolist()


def test_evaluation_of_fewer_videos_than_workers(manifest: pa.Table) -> None:
    assert _evaluate(manifest.slice(0, 1), rank=1, world_size=2) == []


def test_a_replaced_clip_config_changes_the_frames(manifest: pa.Table) -> None:
    plan = ClipOrder(VIDEOS, 4, 1, seed=1)
    batch = next(_train(manifest, plan, clips=replace(CLIPS, unit="frames", long_stride=2, short_stride=1)))
    assert batch.short is not None
    assert set(np.diff(numbers(batch.long[0].numpy()))) == {2}
    assert set(np.diff(numbers(batch.short[0].numpy()))) == {1}
