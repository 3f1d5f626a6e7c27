"""The command that a stage names at its end goes on from what it wrote."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from pipelines import command_line, storage
from pipelines.closing import closing, following
from pipelines.command_line import parse
from pipelines.config import (
    EvaluateConfig,
    FeaturesConfig,
    FinetuneConfig,
    NarrateConfig,
    PretrainConfig,
    StageConfig,
    TrackingConfig,
    override,
)
from tests.tiny import HEADS, TINY

LABELLED = {"metrics": {"knn/top1": 0.5}}


def said(config: StageConfig, result: dict[str, Any], folder: Path) -> tuple[str, list[str]]:
    """Return the line on what there is, and the words of the command that comes next."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "result.json").touch()
    (folder / ".part").touch()
    files, command = closing(config, result)
    return files, shlex.split(command.removeprefix("next: python -m pipelines "))


def test_what_there_is_and_what_comes_next_are_named(tmp_path: Path) -> None:
    out = tmp_path / "with space" / "pretrain"
    changes = {"out": f"{out}/", "manifest": "m", "features": "f", "tracking.uri": "http://mlflow:5000"}
    changes |= {"lsmcl.mask_on": "tokens", "views.jitter": 0.0, "loop.epochs": 99}
    model = {"model.backbone.frozen": True, "model.backbone.depth": 2, "model.decoder.selection.keep_ratio": (0.5, 1.0)}
    config = override(PretrainConfig(), changes | model)
    files, words = said(config, LABELLED, out)
    assert files == f"checkpoints/, result.json are in {out}/"
    _, tuning = parse(words)
    assert isinstance(tuning, FinetuneConfig)
    assert (tuning.checkpoint, tuning.out) == (f"{out}/", str(tmp_path / "with space" / "finetune"))
    assert (tuning.manifest, tuning.features, tuning.tracking) == ("m", "f", config.tracking)
    assert (tuning.model, tuning.clips) == (config.model, config.clips)
    assert tuning.loop == FinetuneConfig().loop


def test_the_next_run_is_its_own_and_on_the_same_hardware() -> None:
    changes = {"tracking.run_name": "first", "tracking.experiment": "e", "loop.batch_size": 64}
    hardware = {"scale.gpus_per_worker": 1.0, "scale.num_workers": 48, "loop.precision": "bf16"}
    config = override(PretrainConfig(), changes | hardware)
    _, tuning = following(config, LABELLED)
    assert "tracking.run_name" not in tuning
    assert (tuning["tracking.experiment"], tuning["loop.precision"]) == ("e", "bf16")
    assert tuning["scale.gpus_per_worker"] == 1
    # No more workers than a batch has videos.
    assert override(FinetuneConfig(), tuning).scale.num_workers == FinetuneConfig().loop.batch_size
    _, evaluation = following(config, {"metrics": {}})
    assert (evaluation["scale.num_workers"], evaluation["scale.gpus_per_worker"]) == (48, 1)


@pytest.mark.parametrize(
    ("out", "there", "expected"),
    [
        ("s3://bucket", [], "s3://bucket/finetune"),
        ("s3://bucket/", [], "s3://bucket/finetune"),
        ("s3://bucket/run", [], "s3://bucket/finetune"),
        ("file:///data", [], "file:///data/finetune"),
        ("/data", [], "/data/finetune"),
        ("/data/run", [], "/data/finetune"),
        ("run", [], "finetune"),
        ("runs/finetune", [], "runs/finetune-2"),
        ("runs/finetune/", [], "runs/finetune-2"),
        ("runs/b", ["runs/finetune", "runs/finetune-2"], "runs/finetune-3"),
        ("out/pretrain", ["out/finetune"], "out/finetune-2"),
    ],
)
def test_the_next_folder_is_near_and_holds_no_run(
    out: str, there: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "exists", {storage.absolute(name) for name in there}.__contains__)
    assert following(PretrainConfig(out=out), LABELLED)[1]["out"] == expected


@pytest.mark.parametrize(
    ("config", "result", "expected"),
    [
        (PretrainConfig(), {"metrics": {}}, "evaluate --checkpoint out/pretrain"),
        (FinetuneConfig(out="s3://b/runs/a"), {}, "evaluate --checkpoint s3://b/runs/a --out s3://b/runs/evaluate"),
        (NarrateConfig(out="n"), {}, "finetune --task distant --manifest n --labels n --out finetune"),
        (FeaturesConfig(), {}, "finetune --features out/features --model.backbone.frozen"),
        (EvaluateConfig(tracking=TrackingConfig(uri="off")), {}, ""),
    ],
)
def test_each_stage_leads_to_the_next(
    config: StageConfig, result: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "exists", lambda name: False)
    stage, changes = following(config, result)
    if not expected:
        assert (stage, changes) == ("", {})
        return
    assert parse(expected.split()) == (stage, override(parse([stage])[1], changes))


@pytest.mark.slow
@pytest.mark.cluster
def test_each_command_leads_from_videos_to_an_evaluation(
    ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    small = {"sample": {"videos": 30, "seconds": 12, "fps": 4, "size": 32, "val_share": 0.3, "test_share": 0.3}}
    small["pretrain"] = TINY | HEADS | {"loop.epochs": 1}
    # The rest of it, the model among them, comes with the command.
    small["finetune"] = {key: value for key, value in TINY.items() if not key.startswith(("model.", "clips."))}
    small["evaluate"] = {"scale.num_workers": 0}
    words, ran = ["sample", "--out", str(folder / "sample"), "--tracking.uri", "off"], []
    while words:
        options = [f"--{key}={value}" for key, value in small.get(words[0], {}).items()]
        assert command_line.main([*words, *options]) == 0
        ran.append(words[0])
        last = capsys.readouterr().out.splitlines()[-1]
        _, _, command = last.partition("next: python -m pipelines ")
        words = shlex.split(command)
    assert ran == ["sample", "index", "pretrain", "finetune", "evaluate"]
    assert last.startswith("[evaluate] ")
    assert "predictions.parquet, rejects.parquet, result.json, run.json" in last
    assert last.endswith(f" are in {folder}/evaluate")
