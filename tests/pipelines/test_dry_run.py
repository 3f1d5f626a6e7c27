"""Dry runs of single stages: what they count, what they refuse, and that they leave nothing behind."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import save_file
from torch import Tensor

from pipelines import command_line, storage
from pipelines.command_line import parse, take_dry_run
from pipelines.config import EvaluateConfig, FeaturesConfig, FinetuneConfig, PretrainConfig, SweepConfig, override
from pipelines.data.features.cache import IMPORTED, FeatureMeta
from pipelines.data.features.cache import META as FEATURES
from pipelines.data.manifest import MANIFEST, SCHEMA, digest, read_manifest
from pipelines.dry_run import costs_of, plan_of
from pipelines.errors import UserError
from pipelines.recipes.costs import Cost
from pipelines.recipes.rates import NODES
from pipelines.recipes.roles import roles
from s5.checkpoints.checkpoint import META, MODEL, Meta, meta_bytes
from s5.config import SEGMENTS
from s5.models.video_model import VideoModel
from tests.tiny import HEADS, TINY

LENGTHS = {"train": [20.0] * 12, "val": [30.0] * 3, "test": [70.0, 20.0]}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dry_run")
    texts = {name: "x" for name in SCHEMA.names if pa.types.is_string(SCHEMA.field(name).type)}
    rows = [
        texts
        | {"video_id": f"{split}{i}", "split": split, "start_s": 0.0, "end_s": seconds, "duration_s": seconds}
        | {
            "fps": 8.0,
            "num_frames": int(8 * seconds),
            "width": 32,
            "height": 32,
            "label": i % 2,
            "class_name": f"class{i % 2}",
        }
        for split, lengths in LENGTHS.items()
        for i, seconds in enumerate(lengths)
    ]
    storage.write_table(str(folder / MANIFEST), pa.Table.from_pylist(rows, SCHEMA))
    return str(folder)


def training(config: PretrainConfig | FinetuneConfig, manifest: str, **changes: Any) -> Any:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    heads = HEADS if isinstance(config, PretrainConfig) else {}
    return override(config, TINY | heads | {"manifest": manifest, "loop.batch_size": 5, "loop.epochs": 4} | dotted)


def cost(config: Any, node: str = "cpu-2") -> Cost:
    (found,) = costs_of(config, NODES[node])
    return found


def test_clips_and_steps_are_counted(manifest: str) -> None:
    # 4 epochs of 2 batches of 5 pairs; all 15 labelled videos are probed every second epoch.
    pretraining = cost(training(PretrainConfig(), manifest, loop__evaluate_every=2))
    assert (pretraining.steps, pretraining.clips) == (8, 2 * 8 * 5 + 2 * (12 + 3))
    tuning = cost(training(FinetuneConfig(), manifest, loop__evaluate_every=4))
    assert (tuning.steps, tuning.clips) == (8, 8 * 5 + 3)
    faster = cost(training(FinetuneConfig(), manifest, loop__evaluate_every=4), "h200")
    assert faster.seconds is not None
    assert tuning.seconds is not None
    assert faster.seconds < tuning.seconds
    backbone = {key: value for key, value in TINY.items() if key.startswith("model.backbone")}
    features = override(FeaturesConfig(), backbone | {"manifest": manifest, "frames_per_second": 2.0})
    # Frames of each half of a second, and as many tokens in each.
    assert cost(features).tokens == sum(2 * int(each) for lengths in LENGTHS.values() for each in lengths) * 16
    sweep = override(SweepConfig(space=("optim.lr=1e-3,1e-4", "loop.epochs=2,4"), stages="finetune"), {})
    found = cost(dataclasses.replace(sweep, finetune=training(FinetuneConfig(), manifest, loop__evaluate_every=0)))
    assert (found.stage, found.input) == ("finetune", "4 trials")


def checkpoint(
    folder: Path, config: FinetuneConfig, kind: Any, weights: dict[str, Tensor] | None = None, **model: Any
) -> str:
    """Write a checkpoint, of a model whose frame encoder has other settings than that of a config."""
    folder.mkdir()
    save_file({f"model.{key}": value for key, value in (weights or {}).items()}, folder / MODEL)
    settings = {"clips": dataclasses.asdict(config.clips), "protocol": "multi-clip"}
    there = dataclasses.asdict(config.model)
    meta = Meta(
        kind=kind,
        step=1,
        model=there | {"backbone": there["backbone"] | model},
        classes=["class0", "class1"],
        settings=settings,
        files={MODEL: hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()},
    )
    (folder / META).write_bytes(meta_bytes(meta))
    return str(folder)


def features_of(folder: Path, manifest: str, name: str) -> str:
    """Write what is known of cached features that another program made: 4 tokens a frame."""
    meta = FeatureMeta(
        backbone={"name": name},
        weights=f"{IMPORTED}x",
        mean=[],
        std=[],
        precision="fp32",
        frames_per_second=2.0,
        manifest=digest(read_manifest(manifest)),
        tokens=4,
        width=16,
        chunk_frames=64,
    )
    storage.write_json(str(folder / FEATURES), dataclasses.asdict(meta))
    return str(folder)


def test_segments_are_counted_in_place_of_frames(manifest: str, tmp_path: Path) -> None:
    config = training(FinetuneConfig(), manifest)
    model = VideoModel(config.model, 2)
    there = checkpoint(tmp_path / "there", config, "class", model.state_dict())
    found = cost(FeaturesConfig(manifest=manifest, checkpoint=there, segment_s=9.0))
    # The last segment of a video is shorter: 3 of 20 s, 4 of 30 s, 8 of 70 s.
    segments = 12 * 3 + 3 * 4 + 8 + 3
    assert found.input == f"{segments} segments of 9 s, 4 frames each"
    assert (found.clips, found.tokens) == (segments, segments * 4 * 16)
    # One embedding each, in fp16.
    assert found.disk == segments * model.decoder.out_width * 2
    with pytest.raises(UserError, match=r"checkpoint is .*nowhere': there is no such folder"):
        cost(FeaturesConfig(manifest=manifest, checkpoint=str(tmp_path / "nowhere"), segment_s=9.0))


def test_an_import_counts_the_files_of_its_videos(manifest: str, tmp_path: Path) -> None:
    for name in ("train0", "train1", "test0", "stranger"):
        np.save(tmp_path / f"{name}.npy", np.zeros((20, 4, 16), np.float16))
    (tmp_path / "notes.txt").touch()
    config = FeaturesConfig(manifest=manifest, import_=str(tmp_path), backbone="mine")
    found = cost(config)
    assert found.input == "3 of 17 videos have a file, 1 files of no video, 1 others left out"
    assert (found.tokens, found.disk) == ((20 + 20 + 70) * 4, (20 + 20 + 70) * 4 * 16 * 2)
    with pytest.raises(UserError, match="no file below it ends in"):
        cost(dataclasses.replace(config, format="pt"))


def test_frames_are_encoded_by_the_backbone_of_the_checkpoint(manifest: str, tmp_path: Path) -> None:
    config = training(FinetuneConfig(), manifest)
    there = checkpoint(tmp_path / "there", config, "class", VideoModel(config.model, 2).state_dict())
    backbone = {key: value for key, value in TINY.items() if key.startswith("model.backbone")}
    features = override(FeaturesConfig(), backbone | {"manifest": manifest, "checkpoint": there})
    assert cost(features).input == "420 frames"
    with pytest.raises(UserError, match="depth"):
        cost(override(features, {"model.backbone.depth": 2}))


@pytest.mark.parametrize(("kind", "splits"), [("class", ["test"]), ("lsmcl", ["test", "train"])])
def test_an_evaluation_counts_what_a_checkpoint_reads(
    manifest: str, tmp_path: Path, kind: Any, splits: list[str]
) -> None:
    there = checkpoint(tmp_path / "there", training(FinetuneConfig(), manifest), kind)
    found = list(costs_of(EvaluateConfig(manifest=manifest, checkpoint=there), NODES["cpu-2"]))
    assert [each.stage for each in found] == [f"evaluate {split}" for split in splits]
    # Ten clips of each video by the checkpoint's protocol; of an encoder one, and one of what it is compared with.
    assert [each.clips for each in found] == ([20] if kind == "class" else [2, 12])


@pytest.mark.parametrize("name", ["mine", SEGMENTS])
def test_an_evaluation_counts_what_it_reads_of_features(manifest: str, tmp_path: Path, name: str) -> None:
    config = training(FinetuneConfig(), manifest)
    there = checkpoint(tmp_path / "there", config, "class", name=name, tokens=4, width=16, frozen=True)
    evaluation = EvaluateConfig(manifest=manifest, checkpoint=there)
    with pytest.raises(UserError, match=f"it reads imported features of '{name}'; give --features"):
        plan_of("evaluate", evaluation)
    found = cost(dataclasses.replace(evaluation, features=features_of(tmp_path / "features", manifest, name)))
    assert (found.clips, found.tokens) == (20, 20 * config.clips.frames * 4)


def test_an_evaluation_counts_no_more_than_is_probed(manifest: str, tmp_path: Path) -> None:
    there = checkpoint(tmp_path / "there", training(FinetuneConfig(), manifest), "lsmcl")
    config = EvaluateConfig(manifest=manifest, checkpoint=there)
    few = costs_of(dataclasses.replace(config, train_videos=6), NODES["cpu-2"])
    assert [(each.stage, each.clips) for each in few] == [("evaluate test", 2), ("evaluate train", 6)]
    rows = read_manifest(manifest)
    unlabelled = rows.set_column(rows.schema.get_field_index("label"), "label", pa.nulls(len(rows), pa.int64()))
    storage.write_table(str(tmp_path / "manifest.parquet"), unlabelled.cast(rows.schema))
    assert cost(dataclasses.replace(config, manifest=str(tmp_path / "manifest.parquet"))).stage == "evaluate test"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("class", {"split": "tset"}, "unknown split 'tset': did you mean test"),
        ("class", {"probe": "linear"}, "probe is 'linear': the checkpoint is of a fine-tuned model"),
        ("class", {"register": "x", "tracking.uri": "off"}, "register is 'x': tracking.uri is 'off'"),
        ("class", {"labels": "x"}, "labels is 'x': a checkpoint of task class predicts no steps"),
        ("class", {"features": "x"}, "features is 'x': there is no features.json"),
        ("regression", {}, "split is 'test': 2 of its videos have no target"),
        ("lsmcl", {"protocol": "windows"}, "protocol is 'windows': a pretrained encoder's clips"),
        ("lsmcl", {"register": "x"}, "register is 'x': a pretrained encoder predicts nothing"),
    ],
)
def test_what_an_evaluation_would_refuse_is_refused(
    manifest: str, tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    there = checkpoint(tmp_path / "there", training(FinetuneConfig(), manifest), kind)
    config = EvaluateConfig(manifest=manifest, checkpoint=there)
    with pytest.raises(UserError, match=message):
        plan_of("evaluate", override(config, changes))


def test_an_evaluation_on_other_classes_is_refused(manifest: str, tmp_path: Path) -> None:
    there = checkpoint(tmp_path / "there", training(FinetuneConfig(), manifest), "class")
    rows = read_manifest(manifest)
    names = pa.array(["dog" if label else "cat" for label in rows["label"].to_pylist()])
    named = rows.set_column(rows.schema.get_field_index("class_name"), "class_name", names)
    storage.write_table(str(tmp_path / "manifest.parquet"), named)
    with pytest.raises(UserError, match="has the classes cat, dog, the checkpoint class0, class1"):
        plan_of("evaluate", EvaluateConfig(manifest=str(tmp_path / "manifest.parquet"), checkpoint=there))


def test_the_text_is_settings_and_a_plan(manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = training(FinetuneConfig(), manifest, out=str(tmp_path / "out"))
    options = ["--manifest", manifest, "--out", str(tmp_path / "out")]
    options += [f"--{key}={value}" for key, value in (TINY | {"loop.batch_size": 5, "loop.epochs": 4}).items()]
    assert command_line.main(["finetune", *options, "--dry-run", "--node", "h200"]) == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "# dry run of finetune on node h200: one NVIDIA H200" in text
    assert "17 videos (train 12, val 3, test 2), 0.1 hours" in text
    (tmp_path / "run.yaml").write_text(text)
    assert parse(["finetune", "--config", str(tmp_path / "run.yaml")]) == ("finetune", config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop.batch_size": 13}, "loop.batch_size is 13: split train has 12 videos; give at most 12"),
        ({"clips.long_stride": 50.0}, "clips.long_stride is 50 seconds: 15 of|clips.long_stride is 50 seconds: 12 of"),
        ({"checkpoint": "nowhere"}, "checkpoint is .*nowhere': there is no such folder"),
    ],
)
def test_what_the_stage_would_refuse_is_refused(manifest: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of("finetune", override(training(FinetuneConfig(), manifest), changes))


def test_the_node_belongs_to_a_dry_run() -> None:
    assert take_dry_run(["pretrain", "--out", "x"]) == (None, ["pretrain", "--out", "x"])
    assert take_dry_run(["pretrain", "--dry-run", "--out", "x"]) == ("cpu-2", ["pretrain", "--out", "x"])
    assert take_dry_run(["recipe", "a", "--dry-run"]) == (None, ["recipe", "a", "--dry-run"])
    with pytest.raises(UserError, match="--node is 'h200': it is of --dry-run; give both or neither"):
        take_dry_run(["pretrain", "--node", "h200"])
    with pytest.raises(UserError, match="--node is 'h201': rates were measured on cpu-2 and h200"):
        take_dry_run(["pretrain", "--node", "h201", "--dry-run"])


@pytest.mark.parametrize("words", [["--dry-run"], ["--node", "h200", "--dry-run"], ["--dry-run", "--node=h200"]])
def test_a_dry_run_of_nothing_prints_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(words) == 2
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("option", ["--dry-run=true", "--dry-run=", "--dry_run", "--no-dry-run"])
def test_a_dry_run_takes_no_value(option: str) -> None:
    with pytest.raises(UserError, match=f"^{option} is no option: write --dry-run, which takes no value"):
        take_dry_run(["pretrain", option])


def test_a_recipe_stands_before_its_dry_run() -> None:
    with pytest.raises(UserError, match="--dry-run stands before recipe: write the stage first"):
        take_dry_run(["--dry-run", "recipe", "paper-coin"])


def planned(config: PretrainConfig, node: str = "h200", **figures: Any) -> list[str]:
    return list(roles(config, Cost(stage="pretrain", input="", **figures), NODES[node]))


def test_roles_say_what_limits_a_run() -> None:
    # A worker takes 10 clips/s, and a core reads 1: 10 tasks for each, of which the 16 cores hold 15 beside the worker.
    config = override(PretrainConfig(), {"scale.num_workers": 4, "scale.gpus_per_worker": 1})
    figures = {"clips": 1000, "device_s": 100.0, "decode_s": 1000.0}
    first, second = planned(config, **figures)
    assert first.startswith("4 workers, each on a node of its own with one NVIDIA H200")
    assert first.endswith(": ~40.0 clips/s, limited by the model")
    assert "needs ~40 tasks, 10.0 for each worker; the CPUs that workers leave hold 60" in second
    fewer = override(config, {"data.decode_tasks": 20})
    first, second, third = planned(fewer, **figures)
    assert first.endswith(": ~20.0 clips/s, limited by decoding")
    assert second.endswith("--data.decode-tasks allows 20")
    assert third.startswith("it takes ~20 CPUs more")
    # Where the model runs on the cores that decode, one waits for the other.
    (line,) = planned(config, "cpu-2", clips=1000, device_s=100.0, decode_s=200.0)
    assert line.endswith(": ~20.0 clips/s, 50% of the time for the model and the rest for decoding")
    assert planned(config, clips=1000, device_s=100.0)[0].endswith("~40.0 clips/s by the model, from cached features")
    assert planned(config, clips=1000, device_s=None, decode_s=1.0) == []


def test_a_plan_names_roles(manifest: str) -> None:
    config = training(PretrainConfig(), manifest, scale__num_workers=2)
    assert "\n# 2 workers, each on a node of its own with one NVIDIA H200" in plan_of("pretrain", config, "h200")
