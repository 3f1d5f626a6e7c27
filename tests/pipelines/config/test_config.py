"""The dotted key, presets, spaces, and what the command line says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import command_line
from pipelines.config import (
    STAGES,
    FeaturesConfig,
    FinetuneConfig,
    IndexConfig,
    NarrateConfig,
    PretrainConfig,
    SweepConfig,
    flatten,
    leaves_of,
    override,
    to_json,
)
from pipelines.config.presets import PRESETS, preset
from pipelines.errors import UserError
from pipelines.tuning import draws, search_space
from pipelines.tuning.plans import plan_of


def test_override_converts_and_checks() -> None:
    config = override(PretrainConfig(), {"optim.lr": "3e-4", "optim.betas": [0.9, 0.95], "model.backbone.depth": "2"})
    assert (config.optim.lr, config.optim.betas, config.model.backbone.depth) == (3e-4, (0.9, 0.95), 2)
    assert PretrainConfig().optim.lr != 3e-4


@pytest.mark.parametrize("config", [FeaturesConfig(), NarrateConfig()])
def test_stages_that_need_workers_say_so(config: FeaturesConfig | NarrateConfig) -> None:
    with pytest.raises(UserError, match=r"scale.num_workers is 0: give at least 1: this stage does not work in"):
        override(config, {"scale.num_workers": 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.lrr": 1}, "unknown setting 'optim.lrr': did you mean optim.lr"),
        ({"lr": 1}, "unknown setting 'lr': did you mean optim.lr"),
        ({"optim.lr": "fast"}, "optim.lr is 'fast': input should be a valid number"),
        ({"optim.lr": -1}, "optim.lr is -1.0: give a positive number"),
        ({"model.decoder.name": "s6"}, "model.decoder.name is 's6': input should be 's5', 'vis4mer', 'lst', "),
        ({"scale.num_workers": 33}, "loop.batch_size is 32: give at least scale.num_workers, 33, or 0"),
        ({"model.backbone.tubelet": 3}, "backbone.tubelet is 3: give a divisor of the 16 frames of a clip"),
        ({"lsmcl.jitter": 0.4}, "unknown setting 'lsmcl.jitter': did you mean views.jitter"),
        ({"views.crop_scale": (0.5,)}, r"views.crop_scale is \(0.5,\): give a smallest and a largest share"),
        ({"views.crop_scale": (0, 1)}, r"views.crop_scale is \(0.0, 1.0\): give .*, above 0 and up to 1, or nothing"),
        ({"views.crop_scale": ("nan", 1)}, r"views.crop_scale is \(nan, 1.0\): give a smallest"),
        ({"views.crop_scale": (0.9, 0.5)}, r"views.crop_scale is \(0.9, 0.5\): give a smallest"),
        ({"views.crop_ratio": (1, "inf")}, r"views.crop_ratio is \(1.0, inf\): give a smallest and a largest ratio"),
        ({"views.crop_ratio": ()}, r"views.crop_ratio is \(\): give a smallest and a largest ratio"),
        ({"views.flip": 1.1}, "views.flip is 1.1: give a value from 0 to 1"),
        ({"views.jitter_share": "nan"}, "views.jitter_share is nan: give a value from 0 to 1"),
        ({"views.blur": (1,)}, r"views.blur is \(1.0,\): give two shares from 0 to 1, of long and of short clips"),
        ({"views.solarise": (0, 2)}, r"views.solarise is \(0.0, 2.0\): give two shares from 0 to 1"),
    ],
)
def test_mistakes_name_the_setting_the_value_and_the_remedy(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(PretrainConfig(), changes)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("stage_name", STAGES)
def test_every_preset_survives_run_json(name: str, stage_name: str) -> None:
    config = getattr(preset(name), stage_name)
    values = json.loads(json.dumps(to_json(stage_name, config)))
    assert values.pop("stage") == stage_name
    assert override(type(config)(), leaves_of(values)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "lvu"}, "annotations is '': give those of source lvu"),
        ({"source": "csv"}, "annotations is '': give those of source csv"),
        ({"source": "folder", "annotations": "a.csv"}, "annotations is 'a.csv': source folder takes none"),
        ({"source": "coco"}, "source is 'coco': input should be 'auto', 'folder', 'csv', 'lvu'"),
        ({"val_share": "0.5", "test_share": 0.5}, "test_share is 0.5: leave room for training"),
        ({"val_share": 1}, "val_share is 1.0: give a value in"),
        ({"data.prefetch_batches": 1}, "unknown setting 'data.prefetch_batches'"),
    ],
)
def test_mistakes_in_what_is_indexed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(IndexConfig(), changes)


IMPORT = {"import_": "files", "backbone": "vit-l"}
SEGMENTED = {"checkpoint": "out/finetune", "segment_s": 9}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (IMPORT | {"precision": "bf16"}, "precision is 'bf16': nothing is encoded with --import; leave it out"),
        (IMPORT | {"shard_videos": 7}, "shard_videos is 7: nothing is encoded with --import; leave it out"),
        (IMPORT | {"model.backbone.weights": "timm"}, "model.backbone.weights is 'timm': nothing is encoded with"),
        (IMPORT | {"model.backbone.name": "swin"}, "model.backbone.name is 'swin': nothing is encoded with --import"),
        ({"shard_gigabytes": 2}, "shard_gigabytes is 2.0: it is of imported features; leave it out, or give --import"),
        (SEGMENTED | {"shard_gigabytes": 2}, "shard_gigabytes is 2.0: it is of imported features"),
        (
            SEGMENTED | {"frames_per_second": 2},
            "frames_per_second is 2.0: the checkpoint's video model embeds segments",
        ),
        (SEGMENTED | {"model.backbone.depth": 2}, "model.backbone.depth is 2: the checkpoint's video model embeds"),
    ],
)
def test_settings_of_features_without_effect_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(FeaturesConfig(), changes)


def test_a_recipe_may_import_what_its_encoder_made() -> None:
    name = PRESETS["paper-breakfast"]().recipe.encode.model.backbone.name
    changes = {"import_": "files", "backbone": name, "shard_gigabytes": 2}
    for config in (preset("paper-breakfast").features, preset("paper-breakfast").recipe.encode):
        assert override(config, changes).frames_per_second == 2


@pytest.mark.parametrize("name", ["blur", "solarise"])
def test_fine_tuning_has_no_short_clips_to_change(name: str) -> None:
    with pytest.raises(UserError, match=rf"views.{name} is \(0.5, 0.1\): fine-tuning has no short .*; give it 0.5 0$"):
        override(FinetuneConfig(), {f"views.{name}": (0.5, 0.1)})
    override(FinetuneConfig(), {f"views.{name}": (0.5, 0)})


def test_flatten_has_every_leaf_once() -> None:
    leaves = flatten(FinetuneConfig())
    assert leaves["model.decoder.ssm.state"] == 64
    assert "model.decoder" not in leaves


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretain"], "unknown stage 'pretain': did you mean pretrain?"),
        (["pretrain", "--preset", "quikstart"], "unknown preset 'quikstart': did you mean quickstart?"),
        (["pretrain", "--optim.lrr", "1"], "unknown setting 'optim.lrr': did you mean optim.lr?"),
        (["pretrain", "--config", "nowhere.json"], "--config is 'nowhere.json': there is no such file"),
        (["pretrain", "--manifest", "nowhere"], "manifest is 'nowhere': there is no such file"),
        (["finetune", "--preset"], "--preset is given without a value"),
        (["index", "--videos", "nowhere"], "videos is 'nowhere': there is no such folder"),
        (["pretrain", "--optim.lr", "-1"], "optim.lr is -1.0: give a positive number"),
        (["pretrain", "--optim.lr", "fast"], "optim.lr is 'fast': input should be a valid number"),
        (["pretrain", "--loop.precision", "fp8"], "loop.precision is 'fp8': input should be 'fp32', 'bf16' or 'fp16'"),
        (["pretrain", "--optim.fused", "--optim.lr"], "--optim.lr is given without a value"),
        (["pretrain", "--no-optim.lr"], "unknown setting 'no_optim.lr': did you mean optim.lr?"),
        (["pretrain", "out"], "'out' belongs to no option"),
        (["finetune", "--model.decoder.blocks", "3", "4"], "'4' belongs to no option"),
        (["finetune", "--optim.betas", "0.9"], "optim.betas is ('0.9',): "),
        (["sweep", "--pretrain.manifest", "nowhere"], "pretrain.manifest is 'nowhere': there is no such file"),
        (["index", "--videos", ".", "--annotations", "no.csv"], "annotations is 'no.csv': there is no such file"),
    ],
)
def test_mistakes_cost_one_sentence_and_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_cannot_be_written_to_fails_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command_line.main(["sample", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "it cannot be written to" in capsys.readouterr().err


def test_run_json_gives_the_same_settings(tmp_path: Path) -> None:
    _, config = command_line.parse(["pretrain", "--preset", "quickstart", "--optim.lr", "0.01"])
    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_json("pretrain", config)))
    assert command_line.parse(["pretrain", "--config", str(path)]) == ("pretrain", config)
    with pytest.raises(UserError, match="it is not of stage 'finetune'"):
        command_line.parse(["finetune", "--config", str(path)])


def parsed(*arguments: str) -> FinetuneConfig:
    _, config = command_line.parse(["finetune", *arguments])
    assert isinstance(config, FinetuneConfig)
    return config


def test_dashes_and_several_values_are_understood() -> None:
    config = parsed("--loop.batch-size=8", "--optim.betas", "0.5", "0.9", "--model.backbone.depth", "None")
    assert config.loop.batch_size == 8
    assert config.optim.betas == (0.5, 0.9)
    assert config.model.backbone.depth is None
    assert parsed("--model.backbone.depth", "3").model.backbone.depth == 3
    assert parsed("--model.decoder.selection.keep-ratio", "0.5").model.decoder.selection.keep_ratio == (0.5,)


@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        (["--optim.fused"], True),
        (["--optim.no-fused"], False),
        (["--optim.fused", "True"], True),
        (["--optim.fused", "False"], False),
        (["--optim.fused=false"], False),
        (["--optim.fused", "--loop.epochs", "2"], True),
    ],
)
def test_every_form_of_a_flag(arguments: list[str], fused: bool) -> None:
    assert parsed(*arguments).optim.fused is fused


# --- spaces of sweeps -----------------------------------------------------------------------------------------------


def test_a_key_without_a_stage_is_set_in_all_of_them() -> None:
    config = SweepConfig(space=("clips.frames=4,8", "pretrain.optim.lr=loguniform(1e-4,1e-2)", "lsmcl.mask_ratio=0.5"))
    dimensions = search_space.parse(config)
    assert dimensions["clips.frames"] == search_space.Choice((4, 8))
    assert dimensions["pretrain.optim.lr"] == search_space.Range(1e-4, 1e-2, True)
    values = {"clips.frames": 4, "pretrain.optim.lr": 1e-3, "lsmcl.mask_ratio": 0.5}
    assert search_space.configured(config, "pretrain", values) == {
        "clips.frames": 4,
        "lsmcl.mask_ratio": 0.5,
        "optim.lr": 1e-3,
    }
    assert search_space.configured(config, "finetune", values) == {"clips.frames": 4}
    assert len(draws.settings_of(config, dimensions)) == 2
    assert search_space.name_of(values) == "frames=4,mask_ratio=0.5,lr=0.001"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("lsmcl.mask_ration=0.5", "unknown setting 'lsmcl.mask_ration': did you mean lsmcl.mask_ratio"),
        ("lsmcl.mask_ratio", "write key=value,value"),
        ("optim.lr=uniform(1,0)", "give low < high"),
        ("optim.lr=loguniform(0,1)", "both above 0"),
    ],
)
def test_spaces_that_make_no_sense_are_named(entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        search_space.parse(SweepConfig(space=(entry,)))


def test_every_combination_is_checked_beforehand() -> None:
    config = SweepConfig(space=("lsmcl.mask_ratio=0.5,1.5",))
    with pytest.raises(UserError, match=r"lsmcl.mask_ratio is 1.5: give a value in"):
        plan_of(config, lambda *stage: {})
