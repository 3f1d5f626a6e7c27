"""Predicting a video in one pass gives what its clips give one by one, in memory that its length does not change."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import s5
from s5.checkpoints.checkpoint import Meta, read_model
from s5.checkpoints.history import checkpoint_in
from s5.checkpoints.writer import CheckpointWriter
from s5.config import ClipConfig, EvaluationProtocol, ModelConfig
from s5.errors import CheckpointError, VideoError
from s5.evaluation import streaming
from s5.evaluation.prediction import Predictor, Seconds, TrainedModel
from s5.models.video_model import VideoModel
from s5.tasks.supervised import Supervised
from s5.training.context import SoloContext
from s5.video.clip_times import beyond, protocol_times
from s5.video.reader import FloatArray, FrameArray
from s5.video.reading import VideoFacts, probe, read_frames
from tests.s5.toys import MODEL
from tests.s5.videos import truncate, write_coded

CLIPS = ClipConfig(frames=4, long_stride=1.0)
FPS = 4


def trained(
    folder: Path,
    kind: str = "class",
    protocol: EvaluationProtocol = "uniform",
    model: ModelConfig = MODEL,
    clips: ClipConfig = CLIPS,
) -> Path:
    """Save a model that was not trained, and return its checkpoint."""
    torch.manual_seed(3)
    classes = ["a", "b", "c"] if kind == "class" else []
    task = Supervised(VideoModel(model, len(classes) or 1), kind)
    meta = Meta(
        kind=kind,  # type: ignore[arg-type]
        step=1,
        model=asdict(model),
        classes=classes,
        settings={"clips": asdict(clips), "protocol": "auto"},
        protocol=protocol,
    )
    context = SoloContext(folder)
    with CheckpointWriter(context.checkpoints, context) as writer:  # type: ignore[arg-type]
        writer.save(task, torch.optim.AdamW(task.parameters()), meta)
    return folder / "step_00000001"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a video of 21.5 s whose frames differ."""
    return Path(write_coded(tmp_path_factory.mktemp("video") / "a.mp4", frames=86, fps=FPS))


def one_by_one(checkpoint: Path, video: Path, times_WT: FloatArray) -> list[float]:
    """Return the mean over clips, each read and run by itself."""
    model, meta = read_model(checkpoint)
    outputs = []
    for times_T in times_WT:
        frames = read_frames(str(video), times_T, 32)
        frames[beyond(times_T, probe(str(video)).duration_s)] = 0
        with torch.no_grad():
            logits_C = model(torch.from_numpy(frames)[None]).logits_BC[0]
        outputs.append(logits_C.softmax(-1) if meta.kind == "class" else logits_C)
    return [float(value) for value in torch.stack(outputs).mean(0)]


@pytest.mark.parametrize("kind", ["class", "regression"])
@pytest.mark.parametrize("protocol", ["uniform", "windows", "whole", "multi-clip"])
def test_a_video_in_one_pass_is_the_mean_of_its_clips(
    tmp_path: Path, video: Path, protocol: EvaluationProtocol, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "FRAMES_AT_ONCE", 5)
    checkpoint = trained(tmp_path, kind, protocol)
    found = s5.load_model(str(checkpoint)).predict(video, batch_size=3)
    times_WT = protocol_times(protocol, CLIPS, 0.0, 21.5, FPS, {"multi-clip": 10}.get(protocol, 1))
    assert found.values == pytest.approx(one_by_one(checkpoint, video, times_WT), abs=1e-5)
    assert (found.clips, found.start_s, found.end_s) == (len(times_WT), 0.0, 21.5)
    starts = [] if protocol == "whole" else [0.0, 4.0, 8.0, 12.0, 16.0, 17.5]
    assert [(part.start_s, part.end_s) for part in found.over_time] == [(start, start + 4) for start in starts]
    for part in found.over_time:
        assert part.values == pytest.approx(
            one_by_one(checkpoint, video, part.start_s + np.arange(4.0)[None]), abs=1e-5
        )
    if kind == "class":
        assert found.label == "abc"[int(np.argmax(found.values))]
        assert found.probability == max(found.values)
        assert sum(found.values) == pytest.approx(1)
        assert math.isnan(found.value)
    else:
        assert (found.label, found.value) == ("", found.values[0])
        assert math.isnan(found.probability)
    assert len({part.values for part in found.over_time}) == len(starts)


@pytest.mark.parametrize("protocol", ["uniform", "windows", "whole", "multi-clip"])
def test_a_video_shorter_than_a_clip(tmp_path: Path, protocol: EvaluationProtocol) -> None:
    path = Path(write_coded(tmp_path / "short.mp4", frames=9, fps=FPS))
    checkpoint = trained(tmp_path, protocol=protocol)
    found = s5.load_model(checkpoint).predict(path)
    clips = replace(CLIPS, too_short="shrink")
    times_WT = protocol_times(protocol, clips, 0.0, 2.25, FPS, {"multi-clip": 10}.get(protocol, 1))
    assert found.values == pytest.approx(one_by_one(checkpoint, path, times_WT), abs=1e-5)
    assert found.over_time == ()


def test_tubelets_are_of_several_frames(tmp_path: Path, video: Path) -> None:
    model = replace(MODEL, backbone=replace(MODEL.backbone, tubelet=2))
    checkpoint = trained(tmp_path, protocol="windows", model=model)
    loaded = s5.load_model(checkpoint)
    times_WT = protocol_times("windows", CLIPS, 0.0, 21.5, FPS, 1)
    assert loaded.predict(video).values == pytest.approx(one_by_one(checkpoint, video, times_WT), abs=1e-5)


def facts(seconds: float) -> VideoFacts:
    return VideoFacts(seconds, 25.0, round(25 * seconds), 32, 32, "h264", "pyav")


def test_frames_are_read_once_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour in windows: 3597 of them share 3600 frames, of which few are there at a time."""
    held: list[int] = []
    forget = streaming._Frames.forget

    def watched(frames: streaming._Frames, before_s: float) -> None:
        held.append(len(frames._held))
        forget(frames, before_s)

    monkeypatch.setattr(streaming._Frames, "forget", watched)
    read_at: list[float] = []

    def read(times_F: FloatArray) -> Sequence[FrameArray]:
        read_at.extend(times_F.tolist())
        return [np.zeros((32, 32, 3), np.uint8)] * len(times_F)

    predictor = Predictor(s5.load_model(trained(tmp_path, protocol="windows")), batch_size=256)
    found = predictor.predict(facts(3600.0), read)  # type: ignore[arg-type]
    assert found.clips == 3597
    assert len(found.over_time) == 900
    assert read_at == [float(second) for second in range(3600)]
    assert max(held) <= streaming.FRAMES_AT_ONCE + CLIPS.frames


def test_what_is_kept_of_each_frame(tmp_path: Path, video: Path) -> None:
    loaded = s5.load_model(trained(tmp_path))
    path, about = str(video), probe(str(video))

    def read(times_F: FloatArray) -> list[FrameArray]:
        return list(read_frames(path, times_F, 32))

    kept = Predictor(loaded, keeps=True).predict(about, read).kept
    assert kept is not None
    # The windows over time show each second, the last one, which overlaps the one before, four from 17.5 s on.
    assert kept.times_F.tolist() == sorted([*map(float, range(20)), 17.5, 18.5, 19.5, 20.5])
    assert kept.share_FRQ.shape == (24, 4, 4)
    with torch.no_grad():
        prediction = loaded.model(torch.from_numpy(read_frames(path, np.arange(4.0), 32))[None])
    kept_L = np.zeros(4 * 16)
    kept_L[prediction.kept[0][0].numpy()] = 1
    assert np.array_equal(kept.share_FRQ[:4], kept_L.reshape(4, 4, 4))
    # Of a video too short for windows over time, the protocol's clip.
    brief = Predictor(loaded, keeps=True).predict(facts(4.0), read).kept
    assert brief is not None
    assert len(brief.times_F) == 4
    assert brief.share_FRQ.mean() == 0.5


def test_models_that_predict_or_drop_nothing_say_so(tmp_path: Path) -> None:
    plain = replace(MODEL, decoder=replace(MODEL.decoder, name="vis4mer"))
    with pytest.raises(CheckpointError, match="vis4mer, keeps all tokens in its first block"):
        Predictor(s5.load_model(trained(tmp_path / "all", model=plain)), keeps=True)
    tsn = replace(MODEL, decoder=replace(MODEL.decoder, name="tsn"))
    with pytest.raises(CheckpointError, match="tsn, keeps all tokens"):
        Predictor(s5.load_model(trained(tmp_path / "tsn", model=tsn)), keeps=True)
    loaded = s5.load_model(trained(tmp_path / "some"))
    with pytest.raises(CheckpointError, match="is of a pretrained encoder"):
        Predictor(TrainedModel(loaded.model, replace(loaded.meta, kind="lsmcl")))
    with pytest.raises(ValueError, match="every_s is nan: give 0 or more seconds"):
        Predictor(loaded, every_s=math.nan)


def test_videos_that_cannot_be_read_say_why(tmp_path: Path, video: Path) -> None:
    loaded = s5.load_model(trained(tmp_path))
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    cut = truncate(shutil.copy(video, tmp_path / "cut.mp4"))
    for path, reason in (
        (text, "not a video file"),
        (cut, "not a video file|truncated"),
        (tmp_path / "gone", "not found"),
    ):
        with pytest.raises(VideoError, match=reason):
            loaded.predict(path)
    # PyAV reads open files, and rounds colours another way than decord, which selection may turn into other tokens.
    plain = replace(MODEL, decoder=replace(MODEL.decoder, name="vis4mer"))
    loaded = s5.load_model(trained(tmp_path / "all", model=plain))
    with video.open("rb") as file:
        assert loaded.predict(file).values == pytest.approx(loaded.predict(video).values, abs=5e-3)


def test_the_checkpoint_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = trained(run / "checkpoints")
    (run / "result.json").write_text(json.dumps({"checkpoint": str(checkpoint)}))
    assert checkpoint_in(run) == checkpoint_in(checkpoint) == checkpoint
    moved = run.rename(tmp_path / "moved")
    assert checkpoint_in(moved) == moved / "checkpoints" / checkpoint.name
    assert s5.load_model(moved).meta.classes == ["a", "b", "c"]
    (moved / "result.json").write_text(json.dumps({"stage": "index"}))
    for path, reason in ((moved, "that stage saved none"), (tmp_path, "neither a checkpoint"), (run, "no such folder")):
        with pytest.raises(CheckpointError, match=reason):
            checkpoint_in(path)


def test_seconds_add_up() -> None:
    seconds = Seconds()
    with seconds.of("total"), seconds.of("model"):
        pass
    assert seconds.decode == 0.0
    assert 0 <= seconds.rest <= seconds.total
