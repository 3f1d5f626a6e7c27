"""Features of other programs: imported by a real Ray cluster, resumed, and trained from without a frame encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.command_line import parse
from pipelines.config import EvaluateConfig, FeaturesConfig, FinetuneConfig, PretrainConfig, override
from pipelines.data.features.reader import FeatureReader
from pipelines.data.manifest import SCHEMA, Description, metadata
from pipelines.errors import UserError
from pipelines.stages import evaluate, features, finetune, imported, pretrain
from tests.tiny import HEADS, TINY

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]

TOKENS, WIDTH, SECONDS = 2, 16, 20
VIDEOS = 24
OWN = {key: value for key, value in TINY.items() if not key.startswith("model.backbone.")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write features and a manifest of two classes told apart by their tokens; one has NaN, one no file."""
    folder = tmp_path_factory.mktemp("foreign")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(VIDEOS):
        array = generator.standard_normal((SECONDS, TOKENS, WIDTH)).astype(np.float32)
        array += 3 * (number % 2)
        if number == 0:
            array[SECONDS - 1] = np.nan
        if number != 1:
            (folder / "files").mkdir(exist_ok=True)
            np.save(folder / "files" / f"v{number}.npy", array)
        facts: dict[str, Any] = {"start_s": 0.0, "end_s": float(SECONDS), "duration_s": float(SECONDS), "fps": 25.0}
        facts |= {"num_frames": 500, "width": 1, "height": 1, "uri": f"/videos/v{number}.mp4", "video_id": f"v{number}"}
        label = number % 2
        rows.append(facts | {"split": "train" if number < 16 else "val", "label": label, "class_name": "ab"[label]})
    np.save(folder / "files" / "stranger.npy", generator.standard_normal((SECONDS, TOKENS, WIDTH)))
    table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata(metadata(["a", "b"], Description()))
    storage.write_table(str(folder / "manifest.parquet"), table)
    return folder


def importing(folder: Path, out: Path) -> FeaturesConfig:
    line = f"features --manifest {folder}/manifest.parquet --import {folder}/files --backbone vit-l --format npy "
    line += f"--frames-per-second 1 --out {out} --shard-gigabytes 1e-5 --chunk-frames 8 --tracking.uri off "
    _, config = parse((line + "--data.cpus-per-decode 2").split())
    assert isinstance(config, FeaturesConfig)
    return config


def check(folder: Path, out: str) -> None:
    reader = FeatureReader(out)
    for number in range(2, VIDEOS):
        found = np.empty((SECONDS, TOKENS, WIDTH), np.float16)
        reader.read(f"v{number}", reader.frames(f"v{number}", np.arange(SECONDS, dtype=np.float64)), found)
        np.testing.assert_array_equal(found, np.load(folder / "files" / f"v{number}.npy").astype(np.float16))
    rejects = storage.read_table(storage.join(out, "rejects.parquet")).to_pylist()
    assert [row["video_id"] for row in rejects] == ["v0", "v1", "stranger"]
    assert all(row["reason"] for row in rejects)


def test_an_ended_import_keeps_its_shards_and_is_trained_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = importing(folder, tmp_path / "features")
    made = imported.imported

    def ended(*arguments: Any) -> Iterator[pa.Table]:
        yield next(made(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(imported, "imported", ended)
        with pytest.raises(KeyboardInterrupt):
            features.run(config)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features" / "shards").glob("*.parquet")}
    result = features.run(config)
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features" / "shards").glob("*.parquet")}
    assert kept.items() <= shards.items()
    # Tasks of the ended run may have written another one after the look at the folder.
    assert 0 < len(kept) <= result["counts"]["shards_kept"] < len(shards)
    counts = {"videos": VIDEOS - 2, "rejects": 2, "strangers": 1, "frames": (VIDEOS - 2) * SECONDS}
    assert result["counts"] | counts == result["counts"]
    check(folder, config.out)
    np.save(folder / "files" / "more.npy", np.zeros((2, 2, 2)))
    with pytest.raises(UserError, match="holds a run on another set of feature files"):
        features.run(config)
    (folder / "files" / "more.npy").unlink()
    trained_from(folder, tmp_path, config.out)


def trained_from(folder: Path, tmp_path: Path, made: str) -> None:
    common: dict[str, Any] = {"manifest": str(folder / "manifest.parquet"), "features": made}
    common |= {"model.backbone.name": "vit-l", "model.backbone.frozen": True, "tracking.uri": "off"}
    common |= {"clips.short_stride": 1.0, "data.max_failure_share": 0.5}
    settings = OWN | HEADS | common | {"out": str(tmp_path / "pre"), "lsmcl.mask_on": "tokens", "views.jitter": 0.0}
    pretrain.run(override(PretrainConfig(), settings | {"loop.epochs": 1}))
    settings = OWN | common | {"out": str(tmp_path / "fine"), "checkpoint": str(tmp_path / "pre"), "loop.epochs": 15}
    tuned = override(FinetuneConfig(), settings)
    finetune.run(tuned)
    evaluation = override(
        EvaluateConfig(),
        {key: common[key] for key in ("manifest", "features", "tracking.uri")}
        | {"checkpoint": tuned.out, "split": "val", "out": str(tmp_path / "eval"), "scale.num_workers": 0},
    )
    assert evaluate.run(evaluation)["metrics"]["val/accuracy"] == 1.0
    with pytest.raises(UserError, match=r"features is '': the checkpoint has no frame encoder, .* of 'vit-l'; give"):
        evaluate.run(replace(evaluation, features="", out=str(tmp_path / "no")))
    other = override(FinetuneConfig(), settings | {"model.backbone.name": "swin"})
    with pytest.raises(UserError, match=r"imported from 'vit-l', not 'swin'"):
        finetune.build_job(other)
