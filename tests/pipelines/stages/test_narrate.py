"""Distant supervision from narration to an evaluated model, on real videos and a real Ray cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines import storage
from pipelines.config import (
    EvaluateConfig,
    FeaturesConfig,
    FinetuneConfig,
    IndexConfig,
    NarrateConfig,
    SampleConfig,
    TrackingConfig,
    override,
)
from pipelines.data.features.reader import FeatureReader
from pipelines.data.manifest import description, read_manifest
from pipelines.data.narration.reading import read_labels
from pipelines.errors import UserError
from pipelines.stages import evaluate, features, finetune, index, narrate, sample
from s5.checkpoints.checkpoint import read_model
from s5.config import ClipConfig
from s5.video.clip_times import whole
from s5.video.reading import read_frames
from tests.pipelines.data.narration.test_labels import slow_labels
from tests.tiny import TINY

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]

STEPS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
OFF = TrackingConfig(uri="off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make 30 small videos with an index, the narration of their steps, and the written steps."""
    path = tmp_path_factory.mktemp("data")
    settings = {"videos": 30, "seconds": 12, "fps": 4, "size": 32, "val_share": 0.33, "test_share": 0.33}
    sample.run(SampleConfig(out=str(path / "videos"), tracking=OFF, **settings))  # type: ignore[arg-type]
    index.run(IndexConfig(videos=str(path / "videos"), out=str(path / "index"), tracking=OFF))
    (path / "steps.csv").write_text(
        "task,text\n" + "".join(f"Digits,Draw the digit {name}\n" for name in STEPS) + "Digits,\n"
    )
    with (path / "captions.jsonl").open("w") as file:
        for video in json.loads((path / "videos" / "annotations.json").read_text())["videos"]:
            for stretch in video["stretches"]:
                text = f"and now a {stretch['step']}" if stretch["step"] else "um, well"
                line = {"video": video["id"], "start": stretch["start_s"], "end": stretch["end_s"], "text": text}
                file.write(json.dumps(line) + "\n")
        file.write(json.dumps({"video": "nobody", "start": 0, "end": 1, "text": "one"}) + "\n")
        file.write(json.dumps({"video": "v00000", "start": 90, "end": 91, "text": "one"}) + "\n")
        file.write(json.dumps({"video": "v00000", "start": 11, "end": 91, "text": "seven"}) + "\n")
    return path


def narrating(folder: Path, out: Path, **changes: Any) -> NarrateConfig:
    settings = {"manifest": str(folder / "index"), "narration": str(folder / "captions.jsonl"), "out": str(out)}
    settings |= {
        "steps": str(folder / "steps.csv"),
        "tracking.uri": "off",
        "scale.cpus_per_worker": 0.5,
        "shortest_s": 0,
    }
    return override(NarrateConfig(), settings | {"chunk_segments": 64, "shard_segments": 120} | changes)


@pytest.fixture(scope="module")
def narrated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    config = narrating(folder, tmp_path_factory.mktemp("narrate"), **{"scale.num_workers": 2})
    result = narrate.run(config)
    assert narrate.run(config) == result
    assert not storage.exists(storage.join(config.out, "shards"))
    counts = result["counts"]
    assert counts["captions"] == counts["segments"] + counts["rejects"] - counts["steps_without_text"]
    # The last caption begins while one is said, and the next one begins while the last is said.
    assert (counts["steps"], counts["steps_without_text"], counts["clipped"], counts["overlapping"]) == (9, 1, 1, 2)
    # A digit is like its own step alone.
    assert (counts["short_labels"], counts["steps_without_vector"]) == (counts["segments"], 0)
    return config.out


def test_labels_and_manifest_belong_together(narrated: str, folder: Path) -> None:
    videos = {row["video_id"]: row for row in read_manifest(str(folder / "index")).to_pylist()}
    segments = read_manifest(narrated)
    labels = storage.read_table(storage.join(narrated, "labels.parquet"))
    assert segments["video_id"].to_pylist() == labels["video_id"].to_pylist()
    assert description(segments).protocol == "whole"
    for segment, label in zip(segments.to_pylist(), labels.to_pylist(), strict=True):
        video = videos[label["video"]]
        same = ("uri", "split", "label", "duration_s", "decoder")
        assert [segment[name] for name in same] == [video[name] for name in same]
        assert (segment["start_s"], segment["end_s"]) == (label["start_s"], label["end_s"])
        assert video["start_s"] <= segment["start_s"] < segment["end_s"] <= video["end_s"]
        # All words of the steps but the digits are in all of them, so that no similarity but the digit's counts.
        assert label["text"].endswith(STEPS[label["steps"][0]])
        similarity = [1.0 if label["text"].endswith(name) else 0.0 for name in STEPS]
        assert label["steps"] == list(slow_labels(similarity, 3, 0.05))
        assert label["probabilities"][0] > 0.99
        assert sum(label["probabilities"]) == pytest.approx(1)
    known = read_labels(narrated, segments)
    assert known.names == [*(f"Digits: Draw the digit {name}" for name in STEPS), "Digits: "]


def test_rejects_say_where_and_why(narrated: str) -> None:
    rejects = storage.read_table(storage.join(narrated, "rejects.parquet")).to_pylist()
    reasons = [row["reason"] for row in rejects]
    assert rejects[0] == {"video_id": "", "uri": "steps.csv line 10", "reason": "step 8 has no text"}
    assert "no video of the manifest has that id" in reasons
    assert any(reason.startswith("90 to 91 s lies outside the video, which is used from 0 to ") for reason in reasons)
    assert reasons.count("what is said is like no step") == len(rejects) - 3
    assert all(row["uri"].startswith("captions.jsonl line ") for row in rejects[1:])


def test_an_ended_run_keeps_its_shards(
    folder: Path, narrated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = narrating(folder, tmp_path / "narrate")
    calls = []

    def ended(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return labelled(*arguments)

    labelled = narrate.labelled
    monkeypatch.setattr(narrate, "labelled", ended)
    with pytest.raises(KeyboardInterrupt):
        narrate.run(config)
    with pytest.raises(UserError, match="holds a run with top_k 3, not 2: give another --out"):
        narrate.run(override(config, {"top_k": 2}))
    other = folder / "other.csv"
    other.write_text((folder / "steps.csv").read_text() + "Digits,Draw a line\n")
    with pytest.raises(UserError, match="holds a run on another steps, which has changed since"):
        narrate.run(override(config, {"steps": str(other)}))
    result = narrate.run(config)
    assert len(calls) == 2 + result["counts"]["captions"] // 120
    for name in ("labels.parquet", "rejects.parquet", "manifest.parquet"):
        again, whole = (storage.read_table(storage.join(out, name)) for out in (config.out, narrated))
        assert again.equals(whole)


def training(manifest: str, out: Path, **changes: Any) -> FinetuneConfig:
    settings = {"manifest": manifest, "out": str(out), "tracking.uri": "off", "loop.epochs": 1}
    return override(FinetuneConfig(), TINY | settings | changes)


@pytest.fixture(scope="module")
def distant(narrated: str, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """Learn the steps of narrated segments."""
    changes = {"task": "distant", "labels": narrated, "loop.micro_batch": 3}
    config = training(narrated, tmp_path_factory.mktemp("distant"), **changes)
    result = finetune.run(config)
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "best/val/loss"} <= result["metrics"].keys()
    assert result["counts"]["classes"] == 9
    assert finetune.run(config) == result
    return config


def test_the_encoder_is_evaluated_and_fine_tuned(distant: FinetuneConfig, folder: Path, tmp_path: Path) -> None:
    model, meta = read_model(Path(storage.read_json(storage.join(distant.out, "result.json"))["checkpoint"]))
    assert meta.kind == "distant"
    assert meta.classes[3] == "Digits: Draw the digit three"
    assert model.head is not None
    assert model.head.out_features == 9
    settings = {"manifest": str(folder / "index"), "checkpoint": distant.out, "out": str(tmp_path / "evaluate")}
    settings |= {"tracking.uri": "off", "data.cpus_per_decode": 0.5, "scale.num_workers": 0}
    found = evaluate.run(override(EvaluateConfig(), settings | {"probe": "both", "protocol": "whole"}))
    assert {"knn/top1", "linear/top1"} <= found["metrics"].keys()
    job = finetune.build_job(training(settings["manifest"], tmp_path / "tuned", checkpoint=distant.out))
    assert job.weights is not None


def test_predicted_steps_are_compared_with_labels(
    distant: FinetuneConfig, narrated: str, folder: Path, tmp_path: Path
) -> None:
    settings = {"manifest": narrated, "checkpoint": distant.out, "out": str(tmp_path / "evaluate"), "split": "val"}
    settings |= {"tracking.uri": "off", "data.cpus_per_decode": 0.5, "scale.num_workers": 0, "protocol": "whole"}
    config = override(EvaluateConfig(), settings)
    found = evaluate.run(config)["metrics"]
    trained = storage.read_json(storage.join(distant.out, "result.json"))["metrics"]
    for name in ("val/accuracy", "val/loss"):
        assert found[name] == pytest.approx(trained[name], abs=1e-3)
    with pytest.raises(UserError, match="videos of the manifest have none"):
        evaluate.run(override(config, {"manifest": str(folder / "index"), "labels": narrated}))


# --- a head over the segments of whole videos -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def segments(distant: FinetuneConfig, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FeaturesConfig:
    """Embed the segments of 3 s of all videos."""
    settings = {"manifest": str(folder / "index"), "checkpoint": distant.out, "segment_s": 3, "chunk_frames": 8}
    settings |= {"tracking.uri": "off", "data.cpus_per_decode": 0.5, "scale.cpus_per_worker": 0.5}
    config = override(FeaturesConfig(), settings | {"out": str(tmp_path_factory.mktemp("segments"))})
    features.run(config)
    return config


def test_embeddings_are_those_of_fresh_clips(segments: FeaturesConfig, distant: FinetuneConfig) -> None:
    model, _ = read_model(Path(storage.read_json(storage.join(distant.out, "result.json"))["checkpoint"]))
    reader = FeatureReader(segments.out)
    assert (reader.meta.tokens, reader.meta.width, reader.meta.chunk_frames) == (1, model.decoder.out_width, 2)
    for video in read_manifest(segments.manifest).to_pylist()[::10]:
        starts = [start for start in (0.0, 3.0, 6.0, 9.0, 12.0) if start < video["end_s"] - 1e-3]
        found = np.empty((len(starts), 1, reader.meta.width), np.float16)
        reader.read(video["video_id"], np.arange(len(starts)), found)
        for start, embedding in zip(starts, found[:, 0], strict=True):
            times_T = whole(ClipConfig(frames=4), start, min(start + 3, video["end_s"]), 0.5)
            clip = torch.from_numpy(read_frames(video["uri"], times_T, 32))
            with torch.no_grad():
                fresh = model.encode(clip[None]).features_BD[0]
            torch.testing.assert_close(torch.from_numpy(embedding).float(), fresh, rtol=2e-3, atol=2e-3)


def heading(segments: FeaturesConfig, out: Path, **changes: Any) -> FinetuneConfig:
    # Settings of a frame encoder, as of a preset, mean nothing here.
    settings: dict[str, Any] = TINY | {
        "model.backbone.name": "segments",
        "model.backbone.frozen": True,
        "model.decoder.width": 32,
    }
    settings |= {"features": segments.out, "protocol": "whole", "tracking.uri": "off", "loop.epochs": 1}
    return override(FinetuneConfig(), settings | {"manifest": segments.manifest, "out": str(out)} | changes)


def test_a_head_reads_the_segments_of_whole_videos(segments: FeaturesConfig, tmp_path: Path) -> None:
    for name in ("s5", "lst"):
        result = finetune.run(heading(segments, tmp_path / name, **{"model.decoder.name": name}))
        assert "val/accuracy" in result["metrics"]
    settings = {"manifest": segments.manifest, "checkpoint": str(tmp_path / "s5"), "out": str(tmp_path / "evaluate")}
    config = override(EvaluateConfig(), settings | {"tracking.uri": "off", "scale.num_workers": 0})
    with pytest.raises(
        UserError, match=r"features is '': the checkpoint has no frame encoder, it reads imported features"
    ):
        evaluate.run(config)
    found = evaluate.run(override(config, {"features": segments.out}))
    assert (found["metrics"]["test/videos"], found["metrics"]["test/clips"]) == (10, 10)


def test_segments_of_something_else_are_refused(segments: FeaturesConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"features is '': embeddings of segments are read from cached features"):
        heading(segments, tmp_path, features="")
    with pytest.raises(
        UserError, match=r"checkpoint is '': embeddings of segments are made by a whole video model; give"
    ):
        override(segments, {"checkpoint": ""})
    meta = storage.read_json(storage.join(segments.out, "features.json"))
    storage.write_json(str(tmp_path / "features.json"), meta | {"backbone": meta["backbone"] | {"name": "vit"}})
    with pytest.raises(
        UserError, match=r"they are tokens of frames, not embeddings of segments; give .*backbone.name vit"
    ):
        finetune.build_job(heading(segments, tmp_path, features=str(tmp_path)))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_labels_of_something_else_are_refused(narrated: str, folder: Path, tmp_path: Path) -> None:
    def refused(manifest: str, labels: str) -> str:
        with pytest.raises(UserError) as caught:
            finetune.build_job(training(manifest, tmp_path, task="distant", labels=labels))
        return str(caught.value)

    assert "30 of 30 videos of the manifest have none, as " in refused(str(folder / "index"), narrated)
    assert "there is no labels.parquet; run `python -m pipelines narrate`" in refused(narrated, str(folder))
    other = tmp_path / "other.parquet"
    storage.write_table(str(other), pa.table({"video_id": ["a"], "steps": [[1]], "probabilities": [[1.0]]}))
    for path in (folder / "steps.csv", Path(narrated) / "manifest.parquet", other):
        assert "no labels that `narrate` wrote (" in refused(narrated, str(path))


@pytest.fixture
def unusable(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"video": "nobody", "start": 0, "end": 1, "text": "one"}) + "\n")
    return path


def test_narration_of_other_videos_alone_is_a_mistake(folder: Path, unusable: Path, tmp_path: Path) -> None:
    config = narrating(folder, tmp_path / "narrate", narration=str(unusable))
    with pytest.raises(
        UserError, match=r"none of its 1 captions can be used .*no video of .* has that id \(1\).*; see "
    ):
        narrate.run(config)
    assert not storage.exists(storage.join(config.out, "labels.parquet"))
    with pytest.raises(UserError, match="narration is '': give the file of the narration"):
        narrate.run(override(config, {"narration": ""}))
