"""Decoding in a child process: what hangs, crashes or vanishes costs one video."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config import DataConfig
from pipelines.data import clip_batches as clips_module
from pipelines.data.clip_batches import DecodedClips
from pipelines.data.clip_order import ClipOrder
from pipelines.data.decoding import decode_tasks
from pipelines.data.decoding.decode_tasks import CANDIDATE, PROBED, ClipSpec, decode_chunk, probe_chunk
from pipelines.data.decoding.video_process import VideoProcess, VideoTimeoutError
from pipelines.data.decoding.video_requests import ClipRequest
from pipelines.data.manifest import SCHEMA
from s5.config import ClipConfig, ViewsConfig
from s5.errors import VideoError
from s5.video.reading import probe, read_clips
from tests.s5.videos import numbers, truncate, write_audio, write_coded, write_video

SPEC = ClipSpec(ClipConfig(frames=4, long_stride=1.0, short_stride=0.25), frame_size=32, pairs=True, timeout_s=2.0)
TIMES = [np.array([0.0, 1.0, 2.0]), np.array([0.5, 0.75])]
# Does what decord has been seen to do: spin without letting go of Python's lock, or take its process along.
FAKE_DECORD = """
import ctypes, os, sys
folder = os.path.dirname(__file__)
sys.path = [path for path in sys.path if path != folder]
del sys.modules["decord"]
import decord
Reader = decord.VideoReader
def read(path, **settings):
    name = os.path.basename(path)
    if "hangs" in name:
        ctypes.PyDLL(None).sleep(1000)
    if "crashes" in name:
        os.abort()
    if "segfaults" in name:
        ctypes.string_at(0)
    return Reader(path, **settings)
decord.VideoReader = read
"""


@pytest.fixture
def process() -> Iterator[VideoProcess]:
    process = VideoProcess()
    yield process
    process.close()


@pytest.fixture
def fake_decord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a decord that hangs or crashes on some names before the real one, for child processes."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "decord.py").write_text(FAKE_DECORD)
    monkeypatch.syspath_prepend(str(folder))
    return str(folder)


def _clips(decoder: Any = "decord") -> ClipRequest:
    return ClipRequest(TIMES, 32, (64, 64), decoder)


def _candidate(path: str, **changes: Any) -> dict[str, Any]:
    video = {"video_id": Path(path).stem, "uri": path, "start_s": 0.0, "end_s": 5.0, "fps": 8.0, "seed": 1}
    return video | {"width": 64, "height": 64, "decoder": "decord"} | changes


def _rows(*candidates: list[dict[str, Any]]) -> pa.Table:
    return pa.table({"candidates": pa.array(list(candidates), pa.list_(CANDIDATE))})


def test_the_child_reads_the_same_frames_as_this_process(tmp_path: Path, process: VideoProcess) -> None:
    for name in ("a.mp4", "b c.mp4"):
        path = write_video(tmp_path / name, 40)
        assert process.probe(path, 10) == probe(path)
        for decoder in ("decord", "pyav", None):
            here = read_clips(path, TIMES, 32, (64, 64), decoder)
            for ours, theirs in zip(here, process.read(path, _clips(decoder), 10), strict=True):
                np.testing.assert_array_equal(ours, theirs)
    # Fewer and smaller frames than before, over the same memory.
    (clip,) = process.read(path, ClipRequest(TIMES[1:], 16, (64, 64), "decord"), 10)
    assert clip.shape == (2, 16, 16, 3)
    assert numbers(clip) == [4, 6]


def test_crops_follow_the_seed_of_the_clip_alone(tmp_path: Path) -> None:
    """Not the chunk, the order or the retry; the two clips of a pair have boxes of their own."""
    spec = replace(SPEC, views=ViewsConfig(crop_scale=(0.2, 0.6)), timeout_s=30.0)
    candidates = [
        [_candidate(write_coded(tmp_path / f"{seed}.mp4", size=(96, 64), fps=8), seed=seed, width=96)]
        for seed in (5, 6, 7)
    ]
    boxes = [spec.boxes(video) for [video] in candidates]
    assert boxes == [spec.boxes(video) for [video] in candidates]
    assert len({box for pair in boxes for box in pair}) == 6
    single = replace(spec, pairs=False)
    assert [single.boxes(video) for [video] in candidates] == [pair[:1] for pair in boxes]
    whole = decode_chunk(_rows(*candidates), spec)
    parts = [decode_chunk(_rows(*some), spec) for some in (candidates[2:], candidates[:2])]
    for row, [video] in enumerate(candidates):
        pair = read_clips(video["uri"], spec.times(video), 32, (96, 64), "decord", boxes[row])
        for name, right in zip(("long", "short"), pair, strict=True):
            np.testing.assert_array_equal(whole[name][row], right)
            np.testing.assert_array_equal(parts[row < 2][name][row % 2], right)
    assert not np.array_equal(
        whole["long"], decode_chunk(_rows(*candidates), replace(spec, views=ViewsConfig()))["long"]
    )


def test_evaluated_clips_show_the_centre(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a.mp4", size=(96, 64), fps=8)
    video = _candidate(path, width=96, first_clip=None, end_clip=None)
    plain = replace(SPEC, pairs=False, evaluated=2, timeout_s=30.0)
    cropped = replace(plain, views=ViewsConfig(crop_scale=(0.2, 0.6), flip=1.0))
    assert cropped.boxes(video) == []
    first, second = (decode_chunk(_rows([video]), spec)["long"] for spec in (plain, cropped))
    np.testing.assert_array_equal(first, second)


@pytest.mark.usefixtures("fake_decord")
def test_a_decoder_that_hangs_is_ended(tmp_path: Path, process: VideoProcess) -> None:
    good, hangs = write_video(tmp_path / "good.mp4", 40), write_video(tmp_path / "hangs.mp4", 40)
    process.read(good, _clips(), 30)
    assert process._child is not None
    child = process._child.pid
    with pytest.raises(VideoTimeoutError, match=r"not read within data.decode_timeout_s, 0.5 s"):
        process.read(hangs, _clips(), 0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert numbers(process.read(good, _clips(), 30)[0]) == [0, 8, 16]


@pytest.mark.usefixtures("fake_decord")
@pytest.mark.parametrize(("name", "sign"), [("crashes", "SIGABRT"), ("segfaults", "SIGSEGV")])
def test_a_decoder_that_crashes_is_named(tmp_path: Path, process: VideoProcess, name: str, sign: str) -> None:
    path = write_video(tmp_path / f"{name}.mp4", 40)
    with pytest.raises(VideoError, match=rf"the decoder crashed \({sign}\)"):
        process.read(path, _clips(), 30)
    with pytest.raises(VideoError, match=sign):
        process.probe(path, 30)
    assert process.probe(write_video(tmp_path / "good.mp4", 40), 30).num_frames == 40


@pytest.mark.usefixtures("fake_decord")
def test_an_interrupted_request_leaves_no_reply_behind(tmp_path: Path, process: VideoProcess) -> None:
    path = write_video(tmp_path / "hangs.mp4", 40)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            process.read(path, _clips(), 30)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert process.probe(write_video(tmp_path / "good.mp4", 24), 30).num_frames == 24


@pytest.mark.usefixtures("fake_decord")
def test_a_child_whose_parent_is_killed_ends_itself(tmp_path: Path) -> None:
    path = write_video(tmp_path / "hangs.mp4", 8)
    code = f"""
import sys, time
sys.path[:] = {sys.path!r}
from pipelines.data.decoding.video_process import *
process = VideoProcess()
process._connected().send(VideoRequest({path!r}, ClipRequest([np.zeros(1)], 8, (64, 64), "decord"), 3600))
print(process._child.pid, flush=True)
time.sleep(1000)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(600):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child lives on")


def test_the_child_holds_little(tmp_path: Path, process: VideoProcess) -> None:
    process.read(write_video(tmp_path / "a.mp4", 40), _clips(), 30)
    assert process._child is not None
    mapped = Path(f"/proc/{process._child.pid}/maps").read_text()
    assert "decord" in mapped
    assert not any(f"/{package}/" in mapped for package in ("torch", "ray", "pyarrow"))


def _broken(kind: str, folder: Path) -> str:
    path = folder / f"{kind} video.mp4"
    match kind:
        case "empty":
            path.touch()
        case "text":
            path.write_text("no video\n" * 99)
        case "audio":
            write_audio(path)
        case "truncated":
            truncate(write_video(path, 40))
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
    return str(path)


KINDS = ("missing", "empty", "text", "audio", "truncated", "folder", "loop")


def test_what_cannot_be_probed_has_its_reason(tmp_path: Path) -> None:
    good = write_coded(tmp_path / "ö.avi", "mpeg4", bframes=2)
    uris = [*(_broken(kind, tmp_path) for kind in KINDS), good, f"file://{good}"]
    rows = probe_chunk(pa.table({"uri": uris}), timeout_s=30)
    assert rows.schema == PROBED
    assert all(rows["reason"].to_pylist()[: len(KINDS)])
    assert rows["num_frames"].to_pylist()[len(KINDS) :] == [90, 90]
    assert rows["decoder"].to_pylist()[len(KINDS) :] == ["pyav", "pyav"]


def test_what_cannot_be_read_is_a_listed_failure(tmp_path: Path) -> None:
    spare = _candidate(write_video(tmp_path / "spare.mp4", 40))
    broken = [_candidate(_broken(kind, tmp_path)) for kind in KINDS]
    columns = decode_chunk(_rows(*([video, spare] for video in broken), broken[:2]), SPEC)
    assert columns["video_id"].tolist() == ["spare"] * len(KINDS) + [""]
    for kind, failures in zip(KINDS, columns["failures"], strict=False):
        assert f'"video_id": "{kind} video"' in failures
    assert columns["long"].shape == columns["short"].shape == (len(KINDS) + 1, 4, 32, 32, 3)
    assert not columns["long"][-1].any()


@pytest.mark.usefixtures("fake_decord")
def test_a_video_that_hangs_again_costs_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "hangs.mp4", 40)
    process = VideoProcess()
    limits: list[float] = []

    def read(uri: str, clips: ClipRequest, timeout_s: float, *stalled: Any) -> Any:
        if uri == path:
            limits.append(timeout_s)
        return VideoProcess.read(process, uri, clips, timeout_s, *stalled)

    monkeypatch.setattr(process, "read", read)
    monkeypatch.setattr(decode_tasks, "_process", process)
    monkeypatch.setattr(decode_tasks, "_timed_out", {})
    rows = _rows([_candidate(path), _candidate(write_video(tmp_path / "spare.mp4", 40))])
    try:
        # The spare's process has to start anew within that time, on a busy machine; from 5 s on, a stall is seen first.
        epochs = [decode_chunk(rows, replace(SPEC, timeout_s=4.0)) for _ in range(3)]
        assert limits == [4.0, 0.4, 0.4]
        for columns in epochs:
            assert columns["video_id"].tolist() == ["spare"]
            assert columns["failures"].tolist() == epochs[0]["failures"].tolist()
        assert "data.decode_timeout_s, 4 s" in epochs[0]["failures"][0]

        # It was the storage: once it is read, it is given its whole time again.
        Path(path).rename(tmp_path / "h.mp4")
        monkeypatch.setitem(decode_tasks._timed_out, str(tmp_path / "h.mp4"), "slow")
        good = _rows([_candidate(str(tmp_path / "h.mp4"))])
        assert decode_chunk(good, replace(SPEC, timeout_s=100.0))["video_id"].tolist() == ["h"]
        assert list(decode_tasks._timed_out) == [path]
    finally:
        process.close()


def test_a_password_in_a_name_stays_out_of_the_failures(tmp_path: Path) -> None:
    secrets = [_candidate("https://user:secret@host/a.mp4"), _candidate("s3://bucket/a.mp4?X-Amz-Signature=secret")]
    (failures,) = decode_chunk(_rows(secrets), SPEC)["failures"]
    assert "secret" not in failures
    assert failures.count("holds credentials") == 2
    rows = probe_chunk(pa.table({"uri": [video["uri"] for video in secrets]}), timeout_s=5)
    assert "secret" not in str(rows.to_pylist())


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_local")
def test_training_continues_past_videos_that_hang_or_crash(
    tmp_path: Path, fake_decord: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ClipOrder(8, 4, 1, seed=1)
    order = [int(video) for video in plan.order(0)]
    names = {order[0]: "hangs", order[3]: "crashes", order[5]: "segfaults"}
    facts = {"split": "train", "start_s": 0.0, "end_s": 5.0, "duration_s": 5.0, "fps": 8.0, "num_frames": 40}
    facts |= {"width": 64, "height": 64, "decoder": "decord"}
    rows = []
    for index in range(8):
        path = write_video(tmp_path / f"{names.get(index, 'good')}{index}.mp4", 40)
        rows.append({"video_id": f"v{index}", "uri": path, **facts})

    def chunk(table: pa.Table, spec: ClipSpec) -> Any:
        sys.path.insert(0, fake_decord)
        os.environ["PYTHONPATH"] = fake_decord
        decode_tasks._process.close()  # The worker may have read videos before, with the real decord.
        return decode_tasks.decode_chunk(table, spec)

    monkeypatch.setattr(clips_module, "decode_chunk", chunk)
    source = DecodedClips(
        clips=SPEC.clips,
        frame_size=32,
        data=DataConfig(clips_per_task=2, decode_timeout_s=10.0),
        decode_tasks=2,
        pairs=True,
    )
    batches = list(source.training(pa.Table.from_pylist(rows, SCHEMA), plan, 7))
    assert len(batches) == 2
    failures = {failure.video_id: failure.reason for batch in batches for failure in batch.failures}
    reasons = {order[0]: "makes no progress", order[3]: "SIGABRT", order[5]: "SIGSEGV"}
    for video, reason in reasons.items():
        assert reason in failures[f"v{video}"]
    read = {video_id for batch in batches for video_id in batch.video_ids}
    assert read.isdisjoint(f"v{video}" for video in names)
