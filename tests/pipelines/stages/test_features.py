"""Cached features: made from real videos on a real Ray cluster, resumed, refused when stale, and trained from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from pyarrow import fs
from safetensors.torch import save_file

from pipelines import storage
from pipelines.config import (
    DataConfig,
    EvaluateConfig,
    FeaturesConfig,
    FinetuneConfig,
    IndexConfig,
    PretrainConfig,
    SampleConfig,
    TrackingConfig,
    override,
)
from pipelines.data.clip_order import ClipOrder
from pipelines.data.features.batches import CachedClips
from pipelines.data.features.cache import frame_times, shard_path
from pipelines.data.features.reader import FeatureReader
from pipelines.data.manifest import read_manifest, split_of
from pipelines.errors import UserError
from pipelines.stages import evaluate, features, finetune, index, pretrain, sample
from pipelines.storage.weights import trained_backbone
from s5.config import ClipConfig
from s5.errors import VideoError
from s5.models.backbone import Backbone
from s5.video.clip_times import clip_seed
from s5.video.reading import read_frames
from tests.pipelines.training.test_training import MODEL, losses
from tests.s5.videos import truncate
from tests.tiny import HEADS

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]

FPS, SECONDS = 4, 12
OFF = TrackingConfig(uri="off")
CLIPS = ClipConfig(frames=4, long_stride=2.0, short_stride=0.5)
# Its features are a grid of 2 x 2 tokens of width 192.
OTHER: dict[str, Any] = {f"model.backbone.{key}": None for key in ("depth", "num_heads", "patch_size")} | {
    "model.backbone.name": "swin_tiny_patch4_window7_224",
    "model.backbone.embed_dim": 24,
    "model.backbone.frame_size": 64,
}
BACKBONE = {key: value for key, value in MODEL.items() if key.startswith("model.backbone.")}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Index 30 small videos; one of split train is truncated afterwards."""
    folder = tmp_path_factory.mktemp("data")
    videos, out = str(folder / "videos"), str(folder / "index")
    settings = {"videos": 30, "seconds": SECONDS, "fps": FPS, "size": 32, "val_share": 0.25, "test_share": 0.1}
    sample.run(SampleConfig(out=videos, tracking=OFF, **settings))  # type: ignore[arg-type]
    index.run(IndexConfig(videos=videos, out=out, tracking=OFF))
    truncate(split_of(read_manifest(out), "train")["uri"][3].as_py())
    return out


def write_weights(path: Path, seed: int, changes: dict[str, Any] | None = None) -> str:
    """Write random weights of the backbone."""
    torch.manual_seed(seed)
    settings = BACKBONE | {"model.backbone.frozen": True} | (changes or {})
    save_file(Backbone(override(FeaturesConfig(), settings).model.backbone).vit.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_weights(tmp_path_factory.mktemp("weights") / "vit.safetensors", 1)


def encoding(manifest: str, weights: str, out: Path, **changes: Any) -> FeaturesConfig:
    settings = {
        "manifest": manifest,
        "out": str(out),
        "model.backbone.weights": weights,
        "frames_per_second": FPS,
        "chunk_frames": 20,
        "shard_videos": 7,
        "scale.cpus_per_worker": 0.5,
        "data.cpus_per_decode": 0.5,
        "data.decode_tasks": 2,
        "tracking.uri": "off",
    }
    return override(FeaturesConfig(), BACKBONE | settings | changes)


@pytest.fixture(scope="module")
def cached(manifest: str, weights: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Features of all frames of the videos."""
    config = encoding(manifest, weights, tmp_path_factory.mktemp("features"))
    result = features.run(config)
    assert result["counts"]["rejects"] == 1
    assert result["counts"]["videos"] == 29
    return config.out


def test_tokens_are_those_of_fresh_frames(cached: str, manifest: str, weights: str) -> None:
    reader = FeatureReader(cached)
    backbone = trained_backbone(encoding(manifest, weights, Path(cached)).model.backbone, "")
    for video in read_manifest(manifest).to_pylist()[::5]:
        times_T = frame_times(video["start_s"], video["end_s"], FPS)
        frames_T = reader.frames(video["video_id"], times_T)
        assert frames_T.tolist() == list(range(len(times_T)))
        found = np.empty((len(times_T), 16, 16), np.float16)
        reader.read(video["video_id"], frames_T, found)
        frames = torch.from_numpy(read_frames(video["uri"], times_T, 32))
        with torch.no_grad():
            fresh = backbone(frames[None]).view(found.shape)
        torch.testing.assert_close(torch.from_numpy(found).float(), fresh, rtol=2e-3, atol=2e-3)
        # Frames differ by more than fp16 does, so that a shift by one would be seen.
        assert float((fresh[1:] - fresh[:-1]).abs().amax((1, 2)).max()) > 0.05


def test_every_frame_is_stored_once(cached: str) -> None:
    index = storage.read_table(storage.join(cached, "index.parquet")).to_pylist()
    stored = 0
    for shard in {row["shard"] for row in index}:
        with pa.memory_map(shard_path(cached, shard, "arrow")) as content:
            stored += pa.ipc.open_file(content).read_all().num_rows
    assert stored == sum(row["frames"] for row in index)
    # Windows a second apart share all frames but those of a second.
    reader = FeatureReader(cached)
    times_T = np.arange(24) / FPS
    first, second = (reader.frames(index[0]["video_id"], times_T + start) for start in (1.0, 2.0))
    assert set(first) & set(second) == set(range(8, 28))


def test_reading_allocates_the_clip_alone(cached: str, manifest: str) -> None:
    reader = FeatureReader(cached)
    before = pa.total_allocated_bytes()
    for name in read_manifest(manifest)["video_id"].to_pylist()[::5]:
        frames_T = reader.frames(name, np.arange(40) / FPS)
        reader.read(name, frames_T, np.empty((40, 16, 16), np.float16))
    assert pa.total_allocated_bytes() - before < 20_000


def test_a_video_that_cannot_be_read_is_listed(cached: str, manifest: str) -> None:
    broken = split_of(read_manifest(manifest), "train").to_pylist()[3]
    (reject,) = storage.read_table(storage.join(cached, "rejects.parquet")).to_pylist()
    assert (reject["video_id"], reject["uri"]) == (broken["video_id"], broken["uri"])
    with pytest.raises(VideoError, match="no cached features: .*" + reject["reason"][:20]):
        FeatureReader(cached).frames(broken["video_id"], np.zeros(1))


def test_beyond_the_end_of_a_video_lies_black(cached: str, manifest: str, weights: str) -> None:
    videos = read_manifest(manifest).slice(0, 1)
    clips = ClipConfig(frames=20, long_stride=1.0, short_stride=1.0)
    source = CachedClips(features=cached, clips=clips, frame_size=32, data=DataConfig(), protocol="windows")
    (batch,) = source.evaluation(videos, 1, 4)
    backbone = trained_backbone(encoding(manifest, weights, Path(cached)).model.backbone, "")
    with torch.no_grad():
        black = backbone(torch.zeros(1, 1, 32, 32, 3, dtype=torch.uint8))[0]
    is_black = [torch.allclose(tokens.float(), black, atol=2e-3) for tokens in batch.long[0]]
    assert is_black == [second >= videos["end_s"][0].as_py() for second in range(20)]
    assert 0 < sum(is_black) < 20


def test_batches_follow_the_clip_order(cached: str, manifest: str) -> None:
    train = split_of(read_manifest(manifest), "train")
    plan = ClipOrder(len(train), 6, epochs=2, seed=1)

    def batches(**changes: Any) -> list[Any]:
        start = changes.pop("start_step", 0)
        settings: dict[str, Any] = {"features": cached, "clips": CLIPS, "frame_size": 32, "data": DataConfig()}
        source = CachedClips(**(settings | changes))
        return list(source.training(train, plan, 7, start))

    whole, ids = batches(), train["video_id"].to_pylist()
    rows = plan.rows(0, plan.total_steps)
    planned, taken = [ids[video] for video in rows.video], [name for batch in whole for name in batch.video_ids]
    replaced = [row for row, (was, now) in enumerate(zip(planned, taken, strict=True)) if was != now]
    assert [planned[row] for row in replaced] == [ids[3]] * len(replaced)
    assert [taken[row] for row in replaced] == [ids[rows.spares[row, 0]] for row in replaced]
    assert [failure.video_id for batch in whole for failure in batch.failures] == [ids[3]] * len(replaced)
    assert replaced
    for batch in whole:
        assert batch.seeds.tolist() == [clip_seed(7, batch.epoch, name) for name in batch.video_ids]
        assert batch.long.dtype == torch.float16
    parts = [batches(rank=rank, world_size=2, start_step=1, data=DataConfig(prefetch_batches=0)) for rank in range(2)]
    for one, first, second in zip(whole[1:], *parts, strict=True):
        assert one.step == first.step == second.step
        assert one.video_ids == first.video_ids + second.video_ids
        assert torch.equal(one.long, torch.cat([first.long, second.long]))


def test_an_ended_run_keeps_its_shards(
    manifest: str, weights: str, cached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = encoding(manifest, weights, tmp_path / "features")
    encoded = features.encoded

    def ended(*arguments: Any) -> Iterator[pa.Table]:
        made = encoded(*arguments)
        yield next(made)
        yield next(made)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features, "encoded", ended)
        with pytest.raises(KeyboardInterrupt):
            features.run(config)
    folder = tmp_path / "features" / "shards"
    with pytest.raises(UserError, match=r"there is no features.json; run .* to its end"):
        FeatureReader(config.out)
    # What a killed process leaves: a part of a file, and a shard without its rows of the index.
    (folder / ".0.part").write_bytes(b"x")
    (folder / "00001.parquet").unlink()
    done = {path.stem for path in folder.glob("*.parquet")}
    before = {path.name: path.stat() for path in folder.glob("*.arrow")}
    assert "00000" in done
    with pytest.raises(UserError, match=r"holds a run with frames_per_second 4.0, not 2.0: give another --out"):
        features.run(replace(config, frames_per_second=2.0))
    result = features.run(config)
    assert result["counts"]["shards_kept"] == len(done)
    for path in folder.glob("*.arrow"):
        assert path.read_bytes() == Path(shard_path(cached, int(path.stem), "arrow")).read_bytes()
        if path.stem in done:
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == (
                before[path.name].st_ino,
                before[path.name].st_mtime_ns,
            )
    assert (folder / "00001.arrow").stat().st_ino != before["00001.arrow"].st_ino
    assert not list(folder.glob(".*"))
    assert features.run(config) == result


def frozen(manifest: str, weights: str, out: Path) -> dict[str, Any]:
    """Return the settings of training on a frozen backbone, in which one video may fail."""
    return MODEL | {
        "manifest": manifest,
        "out": str(out),
        "model.backbone.frozen": True,
        "model.backbone.weights": weights,
        "data.max_failure_share": 0.5,
    }


def training(manifest: str, weights: str, out: Path, **changes: Any) -> FinetuneConfig:
    return override(FinetuneConfig(), frozen(manifest, weights, out) | changes)


def test_training_from_features_follows_training_from_frames(
    cached: str, manifest: str, weights: str, tmp_path: Path
) -> None:
    fresh = training(manifest, weights, tmp_path / "fresh")
    read = replace(fresh, out=str(tmp_path / "read"), features=cached)
    two = override(read, {"out": str(tmp_path / "two"), "scale.num_workers": 2, "scale.cpus_per_worker": 1})
    results = [finetune.run(config) for config in (fresh, read, two)]
    assert losses(read) == pytest.approx(losses(fresh), rel=2e-3)
    assert losses(two) == pytest.approx(losses(read), rel=2e-3)
    assert len(set(losses(read))) == len(losses(read)) > 2
    for result in results[1:]:
        for name in ("val/loss", "val/accuracy", "val/videos", "data/failures_total"):
            assert result["metrics"][name] == pytest.approx(results[0]["metrics"][name], rel=5e-3), name
    rejected = [
        storage.read_table(storage.join(c.out, "rejects.parquet"))["video_id"].to_pylist() for c in (fresh, read)
    ]
    assert rejected[0] == rejected[1] != []


def pretraining(manifest: str, weights: str, out: Path, **changes: Any) -> PretrainConfig:
    settings = {"lsmcl.mask_on": "tokens", "views.jitter": 0.0}
    return override(PretrainConfig(), frozen(manifest, weights, out) | HEADS | settings | changes)


def test_pretraining_on_features_follows_pretraining_on_frames(
    cached: str, manifest: str, weights: str, tmp_path: Path
) -> None:
    fresh = pretraining(manifest, weights, tmp_path / "fresh")
    read = replace(fresh, out=str(tmp_path / "read"), features=cached)
    results = [pretrain.run(config) for config in (fresh, read)]
    # Batches of 8 normalise over few rows, which enlarges the rounding of fp16.
    assert losses(read) == pytest.approx(losses(fresh), rel=5e-3)
    assert len(set(losses(read))) == len(losses(read)) > 2
    assert results[0]["metrics"]["knn/videos"] == results[1]["metrics"]["knn/videos"] > 0
    # A pretrained encoder is evaluated on the same features, with probes and without a picture.
    settings: dict[str, Any] = {"manifest": manifest, "checkpoint": read.out, "features": cached, "split": "val"}
    settings |= {"tracking.uri": "off", "scale.num_workers": 0, "probe": "both", "clips_per_video": 2}
    found = evaluate.run(override(EvaluateConfig(), settings | {"out": str(tmp_path / "probe")}))
    assert {"knn/top1", "linear/top1", "linear/decay", "retrieval/same_video"} <= found["metrics"].keys()
    assert storage.read_json(str(tmp_path / "probe" / "metrics.json")) == found["metrics"]
    assert not (tmp_path / "probe" / "neighbours.png").exists()


def test_a_backbone_of_another_kind_runs_through_all_stages(manifest: str, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "swin.safetensors", 3, OTHER)
    made = encoding(manifest, weights, tmp_path / "features", **OTHER)
    features.run(made)
    meta = FeatureReader(made.out).meta
    assert (meta.tokens, meta.width, meta.backbone["name"]) == (4, 192, "swin_tiny_patch4_window7_224")
    one_epoch = {"features": made.out, "loop.epochs": 1}
    read = pretraining(manifest, weights, tmp_path / "read", **OTHER, **one_epoch)
    pretrain.run(read)
    changes = OTHER | one_epoch | {"checkpoint": read.out}
    tuned = training(manifest, "", tmp_path / "tuned", **changes)
    finetune.run(tuned)
    settings: dict[str, Any] = {"manifest": manifest, "checkpoint": tuned.out, "split": "val", "batch_size": 5}
    settings |= {"tracking.uri": "off", "scale.num_workers": 0, "data.cpus_per_decode": 0.5}
    frames = override(EvaluateConfig(), settings | {"out": str(tmp_path / "evaluated")})
    columns, score_VC = predictions(frames)
    found, found_VC = predictions(replace(frames, out=str(tmp_path / "evaluated_read"), features=made.out))
    assert found == columns
    np.testing.assert_allclose(found_VC, score_VC, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips.short_stride": 0.2}, r"clips.short_stride is 0.2 seconds, 0.2 s: .* are 0.25 s apart; raise"),
        ({"model.backbone.depth": 2, "model.backbone.weights": ""}, "a frozen backbone needs trained weights, since"),
        (
            OTHER | {"lsmcl.mask_on": "patches", "features": ""},
            r"lsmcl.mask_on is 'patches': swin_tiny_patch4_window7_224 sees whole frames, .* give tokens",
        ),
        ({"model.backbone.cls_token": True}, r"computed with model.backbone.cls_token False, not True"),
    ],
)
def test_features_of_something_else_are_refused_in_pretraining(
    changes: dict[str, Any], message: str, cached: str, manifest: str, weights: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        pretrain.build_job(pretraining(manifest, weights, tmp_path, **({"features": cached} | changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.backbone.frozen": False}, "model.backbone.frozen is False: cached features are of a frozen backbone"),
        ({"lsmcl.mask_on": "patches"}, "lsmcl.mask_on is 'patches': cached features are of whole frames; give tokens"),
        ({"views.jitter": 0.4}, "views.jitter is 0.4: cached features have no pixels to change; give --views.jitter 0"),
        (
            {"views.crop_scale": (0.1, 1), "views.blur": (1, 0)},
            r"views.crop_scale is .* and views.blur is .* no pixels .*; give --views.crop-scale --views.blur 0 0",
        ),
    ],
)
def test_settings_that_features_cannot_follow_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pretraining("manifest", "", Path("out"), features="out/features", **changes)


def predictions(config: EvaluateConfig) -> tuple[dict[str, list[Any]], npt.NDArray[np.float64]]:
    """Evaluate and return the columns of the predictions, and the scores apart."""
    evaluate.run(config)
    columns = storage.read_table(storage.join(config.out, "predictions.parquet")).to_pydict()
    return columns, np.array(columns.pop("scores"))


def test_features_of_a_checkpoint_give_its_predictions(
    cached: str, manifest: str, weights: str, tmp_path: Path
) -> None:
    # The checkpoint's backbone has learned: its weights are no longer those of the file.
    changes = {"model.backbone.frozen": False, "protocol": "windows", "loop.epochs": 1}
    learned = training(manifest, weights, tmp_path / "learned", **changes)
    finetune.run(learned)
    made = encoding(manifest, "", tmp_path / "features", checkpoint=learned.out)
    features.run(made)
    assert FeatureReader(made.out).meta.weights != FeatureReader(cached).meta.weights
    on_features = {"model.backbone.frozen": True, "checkpoint": learned.out, "features": made.out}
    tuned = training(manifest, "", tmp_path / "tuned", **(changes | on_features))
    finetune.run(tuned)
    with pytest.raises(UserError, match="computed with other weights of the backbone than this run's"):
        finetune.build_job(replace(tuned, features=cached))
    for config in (learned, tuned):
        settings: dict[str, Any] = {"manifest": manifest, "checkpoint": config.out, "split": "val"}
        settings |= {"tracking.uri": "off", "scale.num_workers": 0, "data.cpus_per_decode": 0.5, "batch_size": 5}
        fresh = override(EvaluateConfig(), settings | {"out": f"{config.out}_fresh"})
        read = replace(fresh, out=f"{config.out}_read", features=made.out)
        columns, score_VC = predictions(fresh)
        found, found_VC = predictions(read)
        assert found == columns
        np.testing.assert_allclose(found_VC, score_VC, rtol=5e-3)
        # Videos differ by more than the tolerance, and their windows are several.
        assert np.ptp(score_VC / score_VC.mean(0), axis=0).max() > 0.02
        assert min(columns["clips"]) > 1
        with pytest.raises(UserError, match="computed with other weights of the backbone than this run's"):
            evaluate.run(replace(read, features=cached))


@pytest.mark.parametrize(
    ("workers", "nodes", "decoders"),
    [(1, [2.0], 3), (2, [2.0], 1), (1, [16.0, 16.0], 31), (2, [16.0, 16.0], 31), (3, [16.0, 16.0], 15), (1, [0.5], 1)],
)
def test_a_worker_and_its_decoders_fit_on_a_node(workers: int, nodes: list[float], decoders: int) -> None:
    config = encoding("manifest", "", Path("out"), **{"scale.num_workers": workers})
    tasks = int((sum(nodes) - workers * 0.5) / 0.5)
    assert features.decoders_each(config, tasks, nodes) == decoders


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.backbone.frame_size": 64},
            r"computed with model.backbone.frame_size 32, not 64; recompute them or give",
        ),
        ({"model.backbone.cls_token": True}, r"computed with model.backbone.cls_token False, not True"),
        (
            {"model.backbone.weights": ""},
            r"backbone.weights is 'timm': .*; a frozen backbone needs trained weights, since random ones would stay so",
        ),
        ({"clips.long_stride": 0.2, "clips.short_stride": 0.1}, r"clips.long_stride is 0.2 .* are 0.25 s apart; raise"),
        ({"features": "nowhere"}, r"features is '.*nowhere': there is no features.json"),
    ],
)
def test_features_of_something_else_are_refused(
    changes: dict[str, Any], message: str, cached: str, manifest: str, weights: str, tmp_path: Path
) -> None:
    config = training(manifest, weights, tmp_path, **({"features": cached} | changes))
    with pytest.raises(UserError, match=message):
        finetune.build_job(config)


def test_other_weights_and_another_manifest_are_refused(
    cached: str, manifest: str, weights: str, tmp_path: Path
) -> None:
    config = training(manifest, weights, tmp_path, features=cached)
    assert finetune.build_job(config).inputs["features"] == FeatureReader(cached).meta.digest
    other = write_weights(tmp_path / "other.safetensors", 2)
    with pytest.raises(UserError, match="computed with other weights of the backbone than this run's"):
        finetune.build_job(override(config, {"model.backbone.weights": other}))
    videos, folder = read_manifest(manifest), tmp_path / "changed"
    changed = override(config, {"manifest": str(folder)})

    def stored(table: pa.Table) -> None:
        storage.write_table(str(folder / "manifest.parquet"), table)

    # Fewer videos, in another order and with other splits, are served.
    stored(videos.take(pa.array(range(len(videos) - 2, -1, -1))))
    assert finetune.build_job(changed).inputs["features"] == finetune.build_job(config).inputs["features"]
    first = min(videos["video_id"].to_pylist())
    for name, values in (("end_s", pc.add(videos["end_s"], 0.5)), ("decoder", pa.array(["other"] * len(videos)))):
        stored(videos.set_column(videos.schema.get_field_index(name), videos.schema.field(name), values))
        lacks = rf"which lacks {len(videos)} of the {len(videos)} videos .* such as '{first}'"
        with pytest.raises(UserError, match=lacks):
            finetune.build_job(changed)


def test_a_backbone_that_learns_or_has_no_weights_has_no_features(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.backbone.frozen is False: cached features are of a frozen backbone"):
        training("manifest", "", tmp_path, **{"features": "out/features", "model.backbone.frozen": False})
    with pytest.raises(UserError, match=r"backbone.weights is 'timm': .*; a frozen backbone needs trained weights"):
        trained_backbone(encoding("manifest", "", tmp_path).model.backbone, "")
    with pytest.raises(UserError, match=r"model.backbone.tubelet is 2: features are of single frames"):
        encoding("manifest", "", tmp_path, **{"model.backbone.tubelet": 2})


def test_damage_is_told(cached: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "copy")
    fs.copy_files(cached, folder)
    path = Path(shard_path(folder, 0, "arrow"))
    truncate(str(path))
    reader, out = FeatureReader(folder), np.empty((1, 16, 16), np.float16)
    name = storage.read_table(storage.join(folder, "index.parquet"))["video_id"][0].as_py()
    with pytest.raises(UserError, match=r"00000.arrow is missing or damaged .* recompute them"):
        reader.read(name, np.zeros(1, np.int64), out)
    storage.write_json(storage.join(folder, "features.json"), {"format": 0})
    with pytest.raises(UserError, match=r"features.json is damaged"):
        FeatureReader(folder)


# --- storage --------------------------------------------------------------------------------------------------------


def test_features_in_an_object_store_read_the_same(cached: str, bucket: str) -> None:
    copy = f"{bucket}/features"
    for path in sorted(Path(cached).rglob("*")):
        if path.is_file():
            storage.write_bytes(f"{copy}/{path.relative_to(cached)}", path.read_bytes())
    here, there = FeatureReader(cached), FeatureReader(copy)
    name = storage.read_table(storage.join(cached, "index.parquet"))["video_id"][-1].as_py()
    frames_T = np.array([0, 19, 20, 35, -1])
    found = np.empty((2, 5, 16, 16), np.float16)
    for reader, out_TND in zip((here, there), found, strict=True):
        reader.read(name, frames_T, out_TND)
    np.testing.assert_array_equal(found[0], found[1])
    assert there.meta == here.meta
