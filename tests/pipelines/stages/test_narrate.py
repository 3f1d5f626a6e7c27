"""Distant supervision from narration to an evaluated model, on real videos and a real Ray cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import storage
from pipelines.config import (
    EvaluateConfig,
    FinetuneConfig,
    IndexConfig,
    NarrateConfig,
    SampleConfig,
    TrackingConfig,
    override,
)
from pipelines.data.manifest import description, read_manifest
from pipelines.data.narration.labels import read_labels
from pipelines.errors import UserError
from pipelines.stages import evaluate, finetune, index, narrate, sample
from s5.checkpoints.checkpoint import load_model
from tests.pipelines.data.narration.test_labels import slow_labels
from tests.tiny import TINY

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]

STEPS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
OFF = TrackingConfig(uri="off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make 20 small videos with an index, the narration of their steps, and the written steps."""
    path = tmp_path_factory.mktemp("data")
    settings = {"videos": 20, "seconds": 12, "fps": 4, "size": 32, "val_share": 0.25, "test_share": 0.25}
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
    settings |= {"steps": str(folder / "steps.csv"), "tracking.uri": "off", "scale.cpus_per_worker": 0.5}
    return override(NarrateConfig(), settings | {"chunk_segments": 16, "shard_segments": 40, "shortest_s": 0} | changes)


@pytest.fixture(scope="module")
def narrated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    config = narrating(folder, tmp_path_factory.mktemp("narrate"), **{"scale.num_workers": 2})
    result = narrate.run(config)
    assert narrate.run(config) == result
    assert not storage.exists(storage.join(config.out, "shards"))
    counts = result["counts"]
    assert counts["captions"] == counts["segments"] + counts["rejects"] - counts["steps_without_text"]
    assert (counts["steps"], counts["steps_without_text"], counts["clipped"], counts["overlapping"]) == (9, 1, 1, 1)
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
    assert len(calls) == 2 + result["counts"]["captions"] // 40
    for name in ("labels.parquet", "rejects.parquet", "manifest.parquet"):
        again, whole = (storage.read_table(storage.join(out, name)) for out in (config.out, narrated))
        assert again.equals(whole)


def training(manifest: str, out: Path, **changes: Any) -> FinetuneConfig:
    settings = {"manifest": manifest, "out": str(out), "tracking.uri": "off", "loop.epochs": 1}
    return override(FinetuneConfig(), TINY | settings | changes)


@pytest.fixture(scope="module")
def distant(narrated: str, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """Learn the steps of narrated segments."""
    out = tmp_path_factory.mktemp("distant")
    config = training(
        narrated, out, **{"task": "distant", "labels": narrated, "scale.num_workers": 2, "loop.micro_batch": 3}
    )
    result = finetune.run(config)
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "best/val/loss"} <= result["metrics"].keys()
    assert result["counts"]["classes"] == 9
    assert finetune.run(config) == result
    return config


def test_the_encoder_is_evaluated_and_fine_tuned(distant: FinetuneConfig, folder: Path, tmp_path: Path) -> None:
    model, meta = load_model(Path(storage.read_json(storage.join(distant.out, "result.json"))["checkpoint"]))
    assert meta.kind == "distant"
    assert meta.classes[3] == "Digits: Draw the digit three"
    assert model.head is not None
    assert model.head.out_features == 9
    settings = {"manifest": str(folder / "index"), "checkpoint": distant.out, "out": str(tmp_path / "evaluate")}
    settings |= {"tracking.uri": "off", "data.cpus_per_decode": 0.5, "scale.cpus_per_worker": 0.5}
    found = evaluate.run(override(EvaluateConfig(), settings | {"probe": "both", "protocol": "whole"}))
    assert {"knn/top1", "linear/top1"} <= found["metrics"].keys()
    tuned = finetune.run(training(settings["manifest"], tmp_path / "tuned", checkpoint=distant.out))
    assert "val/accuracy" in tuned["metrics"]


def test_labels_of_something_else_are_refused(narrated: str, folder: Path, tmp_path: Path) -> None:
    def refused(manifest: str, labels: str) -> str:
        with pytest.raises(UserError) as caught:
            finetune.build_job(training(manifest, tmp_path, task="distant", labels=labels))
        return str(caught.value)

    assert "of 20 videos of the manifest have none, as " in refused(str(folder / "index"), narrated)
    assert "there is no labels.parquet; run `python -m pipelines narrate`" in refused(narrated, str(folder))
    assert "not a table of labels" in refused(narrated, str(folder / "steps.csv"))
    assert "`narrate` did not write it" in refused(narrated, storage.join(narrated, "manifest.parquet"))


@pytest.fixture
def unusable(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"video": "nobody", "start": 0, "end": 1, "text": "one"}) + "\n")
    return path


def test_narration_of_other_videos_alone_is_a_mistake(folder: Path, unusable: Path, tmp_path: Path) -> None:
    config = narrating(folder, tmp_path / "narrate", narration=str(unusable))
    with pytest.raises(UserError, match=r"no caption that can be used: .*no video of the manifest has that id \(1\)"):
        narrate.run(config)
    assert not storage.exists(storage.join(config.out, "labels.parquet"))
    with pytest.raises(UserError, match="narration is '': give the file of the narration"):
        narrate.run(override(config, {"narration": ""}))
