"""Stage `predict`: what it prints and stores, what it resumes, and that it agrees with `evaluate`."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import s5
from pipelines import storage
from pipelines.command_line import main, parse
from pipelines.config import EvaluateConfig, PredictConfig, override
from pipelines.data.decoding.video_process import VideoProcess
from pipelines.data.decoding.video_requests import FramesRequest
from pipelines.data.manifest import MANIFEST, SCHEMA, Description, metadata
from pipelines.data.predicting import overlay
from pipelines.data.predicting.rows import clock
from pipelines.stages import evaluate, predict
from s5.errors import VideoError
from s5.evaluation.prediction import KeptTokens
from s5.video.reading import probe, read_frames
from tests.s5.evaluation.test_prediction import trained
from tests.s5.toys import MODEL
from tests.s5.videos import truncate, write_coded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a fine-tuned run and three videos, of which one is broken."""
    folder = tmp_path_factory.mktemp("predict")
    checkpoint = trained(folder / "finetune" / "checkpoints", protocol="windows")
    (folder / "finetune" / "result.json").write_text(json.dumps({"checkpoint": str(checkpoint)}))
    (folder / "videos" / "b").mkdir(parents=True)
    write_coded(folder / "videos" / "a.mp4", frames=46, fps=4)
    write_coded(folder / "videos" / "b" / "b.mp4", frames=20, fps=4, size=(96, 64))
    shutil.copy(folder / "videos" / "a.mp4", folder / "videos" / "cut.mp4")
    truncate(str(folder / "videos" / "cut.mp4"))
    (folder / "videos" / "notes.txt").write_text("no video")
    return folder


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def arguments(folder: Path, **settings: Any) -> list[str]:
    given = {"checkpoint": folder / "finetune", "tracking.uri": "off"} | settings
    return [f"--{key}={value}" for key, value in given.items()]


def test_json_lines_without_ray_or_mlflow(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["predict", str(folder / "videos"), str(tmp_path / "gone.mp4"), *arguments(folder)]) == 0
    said = capsys.readouterr()
    first, second, cut, gone = lines(said.out)
    direct = s5.load_model(folder / "finetune").predict(folder / "videos" / "a.mp4")
    assert first["video"] == str(folder / "videos" / "a.mp4")
    assert (first["label"], first["clips"], first["seconds"]) == (direct.label, 8, 11.5)
    assert first["probability"] == pytest.approx(direct.probability, abs=1e-6)
    assert set(first["top"]) == {"a", "b", "c"}
    assert next(iter(first["top"])) == first["label"]
    assert [(part["start_s"], part["end_s"]) for part in first["over_time"]] == [(0, 4), (4, 8), (7.5, 11.5)]
    assert second["video"].endswith("b/b.mp4")
    assert gone == {"video": str(tmp_path / "gone.mp4"), "reason": "file not found"}
    assert "not a video file" in cut["reason"] or "truncated" in cut["reason"]
    assert "2 videos, 16 s long, and 2 rejects" in said.err
    assert not list(tmp_path.iterdir())


def test_regression_has_values(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, "regression")
    assert main(["predict", str(folder / "videos/a.mp4"), f"--checkpoint={checkpoint}", "--every-s", "2"]) == 0
    (line,) = lines(capsys.readouterr().out)
    assert {"label", "probability", "top"}.isdisjoint(line)
    assert isinstance(line["value"], float)
    assert [(part["start_s"], "label" in part) for part in line["over_time"]] == [
        (start, False) for start in (0, 2, 4, 6, 7.5)
    ]


def test_a_table_on_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    videos = str(folder / "videos" / "*.mp4")
    assert main(["predict", videos, *arguments(folder)]) == 0
    head, video, stretch, cut = capsys.readouterr().out.splitlines()
    assert head.split() == ["video", "length", "prediction"]
    assert video.startswith("…")
    assert "0:11" in video
    assert "%" in video
    # All windows have the same label, so they are one stretch.
    assert "0:00 to 0:11" in stretch
    assert "cannot be read" in cut
    assert [clock(seconds) for seconds in (0, 59.9, 61, 3600, 36125)] == ["0:00", "0:59", "1:01", "1:00:00", "10:02:05"]


def test_a_run_that_was_ended_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = arguments(folder, out=tmp_path / "out", shard_videos=1)
    write, written = storage.write_table, []

    def ended(path: str, table: pa.Table) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, table)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_table", ended)
        assert main(["predict", str(folder / "videos"), *settings]) == 130
    capsys.readouterr()
    assert main(["predict", str(folder / "videos"), *settings]) == 0
    said = capsys.readouterr()
    assert [Path(line["video"]).name for line in lines(said.out)] == ["b.mp4", "cut.mp4"]
    assert "1 of 3 shards are there already" in said.err
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert json.loads(table.schema.metadata[b"classes"]) == ["a", "b", "c"]
    assert [Path(name).name for name in table["video"].to_pylist()] == ["a.mp4", "b.mp4"]
    (reject,) = storage.read_table(str(tmp_path / "out" / "rejects.parquet")).to_pylist()
    assert reject["uri"].endswith("cut.mp4")
    result = storage.read_json(str(tmp_path / "out" / "result.json"))
    assert result["counts"] == {"videos": 2, "rejects": 1}
    assert result["metrics"]["predict/seconds"] == pytest.approx(16.5)
    assert not (tmp_path / "out" / "shards").exists()
    assert main(["predict", str(folder / "videos"), *settings]) == 0
    assert "is finished already" in capsys.readouterr().err
    assert main(["predict", str(folder / "videos/a.mp4"), *settings]) == 2
    assert "holds a run on another list of videos" in capsys.readouterr().err


def test_a_dry_run_reads_no_video(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", str(folder / "videos"), *arguments(folder, out=tmp_path / "out"), "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.search("# predict .* 3 videos", said)
    assert not list(tmp_path.iterdir())
    settings = tmp_path / "settings.yaml"
    settings.write_text(said)
    assert parse(["predict", "--config", str(settings)]) == parse(words[:-1])


@pytest.mark.slow
@pytest.mark.cluster
def test_workers_agree_with_evaluate(folder: Path, tmp_path: Path, ray_local: None) -> None:
    rows = []
    for number, name in enumerate(("a.mp4", "b/b.mp4")):
        facts = probe(path := str(folder / "videos" / name))
        row = {"video_id": name, "uri": path, "split": "test", "label": number, "class_name": "ab"[number]}
        columns = ("duration_s", "fps", "num_frames", "width", "height", "decoder")
        rows.append(row | {"start_s": 0.0, "end_s": facts.duration_s} | {key: getattr(facts, key) for key in columns})
    about = metadata(["a", "b", "c"], Description())
    storage.write_table(str(tmp_path / MANIFEST), pa.Table.from_pylist(rows, SCHEMA.with_metadata(about)))
    common = {"checkpoint": str(folder / "finetune"), "tracking.uri": "off", "data.cpus_per_decode": 0.5}
    evaluation = {"manifest": str(tmp_path), "scale.num_workers": 0}
    prediction = {"videos": [str(folder / "videos")], "shard_videos": 1, "scale.cpus_per_worker": 0.5}
    for protocol, workers in (("windows", 2), ("multi-clip", 0)):
        out: dict[str, Any] = {"out": str(tmp_path / f"evaluate-{protocol}"), "protocol": protocol}
        evaluate.run(override(EvaluateConfig(), common | evaluation | out))
        out |= {"out": str(tmp_path / f"predict-{protocol}"), "scale.num_workers": workers}
        found = predict.run(override(PredictConfig(), common | prediction | out))
        assert found["counts"] == {"videos": 2, "rejects": 1}
        expected = pq.read_table(tmp_path / f"evaluate-{protocol}" / "predictions.parquet").to_pylist()
        rows = pq.read_table(tmp_path / f"predict-{protocol}" / "predictions.parquet").to_pylist()
        for one, other in zip(rows, expected, strict=True):
            assert one["video"].endswith(other["video_id"])
            assert one["clips"] == other["clips"]
            np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5)
            assert one["label"] == other["predicted_class"]


def test_pictures_of_what_is_kept(folder: Path, tmp_path: Path) -> None:
    video, made = folder / "videos" / "b" / "b.mp4", tmp_path / "made" / "o.mp4"
    settings = arguments(folder, overlay=made, contact_sheet=tmp_path / "sheet.png")
    assert main(["predict", *settings, str(video)]) == 0
    old, new = probe(str(video)), probe(str(made))
    assert (new.num_frames, new.width, new.height) == (old.num_frames, 96, 64)
    assert new.duration_s == pytest.approx(old.duration_s)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    # Half of the tokens are kept, and nothing is seen beside the square in the middle.
    with av.open(str(made)) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    with av.open(str(video)) as container:
        before = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    bright = before.mean(2) > 200
    dark = frame.mean(2) < 0.4 * before.mean(2)
    assert (dark | ~bright)[:, :14].all()
    assert (dark | ~bright)[:, -14:].all()


def test_the_light_of_tokens() -> None:
    share = np.array([[1.0, 0.0], [0.5, 1.0]], np.float32)
    light = overlay.light(share, (8, 4))[..., 0]
    assert light.shape == (4, 8)
    assert light[0].tolist() == [0.25, 0.25, 1.0, 1.0, 0.25, 0.25, 0.25, 0.25]
    assert light[3].tolist() == [0.25, 0.25, 0.625, 0.625, 1.0, 1.0, 0.25, 0.25]
    assert overlay.light(share, (4, 8)).shape == (8, 4, 1)


def test_the_most_kept_of_each_stretch() -> None:
    share = np.zeros((10, 2, 2), np.float32)
    share[[1, 4, 9]] = 1
    share[6, 0, 0] = 1
    kept = KeptTokens(np.arange(10.0), share)
    assert overlay.most_kept(kept, 3).tolist() == [1, 4, 9]
    assert overlay.most_kept(kept).tolist() == list(range(10))
    assert overlay.most_kept(KeptTokens(np.zeros(1), share[:1])).tolist() == [0]


def test_a_video_stays_open_in_the_child(folder: Path) -> None:
    path = str(folder / "videos" / "a.mp4")
    facts = probe(path)
    process = VideoProcess()
    try:
        for times in ([0.0, 1.0], [2.0, 9.0], [3.0], [11.25]):
            request = FramesRequest(np.array(times), 32, (facts.width, facts.height), facts.decoder)
            frames = process.frames(path, request, 30.0)
            assert np.array_equal(frames, read_frames(path, np.array(times), 32))
            with pytest.raises(VideoError, match="file not found"):
                process.frames("gone.mp4", request, 30.0)
        assert process.probe(path, 30.0) == facts
    finally:
        process.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"videos is \(\): give at least one, as in `predict a.mp4`"),
        (["no*.mp4"], "videos is 'no.*': no file has a name like that"),
        (["empty"], "videos is 'empty': there is no video below that folder"),
        (["cut.mp4"], r"none of the 1 videos can be read \('cut.mp4'"),
        (["cut.mp4", "--overlay", "o.avi"], "overlay is 'o.avi': give a name that ends in .mp4"),
        (["a.mp4", "--videos", "cut.mp4"], r"videos is given with --videos and without \('a.mp4'\): give all of them"),
        (["a.mp4", "-v"], "'-v' belongs to no option"),
        (["a.mp4", "b.mp4", "--contact-sheet", "s.png"], "it is of one video, and there are 2; give one"),
        ([".", "--overlay", "o.mp4"], "it is of one video, and there are"),
        (["./cut.mp4", "--overlay", "cut.mp4"], "overlay is 'cut.mp4': that is the video itself"),
        (["cut.mp4", "--contact-sheet", "/dev/null/s.png"], "contact_sheet is '/dev/null/s.png': its folder cannot"),
        (["cut.mp4", "--every-s", "0.001"], "every_s is 0.001: give 0, or at least 0.04 seconds"),
        (["a.mp4", "--scale.num-workers", "2"], "out is '': what many workers predict is kept there"),
        (["a.mp4", "--checkpoint", "all", "--overlay", "o.mp4"], "vis4mer, keeps all tokens in its first block"),
        (["s3://key:secret@bucket/a.mp4"], r"'s3://\*\*\*@bucket/a.mp4' holds credentials or a query"),
        (["a.mp4", "--checkpoint", "nowhere"], "checkpoint is 'nowhere': there is no such folder"),
    ],
)
def test_mistakes_cost_a_sentence(
    words: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.mp4", "cut.mp4"):
        shutil.copy(folder / "videos" / name, tmp_path / name)
    if "all" in words:
        plain = replace(MODEL, decoder=replace(MODEL.decoder, name="vis4mer"))
        shutil.move(trained(tmp_path / "made", model=plain), tmp_path / "all")
    checkpoint = [] if "--checkpoint" in words else [f"--checkpoint={folder / 'finetune'}"]
    assert main(["predict", *words, *checkpoint]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"^error: .*{message}", said), said
