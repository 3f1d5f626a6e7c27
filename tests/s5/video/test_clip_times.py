"""When the frames of a clip are."""

from __future__ import annotations

import numpy as np
import pytest

from s5.config import ClipConfig
from s5.video.clip_times import (
    beyond,
    clip_seed,
    evaluation_times,
    fits,
    long_short_times,
    longest_stride_s,
    lvu_windows,
    protocol_times,
    training_times,
    windows_over_time,
)

CLIPS = ClipConfig(frames=8, long_stride=1.0, short_stride=0.25)


def test_seeds_are_stable_and_differ_by_all_that_they_depend_on() -> None:
    # A fixed value: a seed must be the same on every machine and in every later version.
    assert clip_seed(0, 0, "a") == 5050641589276093629
    seeds = {clip_seed(seed, epoch, name) for seed in range(3) for epoch in range(3) for name in ("a", "ä", "a/b")}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("seed", range(50))
def test_clips_lie_within_the_segment(seed: int) -> None:
    long_T, short_T = long_short_times(CLIPS, 3.0, 12.0, 8.0, seed)
    for times, stride in ((long_T, 1.0), (short_T, 0.25)):
        assert times[0] >= 3.0
        assert times[-1] <= 12.0 - 1 / 8 + 1e-9
        np.testing.assert_allclose(np.diff(times), stride)


def test_times_are_a_function_of_the_seed() -> None:
    first, again, other = (long_short_times(CLIPS, 0, 30, 8, seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first[0] != other[0]


def test_starts_are_uniform_and_independent() -> None:
    starts = np.array([[times[0] for times in long_short_times(CLIPS, 0, 27.125, 8, seed)] for seed in range(4000)])
    # Longest starts: 27.125 - 1/8 - 7 strides.
    np.testing.assert_allclose(starts.mean(0), [10.0, 12.625], atol=0.4)
    np.testing.assert_allclose(starts.max(0), [20.0, 25.25], atol=0.1)
    assert abs(np.corrcoef(starts.T)[0, 1]) < 0.05


def test_frames_as_unit_count_the_videos_own_frames() -> None:
    clips = ClipConfig(frames=4, long_stride=10, short_stride=2, unit="frames")
    long_T, short_T = long_short_times(clips, 0, 10, 25.0, 0)
    np.testing.assert_allclose(np.diff(long_T), 0.4)
    np.testing.assert_allclose(np.diff(short_T), 0.08)


def test_fits_leaves_room_for_the_last_frame() -> None:
    assert fits(CLIPS, 7.125, 8)
    assert not fits(CLIPS, 7.0, 8)
    assert fits(ClipConfig(frames=1), 0.1, 8)
    assert longest_stride_s(CLIPS, 7.125, 8) == pytest.approx(1.0)


def test_a_short_video_raises_or_shrinks() -> None:
    with pytest.raises(ValueError, match=r"clips.long_stride is 1 seconds.*3.00 s"):
        long_short_times(CLIPS, 0, 3, 8, 0)
    shrink = ClipConfig(frames=8, long_stride=1.0, short_stride=0.25, too_short="shrink")
    long_T, short_T = long_short_times(shrink, 0, 3, 8, 0)
    np.testing.assert_allclose(long_T, np.linspace(0, 2.875, 8))
    np.testing.assert_allclose(np.diff(short_T), 0.25)
    np.testing.assert_array_equal(long_short_times(shrink, 0, 0.1, 8, 0)[0], np.zeros(8))


def test_evaluation_clips_are_spread_evenly_and_one_is_centred() -> None:
    times = evaluation_times(CLIPS, 0, 17.125, 8, 3)
    np.testing.assert_allclose(times[:, 0], [0, 5, 10])
    np.testing.assert_allclose(evaluation_times(CLIPS, 0, 17.125, 8, 1)[:, 0], [5])


def test_lvu_windows_start_at_every_whole_second_that_one_fits() -> None:
    np.testing.assert_array_equal(lvu_windows(63.9), [0, 1, 2, 3])
    np.testing.assert_array_equal(lvu_windows(60.0), [0])
    np.testing.assert_array_equal(lvu_windows(61.0 - 1e-6), [0, 1])
    assert len(lvu_windows(152.4)) == 93
    assert lvu_windows(152.4)[-1] == 92
    np.testing.assert_array_equal(lvu_windows(20, window_s=8, step_s=5), [0, 5, 10])


@pytest.mark.parametrize("duration_s", [0.04, 3.0, 59.9])
def test_a_video_shorter_than_an_lvu_window_has_one(duration_s: float) -> None:
    np.testing.assert_array_equal(lvu_windows(duration_s), [0])


@pytest.mark.parametrize("lengths", [(0.0, 60, 1), (90, 0, 1), (90, 60, 0), (float("nan"), 60, 1)])
def test_lvu_windows_have_a_length(lengths: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be more than 0"):
        lvu_windows(*lengths)


LVU = ClipConfig(frames=60, long_stride=1.0, short_stride=1.0)


def _slow_windows(duration_s: float) -> list[list[float]]:
    """LVU's windows by counting: 60 frames at 1 frame a second from every whole second that 60 s fit behind."""
    starts = [second for second in range(int(duration_s)) if second + 60 <= duration_s] or [0]
    return [[start + frame for frame in range(60)] for start in starts]


@pytest.mark.parametrize("duration_s", [2.5, 59.9, 60.0, 61.2, 152.4])
def test_windows_are_those_of_lvu(duration_s: float) -> None:
    times = protocol_times("windows", LVU, 0.0, duration_s, 25.0, clips=1)
    np.testing.assert_array_equal(times, _slow_windows(duration_s))
    padded = [[time >= duration_s for time in window] for window in _slow_windows(duration_s)]
    np.testing.assert_array_equal(beyond(times, duration_s), padded)
    np.testing.assert_array_equal(protocol_times("windows", LVU, 7.0, 7.0 + duration_s, 25.0, 1), times + 7)


def test_the_end_of_a_video_is_padded_to_the_frame() -> None:
    assert beyond(np.array([2.9, 3.0 - 1e-6, 3.0, 4.0]), 3.0).tolist() == [False, True, True, True]


def test_training_windows_are_drawn_among_all() -> None:
    every = protocol_times("windows", LVU, 0.0, 64.0, 25.0, clips=1)
    drawn = np.array([training_times("windows", LVU, 0.0, 64.0, 25.0, clip_seed(0, 0, str(i))) for i in range(1000)])
    starts, counts = np.unique(drawn[:, 0], return_counts=True)
    np.testing.assert_array_equal(starts, every[:, 0])
    assert counts.min() > 150
    np.testing.assert_array_equal(drawn - drawn[:, :1], np.broadcast_to(np.arange(60.0), drawn.shape))
    # A short video has one window, whatever is drawn.
    np.testing.assert_array_equal(training_times("windows", LVU, 3.0, 20.0, 25.0, 1)[:2], [3, 4])


def test_whole_clips_have_a_frame_in_each_part_of_the_segment() -> None:
    (centred,) = protocol_times("whole", CLIPS, 10.0, 26.0, 25.0, clips=1)
    np.testing.assert_allclose(centred, 10 + 2 * np.arange(8) + 1)
    three = protocol_times("whole", CLIPS, 10.0, 26.0, 25.0, clips=3)
    # Together they are as even as one clip of three times the frames.
    np.testing.assert_allclose(np.diff(np.sort(three.ravel())), 2 / 3)
    for seed in range(100):
        times = training_times("whole", CLIPS, 10.0, 26.0, 25.0, seed)
        np.testing.assert_array_equal((times - 10) // 2, np.arange(8))
    # Shorter than a long clip, which would not fit.
    assert protocol_times("whole", CLIPS, 0.0, 0.5, 25.0, clips=1).max() < 0.5


def test_the_other_protocols_take_long_clips() -> None:
    for protocol in ("uniform", "multi-clip"):
        evaluated = protocol_times(protocol, CLIPS, 0, 17.125, 8, 3)  # type: ignore[arg-type]
        np.testing.assert_array_equal(evaluated, evaluation_times(CLIPS, 0, 17.125, 8, 3))
        trained = training_times(protocol, CLIPS, 0, 17.125, 8, 5)  # type: ignore[arg-type]
        np.testing.assert_array_equal(trained, long_short_times(CLIPS, 0, 17.125, 8, 5)[0])
        with pytest.raises(ValueError, match=r"clips.long_stride"):
            protocol_times(protocol, CLIPS, 0, 3.0, 8, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("duration_s", [0.95, 1.95, 10.9, 60.0, 61.04])
@pytest.mark.parametrize("every_s", [0.0, 0.1, 0.7])
def test_windows_over_time_cover_the_video_to_its_end(duration_s: float, every_s: float) -> None:
    config = ClipConfig(frames=8, long_stride=0.04, short_stride=0.04)
    times_WT = windows_over_time(config, duration_s, 25.0, every_s)
    assert times_WT[0, 0] == 0
    assert times_WT[-1, -1] == pytest.approx(duration_s - 0.04)
    steps = np.diff(times_WT[:, 0])
    assert (steps > 0).all()
    assert steps[:-1] == pytest.approx(every_s or 0.32)
    assert steps[-1] <= (every_s or 0.32) + 1e-6
