"""The sample data set: what is planned, what is drawn, and what lies in the folder in the end."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import decord
import numpy as np
import pytest

from pipelines.config import SampleConfig, TrackingConfig
from pipelines.data.rendering import (
    GOP_SECONDS,
    STEP_NAMES,
    Scene,
    VideoPlan,
    draw_stretch,
    render_video,
    step_pixels,
    stored_digest,
)
from pipelines.errors import UserError
from pipelines.stages import sample

OFF = TrackingConfig(uri="off")
SMALL = SampleConfig(videos=40, seconds=12, fps=4, size=32, tracking=OFF)


def by_class(plans: list[VideoPlan]) -> dict[str, list[VideoPlan]]:
    groups = defaultdict(list)
    for plan in plans:
        groups[plan.class_name].append(plan)
    return groups


def steps_of(plan: VideoPlan) -> list[int]:
    return [stretch.step for stretch in plan.stretches if stretch.step is not None]


def read(video: bytes, folder: Path) -> decord.VideoReader:
    (folder / "video.mp4").write_bytes(video)
    return decord.VideoReader(str(folder / "video.mp4"), num_threads=1)


# --- activities -----------------------------------------------------------------------------------------------------


def test_ten_activities_overlap_and_some_differ_only_in_order() -> None:
    activities = sample.ACTIVITIES["all"]
    assert len(set(activities)) == 10
    same_steps = Counter(tuple(sorted(steps)) for steps in activities)
    assert sum(count == 2 for count in same_steps.values()) >= 3
    users = Counter(step for steps in activities for step in set(steps))
    assert set(users) == set(range(len(STEP_NAMES)))
    assert min(users.values()) >= 2, "a step of one activity alone would give it away"


def test_order_only_activities_have_the_same_steps() -> None:
    activities = sample.ACTIVITIES["order-only"]
    assert len(set(activities)) == 6
    assert len({tuple(sorted(steps)) for steps in activities}) == 1


@pytest.mark.parametrize("classes", ["all", "order-only"])
def test_videos_show_their_activitys_steps_in_order(classes: Any) -> None:
    for plan in sample.draw_videos(dataclasses.replace(SMALL, classes=classes)):
        assert tuple(steps_of(plan)) == sample.ACTIVITIES[classes][plan.label]
        assert plan.class_name == "-".join(STEP_NAMES[step] for step in steps_of(plan))


# --- planning -------------------------------------------------------------------------------------------------------


def test_default_videos_last_a_minute_or_more() -> None:
    seconds = [plan.seconds for plan in sample.draw_videos(SampleConfig())]
    assert min(seconds) >= 60
    assert max(seconds) <= 64 * 1.15 + 1
    assert len(set(seconds)) > 20


@pytest.mark.parametrize("config", [SMALL, SampleConfig(videos=60, seconds=10, fps=1)])
def test_stretches_cover_the_video_and_take_turns(config: SampleConfig) -> None:
    for plan in sample.draw_videos(config):
        edges = [plan.stretches[0].start]
        for stretch in plan.stretches:
            assert stretch.start == edges[-1]
            assert stretch.end > stretch.start
            edges.append(stretch.end)
        assert (edges[0], edges[-1]) == (0, plan.frames)
        assert [stretch.step is None for stretch in plan.stretches[::2]] == [True] * (len(plan.stretches) // 2 + 1)


def test_uninformative_stretches_take_20_to_40_percent_and_lengths_vary() -> None:
    for plan in sample.draw_videos(SampleConfig(videos=100)):
        empty = sum(stretch.end - stretch.start for stretch in plan.stretches if stretch.step is None)
        assert 0.19 < empty / plan.frames < 0.41
        lengths = {stretch.end - stretch.start for stretch in plan.stretches if stretch.step is not None}
        assert len(lengths) > 1


@pytest.mark.parametrize("videos", [40, 41, 240, 480])
def test_splits_are_stratified(videos: int) -> None:
    plans = sample.draw_videos(dataclasses.replace(SMALL, videos=videos))
    assert len({plan.video_id for plan in plans}) == videos
    for members in by_class(plans).values():
        count = Counter(plan.split for plan in members)
        assert set(count) == {"train", "val", "test"}
        assert abs(count["test"] - 0.25 * len(members)) <= 1
        assert abs(count["val"] - 0.15 * len(members)) <= 1


def test_without_held_out_shares_all_videos_train() -> None:
    plans = sample.draw_videos(dataclasses.replace(SMALL, val_share=0, test_share=0))
    assert {plan.split for plan in plans} == {"train"}


def test_first_videos_stay_the_same_when_the_data_set_grows() -> None:
    few = sample.draw_videos(SMALL)
    many = sample.draw_videos(dataclasses.replace(SMALL, videos=90))
    assert [plan.digest for plan in few] == [plan.digest for plan in many[: len(few)]]
    assert [plan.path for plan in few] == [plan.path for plan in many[: len(few)]]
    assert few[7].path.endswith("/v00007.mp4")


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_the_uninformative_share_is_that_of_the_settings(share: float) -> None:
    for plan in sample.draw_videos(dataclasses.replace(SMALL, empty_share=share)):
        empty = sum(stretch.end - stretch.start for stretch in plan.stretches if stretch.step is None)
        # Each stretch has a frame at least.
        assert abs(empty / plan.frames - share) < 0.1 + len(plan.stretches) / plan.frames


# --- rendering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_videos_are_what_the_plan_says(difficulty: Any, tmp_path: Path) -> None:
    for plan in sample.draw_videos(dataclasses.replace(SMALL, difficulty=difficulty))[:4]:
        reader = read(render_video(plan), tmp_path)
        frames = reader.get_batch(range(len(reader))).asnumpy()
        assert frames.shape == (plan.frames, 32, 32, 3)
        assert reader.get_avg_fps() == pytest.approx(4)
        assert list(reader.get_key_indices()) == list(range(0, plan.frames, GOP_SECONDS * 4))


def test_h264_with_the_index_in_front() -> None:
    video = render_video(sample.draw_videos(SMALL)[0])
    assert b"avc1" in video
    assert video.index(b"moov") < video.index(b"mdat")


def test_bytes_depend_on_the_plan_alone() -> None:
    plans = sample.draw_videos(SMALL)[:3]
    first = [render_video(plan) for plan in plans]
    again = [render_video(plan) for plan in reversed(plans)]
    assert first == again[::-1]
    assert len(set(first)) == 3


@pytest.mark.parametrize("change", [{"seed": 1}, {"difficulty": "hard"}, {"size": 48}, {"fps": 5}, {"seconds": 13.0}])
def test_settings_change_bytes_and_digest(change: dict[str, Any]) -> None:
    plan = sample.draw_videos(SMALL)[0]
    other = sample.draw_videos(dataclasses.replace(SMALL, **change))[0]
    assert plan.digest != other.digest
    assert render_video(plan) != render_video(other)


def test_easy_steps_show_their_colour_and_the_rest_is_grey(tmp_path: Path) -> None:
    plan = next(p for p in sample.draw_videos(SampleConfig(videos=10, seconds=12)) if steps_of(p) == [0, 1, 2, 3])
    reader = read(render_video(plan), tmp_path)
    for stretch in plan.stretches:
        frame = reader[(stretch.start + stretch.end) // 2].asnumpy().astype(int)
        # Largest excess of red, and of green, over the mean of the other two channels.
        red, green = ((frame[..., c] - np.delete(frame, c, axis=-1).mean(axis=-1)).max() for c in (0, 1))
        assert (red > 125) == (stretch.step == 0)
        assert (green > 125) == (stretch.step == 1)


def test_hard_backgrounds_move_and_have_texture(tmp_path: Path) -> None:
    easy, hard = (
        read(render_video(sample.draw_videos(SampleConfig(videos=1, seconds=12, difficulty=d))[0]), tmp_path)
        .get_batch([0, 60])
        .asnumpy()
        .astype(int)
        for d in ("easy", "hard")
    )
    assert np.median(np.abs(easy[0] - easy[1])) <= 2
    assert np.median(np.abs(hard[0] - hard[1])) > 2


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_step_pixels_are_where_the_objects_of_steps_are(difficulty: Any) -> None:
    plan = sample.draw_videos(SampleConfig(videos=1, seconds=10, fps=4, size=64, difficulty=difficulty))[0]
    shown_THW = step_pixels(plan)
    rng = np.random.default_rng(plan.seed)
    scene = Scene.draw(plan, rng)
    for stretch in plan.stretches:
        frames = draw_stretch(plan, scene, stretch, rng).astype(int)
        behind = scene.view(np.arange(stretch.start, stretch.end), plan.size).astype(int)
        found = shown_THW[stretch.start : stretch.end]
        changed = (frames != behind).any(-1)
        if stretch.step is None:
            assert changed.any()
            assert not found.any()
            continue
        assert found.any((1, 2)).all()
        # Each pixel of an object shows it, and no other pixel but the faint rim of one differs from the background.
        assert changed[found].mean() > 0.99
        assert (changed & ~found).sum() < changed.sum() / 2


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[SampleConfig, Path]:
    out = tmp_path_factory.mktemp("sample")
    config = dataclasses.replace(SMALL, out=str(out))
    assert sample.run(config) == {"videos": 40, "rendered": 40, "video_seconds": pytest.approx(40 * 12, rel=0.2)}
    return config, out


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.mp4")}


@pytest.mark.cluster
def test_folder_and_annotations_agree(rendered: tuple[SampleConfig, Path]) -> None:
    config, out = rendered
    annotations = json.loads((out / "annotations.json").read_text())
    videos = annotations["videos"]
    assert sorted(contents(out)) == sorted(video["path"] for video in videos)
    assert annotations["config"]["seed"] == config.seed
    assert not list(out.rglob("*.part"))
    for video in videos:
        split, class_name, file = video["path"].split("/")
        assert (split, class_name, file) == (video["split"], video["class"], f"{video['id']}.mp4")
        shown = [stretch["step"] for stretch in video["stretches"] if stretch["informative"]]
        assert shown == annotations["classes"][class_name] == class_name.split("-")
        assert video["stretches"][-1]["end_s"] == video["seconds"]
        assert len(decord.VideoReader(str(out / video["path"]))) == round(video["seconds"] * config.fps)


@pytest.mark.cluster
def test_workers_write_what_render_video_returns(rendered: tuple[SampleConfig, Path]) -> None:
    config, out = rendered
    for plan in sample.draw_videos(config)[::9]:
        assert (out / plan.path).read_bytes() == render_video(plan)


@pytest.mark.cluster
def test_second_run_renders_only_what_is_missing_or_stale(rendered: tuple[SampleConfig, Path]) -> None:
    config, out = rendered
    before = contents(out)
    plans = sample.draw_videos(config)
    (out / plans[0].path).unlink()
    (out / plans[1].path).write_bytes(b"torn")
    stale = sample.draw_videos(dataclasses.replace(config, seed=1))[2]
    (out / plans[2].path).write_bytes(render_video(stale))
    assert sample.run(config)["rendered"] == 3
    assert contents(out) == before
    assert sample.run(config)["rendered"] == 0
    assert sample.run(dataclasses.replace(config, videos=43))["rendered"] == 3


def test_digest_is_none_without_a_video(tmp_path: Path) -> None:
    assert stored_digest(tmp_path / "missing.mp4") is None
    (tmp_path / "torn.mp4").write_bytes(b"torn")
    assert stored_digest(tmp_path / "torn.mp4") is None


def test_remote_folder_is_refused() -> None:
    with pytest.raises(UserError, match=r"out is 's3://bucket/sample'.*local"):
        sample.run(dataclasses.replace(SMALL, out="s3://bucket/sample"))


def test_videos_of_another_data_set_are_refused(tmp_path: Path) -> None:
    stranger = tmp_path / "train" / "walking" / "v00000.mp4"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"")
    with pytest.raises(UserError, match=r"1 videos? .*train/walking/v00000\.mp4.*another folder"):
        sample.run(dataclasses.replace(SMALL, out=str(tmp_path)))
