"""Replicas of an evaluation: what is kept of one that was ended, and a lost one on a real cluster."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipelines import storage
from pipelines.config import EvaluateConfig, ScaleConfig, TrackingConfig
from pipelines.data.manifest import MANIFEST, SCHEMA, Description, metadata
from pipelines.errors import UserError
from pipelines.running.progress import ProgressBar
from pipelines.stages import evaluate
from pipelines.stages.evaluating import replicas
from s5.batch import ClipBatch
from s5.errors import Failure
from s5.evaluation.inference import ClipOutputs
from tests.s5.evaluation.test_prediction import trained
from tests.s5.toys import MODEL

VIDEOS = 11
OFF = TrackingConfig(uri="off")


@dataclass(frozen=True, kw_only=True)
class Clips:
    """A `ClipSource` of two clips a video that its id decides, each in one batch, so that values are the same bits."""

    clips: Any
    frame_size: int
    data: Any
    decode_tasks: int
    protocol: str
    rank: int = 0
    world_size: int = 1

    def evaluation(self, videos: pa.Table, clips_per_video: int, batch_size: int) -> Iterator[ClipBatch]:
        for video in videos.to_pylist()[self.rank :: self.world_size]:
            name = video["video_id"]
            for clip in range(2):
                torch.manual_seed(zlib.crc32(name.encode()) + clip)
                frames = torch.randint(0, 256, (1, self.clips.frames, *[self.frame_size] * 2, 3), dtype=torch.uint8)
                label, target, seed = torch.tensor([video["label"]]), torch.tensor([torch.nan]), torch.zeros(1).long()
                # The second clip of v03 cannot be read.
                cut = name == "v03" and clip == 1
                failures = [Failure(name, name, "cut")] if cut else []
                kept = slice(0) if cut else slice(1)
                names = [name][kept]
                yield ClipBatch(0, 0, names, frames[kept], None, seed[kept], label[kept], target[kept], failures)


@pytest.fixture
def straight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateConfig:
    """Evaluate a model that was not trained on clips without videos."""
    facts = {
        "start_s": 0.0,
        "end_s": 60.0,
        "duration_s": 60.0,
        "fps": 4.0,
        "num_frames": 240,
        "split": "test",
        "width": 64,
        "height": 64,
    }
    rows = [
        facts | {"video_id": f"v{i:02}", "uri": f"v{i}.mp4", "label": i % 3, "class_name": "abc"[i % 3]}
        for i in range(VIDEOS)
    ]
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata(metadata(["a", "b", "c"], Description())))
    storage.write_table(str(tmp_path / MANIFEST), table)
    monkeypatch.setattr(replicas, "DecodedClips", Clips)
    monkeypatch.setattr(replicas, "decode_tasks", lambda scale, data: 1)
    monkeypatch.setattr(replicas, "own_device", lambda scale: "cpu")
    monkeypatch.setattr(evaluate, "check_cluster", lambda scale, data: None)
    config = EvaluateConfig(
        out=str(tmp_path / "straight"),
        checkpoint=str(trained(tmp_path / "checkpoints")),
        manifest=str(tmp_path),
        shard_videos=3,
        data=replace(EvaluateConfig().data, max_failure_share=0.1),
        scale=ScaleConfig(num_workers=0),
        tracking=OFF,
    )
    evaluate.run(config)
    return config


def left_by(config: EvaluateConfig) -> dict[str, Any]:
    tables = [storage.read_table(f"{config.out}/{name}.parquet").to_pylist() for name in ("predictions", "rejects")]
    return {"tables": tables, "metrics": storage.read_json(f"{config.out}/metrics.json")}


def ended(config: EvaluateConfig, parts: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Run an evaluation that ends without warning once it has stored so many parts, and return these."""
    store = replicas._store

    def ending(path: str, part: ClipOutputs) -> None:
        store(path, part)
        if path.endswith(f"{parts:06}.pt"):
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(replicas, "_store", ending)
        with pytest.raises(SystemExit):
            evaluate.run(config)
    return sorted((Path(config.out) / "shards").iterdir())


def test_an_ended_evaluation_does_what_is_left(
    straight: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(straight, out=str(tmp_path / "ended"))
    assert len(ended(config, 2, monkeypatch)) == 2
    seen: list[int] = []
    found = replicas._found

    def counting(*arguments: Any) -> Iterator[ClipOutputs]:
        seen.append(len(arguments[3]))
        return found(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(replicas, "_found", counting)
        evaluate.run(replace(config, batch_size=1))
    # Two parts of three videos are stored, without the one that cannot be read: that is tried again.
    assert seen == [VIDEOS - 5]
    assert "5 of 11 videos are done already" in capsys.readouterr().out
    found, whole = left_by(config), left_by(straight)
    for row, other in zip(found["tables"][0], whole["tables"][0], strict=True):
        # Batches of another size round in another way.
        assert row.pop("scores") == pytest.approx(other.pop("scores"), rel=1e-4)
    assert found == whole
    assert len(left_by(config)["tables"][0]) == VIDEOS - 1
    assert left_by(config)["tables"][1] == [{"video_id": "v03", "uri": "v03", "reason": "cut"}]
    assert not (Path(config.out) / "shards").exists()


def test_a_finished_evaluation_is_left_alone_and_another_one_refused(
    straight: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.run(straight)["metrics"] == left_by(straight)["metrics"]
    assert "straight is finished already; give another --out to evaluate again" in capsys.readouterr().out
    begun = replace(straight, out=str(tmp_path / "ended"))
    ended(begun, 1, monkeypatch)
    table = storage.read_table(str(tmp_path / MANIFEST))
    for config in (straight, begun):
        with pytest.raises(UserError, match="holds a run with clips_per_video 0, not 2: give another --out"):
            evaluate.run(replace(config, clips_per_video=2))
        storage.write_table(str(tmp_path / MANIFEST), table.slice(1))
        with pytest.raises(UserError, match="on another manifest, which has changed since"):
            evaluate.run(config)
        storage.write_table(str(tmp_path / MANIFEST), table)
    shutil.rmtree(tmp_path / "checkpoints")
    trained(tmp_path / "checkpoints", model=replace(MODEL, decoder=replace(MODEL.decoder, blocks=1)))
    for config in (straight, begun):
        with pytest.raises(UserError, match="on another checkpoint, which has changed since"):
            evaluate.run(config)


class Dying:
    """Stands for a replica whose process is lost while it works, the first time."""

    def videos_seen(self) -> int:
        return 0

    def run(self, files: dict[str, bytes], device: str, rank: int, folder: Path) -> Iterator[tuple[int, int, bytes]]:
        mark = folder / f"started_{rank}"
        for part in range(3):
            if (rank, part) == (1, 1) and not mark.exists():
                mark.touch()
                os._exit(1)
            yield rank, part, files["model"]


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_lost_replica_is_replaced_and_its_share_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "Replica", Dying)
    scale = ScaleConfig(num_workers=2, cpus_per_worker=0.5)
    arguments: list[tuple[Any, ...]] = [(rank, tmp_path) for rank in range(2)]
    with ProgressBar("evaluate", "evaluated", 2, "videos") as bar:
        found: list[Any] = list(replicas._by_replicas(scale, {"model": b"weights"}, arguments, bar))
    assert sorted(found) == [(rank, part, b"weights") for rank in range(2) for part in range(3)]
    assert (tmp_path / "started_1").exists()
