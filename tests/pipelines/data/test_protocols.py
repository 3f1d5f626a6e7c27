"""Protocols of evaluation: which one, what it reads, and what its figures stand on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from pipelines import storage
from pipelines.command_line import main
from pipelines.config import EvaluateConfig, FinetuneConfig, IndexConfig, override
from pipelines.data.manifest import MANIFEST, SCHEMA, Description, classes, metadata, read_manifest, split_of
from pipelines.data.protocols import checked_clips, clips_in_words, clips_per_video, coverage, listed_count, protocol_of
from pipelines.errors import UserError
from pipelines.stages import evaluate, finetune, index
from pipelines.storage.weights import local_checkpoint
from s5.checkpoints.checkpoint import Meta, read_model
from s5.config import ClipConfig
from s5.video.reading import probe, read_frames
from tests.pipelines.training.test_training import MODEL
from tests.s5.videos import write_video

# Seconds of the videos of each split; windows are of 4 s.
LENGTHS = {"train": [5, 6, 7, 8], "val": [6, 5], "test": [6, 2, 9, 7]}
LISTED = {"train": 4, "val": 3, "test": 6}


def _manifest(about: Description, rows: list[dict[str, Any]] | None = None) -> pa.Table:
    return pa.Table.from_pylist(rows or [], SCHEMA.with_metadata(metadata(["a", "b"], about)))


def test_a_setting_comes_before_the_benchmark() -> None:
    lvu, own = _manifest(Description(dataset="lvu", protocol="windows")), _manifest(Description())
    assert protocol_of(lvu, "auto", "auto") == "windows"
    assert protocol_of(lvu, "uniform", "whole") == "uniform"
    assert protocol_of(own, "auto", "whole") == "whole"
    assert protocol_of(own, "auto") == "uniform"
    assert (clips_per_video("multi-clip"), clips_per_video("whole"), clips_per_video("multi-clip", 3)) == (10, 1, 3)


def test_no_video_is_too_short_for_a_window_or_for_the_whole_of_it() -> None:
    clips = ClipConfig(too_short="error")
    assert [checked_clips(clips, protocol).too_short for protocol in ("windows", "whole")] == ["shrink"] * 2  # type: ignore[arg-type]
    assert checked_clips(clips, "multi-clip") == clips


def test_windows_that_differ_from_lvus_are_named() -> None:
    lvu = ClipConfig(frames=60, long_stride=1.0, short_stride=1.0)
    assert "LVU's are 60 s" not in clips_in_words("windows", lvu, 1)
    assert "LVU's are 60 s" not in clips_in_words("windows", ClipConfig(frames=16, long_stride=3.75), 1)
    assert "windows of 32 seconds" in (text := clips_in_words("windows", ClipConfig(), 1))
    assert "LVU's are 60 s" in text


def test_coverage_says_where_the_missing_videos_are() -> None:
    assert coverage("test", 7, 0, 7, 7) == "on all 7 listed videos of split test"
    text = coverage("test", 5, 2, 8, 12)
    assert text.startswith("on 5 of 12 listed videos of split test")
    assert text.endswith("4 rejected by index, 1 too short, 2 unreadable now")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small benchmark like LVU, with labels and targets; one of its test videos is shorter than a window."""
    folder = tmp_path_factory.mktemp("lvu")
    rows: list[dict[str, Any]] = []
    for split, lengths in LENGTHS.items():
        for number, seconds in enumerate(lengths):
            name = f"{split}{number}"
            facts = probe(path := write_video(folder / f"{name}.mp4", 4 * seconds, fps=4))
            columns = ("duration_s", "fps", "num_frames", "width", "height", "decoder")
            row = {"video_id": name, "uri": path, "split": split, "label": number % 2, "class_name": "ab"[number % 2]}
            row |= {"target": seconds / 9, "start_s": 0.0, "end_s": facts.duration_s}
            rows.append(row | {column: getattr(facts, column) for column in columns})
    about = Description(dataset="lvu", task="scene", protocol="windows", listed=LISTED)
    storage.write_table(str(folder / MANIFEST), _manifest(about, rows))
    return folder


def _by_hand(folder: Path, checkpoint: Path, kind: str, name: str, seconds: int) -> tuple[list[float], int]:
    """Return the mean over all windows of a video, each read by itself, and their number; black frames pad."""
    model, _ = read_model(checkpoint)
    model.eval()
    outputs = []
    for start in range(max(1, seconds - 4 + 1)):
        times = np.arange(start, start + 4.0)
        frames = read_frames(str(folder / f"{name}.mp4"), times, 32)
        frames = np.where((times < seconds)[:, None, None, None], frames, 0)
        with torch.no_grad():
            logits = model(torch.from_numpy(frames)[None]).logits_BC[0]
        outputs.append(logits.softmax(-1) if kind == "class" else logits)
    return [sum(float(row[k]) for row in outputs) / len(outputs) for k in range(len(outputs[0]))], len(outputs)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("task", ["class", "regression"])
def test_all_windows_of_a_video_give_its_result(
    benchmark: Path, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"manifest": str(benchmark), "tracking.uri": "off"}
    changes = {"clips.long_stride": 1.0, "loop.batch_size": 4, "loop.epochs": 2, "task": task}
    config = override(FinetuneConfig(), MODEL | common | changes | {"out": str(tmp_path / "finetune")})
    trained = finetune.run(config)
    assert trained["metrics"]["val/videos"] == 2
    assert trained["counts"]["val_listed"] == 3
    assert "on 2 of 3 listed videos" in capsys.readouterr().out

    settings = {"checkpoint": config.out, "data.cpus_per_decode": 0.5, "data.max_failure_share": 0.5, "batch_size": 3}
    settings["scale.num_workers"] = 0
    evaluation = override(EvaluateConfig(), common | settings | {"out": str(tmp_path / "evaluate")})
    gone = benchmark / "test3.mp4"
    moved = gone.rename(benchmark / "test3.gone")
    try:
        found = evaluate.run(evaluation)
    finally:
        moved.rename(gone)
    text = capsys.readouterr().out
    assert "on 3 of 6 listed videos of split test" in text
    assert "2 rejected by index, 1 unreadable now" in text
    assert (found["protocol"], found["counts"]["unreadable"]) == ("windows", 1)
    figures = storage.read_json(str(tmp_path / "evaluate" / "metrics.json"))
    assert (figures["test/videos"], figures["test/listed"], figures["test/clips"]) == (3, 6, 3 + 1 + 6)

    rows = pq.read_table(tmp_path / "evaluate" / "predictions.parquet").to_pylist()
    assert [row["video_id"] for row in rows] == ["test0", "test1", "test2"]
    errors = []
    for row, seconds in zip(rows, LENGTHS["test"], strict=False):
        values, windows = _by_hand(benchmark, Path(trained["checkpoint"]), task, row["video_id"], seconds)
        assert row["clips"] == windows
        if task == "class":
            np.testing.assert_allclose(row["scores"], values, atol=1e-4)
            assert row["prediction"] == int(np.argmax(values))
            errors.append(row["prediction"] != row["label"])
        else:
            assert row["prediction"] == pytest.approx(values[0], abs=1e-4)
            errors.append((values[0] - seconds / 9) ** 2)
    expected = 1 - np.mean(errors) if task == "class" else np.mean(errors)
    assert figures["test/accuracy" if task == "class" else "test/mse"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_local")
def test_another_protocol_may_be_asked_for(benchmark: Path, tmp_path: Path) -> None:
    common = {"manifest": str(benchmark), "tracking.uri": "off"}
    changes = {"clips.long_stride": 1.0, "loop.batch_size": 4, "loop.epochs": 1, "protocol": "whole"}
    config = override(FinetuneConfig(), MODEL | common | changes | {"out": str(tmp_path / "finetune")})
    finetune.run(config)
    settings = {"checkpoint": config.out, "data.cpus_per_decode": 0.5, "clips_per_video": 3, "scale.num_workers": 0}
    evaluation = override(EvaluateConfig(), common | settings | {"out": str(tmp_path / "evaluate")})
    # What fine-tuning was set to comes before the benchmark.
    assert evaluate.run(evaluation)["protocol"] == "whole"
    rows = pq.read_table(tmp_path / "evaluate" / "predictions.parquet").to_pylist()
    assert [row["clips"] for row in rows] == [3] * 4
    with pytest.raises(UserError, match=r"clips.long_stride is 1 seconds: 1 of 4 videos of split test are shorter"):
        evaluate.run(override(evaluation, {"protocol": "multi-clip"}))


# --- from a benchmark's own annotations to its figures ---------------------------------------------------------------

SECONDS = 8
KINETICS = """label,youtube_id,time_start,time_end,split
zumba,a-_,5,13,{0}
zumba,b,0,8,{0}
abseiling,c,1234,1242,{0}
abseiling,d,2,10,{0}
"""


def _kinetics(folder: Path) -> dict[str, str]:
    """Write annotations, and return the names of the videos with their files below the folder of videos."""
    folder.mkdir()
    (folder / "train.csv").write_text(KINETICS.format("train"))
    lines = "label,youtube_id,time_start,time_end,split\n"
    (folder / "validate.csv").write_text(lines + "zumba,e,1,9,validate\nabseiling,f,1,9,validate\n")
    (folder / "test.csv").write_text(lines + "zumba,g,0,8,test\nabseiling,h,3,11,test\nabseiling,gone,3,11,test\n")
    return {
        "a-__000005_000013": "train/zumba/",
        "b_000000_000008": "train/zumba/",
        "c_001234_001242": "train/abseiling/",
        "d_000002_000010": "train/abseiling/",
        "e_000001_000009": "",
        "f_000001_000009": "",
        "g_000000_000008": "test/",
        "h_000003_000011": "test/",
    }


def _coin(folder: Path) -> dict[str, str]:
    """Write annotations, and return the names of the videos with their files below the folder of videos."""
    entry = {"duration": SECONDS, "video_url": "u", "start": 1.5, "end": 6.5}
    entry |= {"annotation": [{"id": "1", "segment": [2.0, 4.0], "label": "boil"}]}
    database = {
        f"{subset}{number}": entry | {"subset": subset, "class": name, "recipe_type": kind}
        for subset, count in (("training", 6), ("testing", 3))
        for number, (name, kind) in enumerate([("Tea", 3), ("Zip", 179)] * 3)
        if number < count
    }
    folder.mkdir()
    (folder / "COIN.json").write_text(json.dumps({"database": database}))
    return {name: f"{entry['recipe_type']}/" for name, entry in database.items() if name != "testing2"}


def _times(source: str) -> list[NDArray[np.float64]]:
    """Return the times of the clips that are read of a video, by hand."""
    if source == "kinetics":
        # Ten clips of 4 frames a second apart; the last one ends with the last frame.
        return [place * (SECONDS - 0.25 - 3) / 9 + np.arange(4.0) for place in range(10)]
    # Two clips of a frame in each quarter of the 5 s that are used of the video.
    return [1.5 + 1.25 * (np.arange(4) + share) for share in (0.25, 0.75)]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(("source", "protocol"), [("kinetics", "multi-clip"), ("coin", "whole")])
def test_a_benchmark_from_its_annotations_to_its_figures(tmp_path: Path, source: str, protocol: str) -> None:
    files = (_kinetics if source == "kinetics" else _coin)(tmp_path / "annotations")
    for number, (name, place) in enumerate(files.items()):
        write_video(tmp_path / "videos" / f"{place}{name}.mp4", 4 * SECONDS, fps=4, width=64 + 2 * number)
    common = {"tracking.uri": "off", "data.cpus_per_decode": 0.5}
    annotations = tmp_path / "annotations" / ("COIN.json" if source == "coin" else "")
    settings = {"source": source, "annotations": str(annotations), "videos": str(tmp_path / "videos")}
    settings |= {"val_share": 0.34, "out": str(tmp_path / "index")}
    counts = index.run(override(IndexConfig(), common | settings))["counts"]
    found = {"train": 4, "val": 2, "test": 2}
    assert counts == {"listed": 9, "videos": 8, "rejects": 1, "ignored": 0} | found
    manifest = read_manifest(str(tmp_path / "index"))
    assert set(manifest["video_id"].to_pylist()) == set(files)
    stretch = (1.5, 6.5) if source == "coin" else (0.0, SECONDS)
    assert {(row["start_s"], row["end_s"]) for row in manifest.to_pylist()} == {stretch}
    assert len(classes(manifest)) == {"coin": 180, "kinetics": 2}[source]
    (reject,) = storage.read_table(str(tmp_path / "index" / "rejects.parquet")).to_pylist()
    gone, where = ("testing2", "COIN.json") if source == "coin" else ("gone_000003_000011", "test.csv line 4")
    assert reject["video_id"] == gone
    assert reject["reason"].startswith(f"listed in {where}")
    assert reject["reason"].endswith(f"not found as {gone}.* in the folder or below it")

    common |= {"manifest": str(tmp_path / "index")}
    changes = {"clips.long_stride": 1.0, "loop.batch_size": 4, "loop.epochs": 1, "out": str(tmp_path / "finetune")}
    trained = finetune.run(override(FinetuneConfig(), MODEL | common | changes))
    common |= {"checkpoint": str(tmp_path / "finetune"), "out": str(tmp_path / "evaluate"), "scale.num_workers": 0}
    common |= {"clips_per_video": 2} if source == "coin" else {}
    assert main(["evaluate", "--protocol", protocol, *(f"--{key}={value}" for key, value in common.items())]) == 0

    with local_checkpoint(trained["checkpoint"]) as checkpoint:
        model, _ = read_model(checkpoint)
    model.eval()
    tested = {row["video_id"]: row for row in split_of(manifest, "test").to_pylist()}
    rows = pq.read_table(tmp_path / "evaluate" / "predictions.parquet").to_pylist()
    assert [row["video_id"] for row in rows] == sorted(tested)
    for row in rows:
        video = tested[row["video_id"]]
        clips = torch.from_numpy(np.stack([read_frames(video["uri"], times, 32) for times in _times(source)]))
        with torch.no_grad():
            scores = model(clips).logits_BC.softmax(-1)
        assert row["clips"] == len(clips)
        np.testing.assert_allclose(row["scores"], scores.mean(0), atol=1e-4)
        assert row["label"] == video["label"]
        assert row["prediction"] == int(np.argmax(row["scores"]))
    figures = storage.read_json(str(tmp_path / "evaluate" / "metrics.json"))
    assert (figures["test/videos"], figures["test/listed"]) == (2, 3)
    assert figures["test/accuracy"] == pytest.approx(np.mean([row["prediction"] == row["label"] for row in rows]))


def test_a_manifest_that_does_not_say_what_was_listed() -> None:
    row = {"video_id": "v", "uri": "v.mp4", "split": "val", "start_s": 0.0, "end_s": 1.0, "duration_s": 1.0}
    table = pa.Table.from_pylist([row | {"fps": 8.0, "num_frames": 8, "width": 32, "height": 32}], SCHEMA)
    assert (listed_count(table, "val"), listed_count(table, "test")) == (1, 0)
    assert listed_count(_manifest(Description(listed={"val": 5})), "val") == 5


def test_a_pretrained_encoder_is_not_asked_for_windows() -> None:
    lvu = _manifest(Description(dataset="lvu", protocol="windows"))
    meta = Meta(kind="lsmcl", step=1, model={}, settings={})
    assert evaluate.chosen_protocol(lvu, EvaluateConfig(), meta) == "uniform"
    assert evaluate.chosen_protocol(lvu, EvaluateConfig(protocol="whole"), meta) == "whole"
    with pytest.raises(UserError, match="protocol is 'windows': a pretrained encoder's clips are compared"):
        evaluate.chosen_protocol(lvu, EvaluateConfig(protocol="windows"), meta)
