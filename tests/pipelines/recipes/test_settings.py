"""The recipes' settings, what they refuse, and how the command line changes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipelines import command_line
from pipelines.config import RecipeConfig, StageConfig, flatten, override, to_json
from pipelines.config.paper import CLASS_TASKS, RECIPES, REGRESSION_TASKS
from pipelines.config.presets import preset
from pipelines.data.annotations import lvu
from pipelines.errors import UserError
from pipelines.recipes import steps
from pipelines.stages import recipe as stage
from s5.checkpoints.checkpoint import MODEL, Meta, meta_bytes
from s5.config import ViewsConfig

LVU = [name for name in RECIPES if name.startswith("paper-lvu-")]
FOUND = {
    "relationship": {"train.csv": "class_id class_name youtube_id imdb_id\n0 friend a tt1\n"},
    "year": {"train.csv": "class_id class_name youtube_id imdb_id\n0 1930 a tt1\n"},
}
DISHES = {"train.csv": "file_name,duration,action,class_id\n", "test.csv": "file_name,duration,action,class_id\n"}
CLIPS = {"train.csv": "label,youtube_id,time_start,time_end,split\n"}
STEPS = {"database": {}}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write annotations of each benchmark, and a folder of videos."""
    for task, files in FOUND.items():
        _write(tmp_path / "lvu_1.0" / task, files)
    _write(tmp_path / "breakfast", DISHES)
    _write(tmp_path / "kinetics", CLIPS)
    _write(tmp_path / "coin", {"COIN.json": json.dumps(STEPS)})
    _write(tmp_path / "videos", {"a.mp4": ""})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def recipe(name: str) -> RecipeConfig:
    return preset(name).recipe


# --- the paper's numbers --------------------------------------------------------------------------------------------


def test_there_is_a_recipe_of_each_task() -> None:
    assert (*CLASS_TASKS, *REGRESSION_TASKS) == (*lvu.CLASSES, *lvu.COUNTS)
    assert [name.removeprefix("paper-lvu-") for name in LVU] == list(lvu.TASKS)
    assert [name for name in RECIPES if name not in LVU] == ["paper-breakfast", "paper-coin", "paper-kinetics"]


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_the_papers(name: str) -> None:
    config = recipe(name)
    assert (config.name, config.out) == (name, f"out/{name}")
    pretrain, finetune = config.pretrain, config.finetune
    # MoCo v3's where the paper is silent.
    assert (pretrain.optim.lr, pretrain.optim.lr_batch, pretrain.optim.weight_decay) == (1.5e-4, 256, 0.1)
    assert (pretrain.lsmcl.temperature, pretrain.lsmcl.momentum) == (0.2, 0.99)
    assert (pretrain.lsmcl.hidden, pretrain.lsmcl.dim) == (4096, 256)
    models = [pretrain.model] if name == "paper-kinetics" else [pretrain.model, finetune.model]
    for model in models:
        decoder, backbone = model.decoder, model.backbone
        assert (decoder.name, decoder.blocks, decoder.dropout, decoder.width) == ("s5", 3, 0.2, None)
        assert (decoder.ssm.kind, decoder.ssm.state, decoder.selection.keep_ratio) == ("s4", 64, (0.5,))
        selection = decoder.selection
        assert (selection.generator, selection.features, selection.noise) == ("linear", "s4", "training")
        assert selection.estimator == "shared"
        assert (backbone.frozen, backbone.weights, backbone.frame_size) == (True, "timm", 224)
        swin = name in ("paper-breakfast", "paper-coin")
        assert backbone.name == ("swin_base_patch4_window7_224" if swin else "vit_large_patch16_224.augreg_in21k")
        assert backbone.cls_token is not swin
    if name != "paper-kinetics":
        assert finetune.clips.frames == pretrain.clips.frames == (60 if name in LVU else 64)
        assert config.encode.model.backbone == pretrain.model.backbone == finetune.model.backbone
        assert finetune.model == pretrain.model
        assert (pretrain.lsmcl.mask_on, pretrain.views) == ("tokens", ViewsConfig())


@pytest.mark.parametrize("name", LVU)
def test_lvu_reads_windows_of_a_minute(name: str) -> None:
    config = recipe(name)
    assert config.encode.frames_per_second == config.finetune.clips.long_stride == 1
    assert config.finetune.task == ("regression" if config.task in lvu.COUNTS else "class")


@pytest.mark.parametrize("name", RECIPES)
def test_stages_alone_have_the_settings_of_the_recipe(name: str) -> None:
    whole = preset(name)
    assert (whole.features, whole.pretrain, whole.finetune) == (
        whole.recipe.encode,
        whole.recipe.pretrain,
        whole.recipe.finetune,
    )


# --- the command line -----------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> RecipeConfig:
    _, config = command_line.parse(["recipe", *arguments])
    assert isinstance(config, RecipeConfig)
    return config


def test_a_group_is_set_in_all_stages_and_a_stage_by_its_name() -> None:
    config = parsed("paper-lvu-year", "--loop.precision", "bf16", "--pretrain.loop.epochs", "3", "--optim.no-fused")
    assert (config.pretrain.loop.precision, config.finetune.loop.precision) == ("bf16", "bf16")
    assert (config.pretrain.loop.epochs, config.finetune.loop.epochs) == (
        3,
        recipe("paper-lvu-year").finetune.loop.epochs,
    )
    assert (config.pretrain.optim.fused, config.finetune.optim.fused) == (False, False)
    shared = parsed("paper-lvu-year", "--model.backbone.depth", "2", "--encode.model.backbone.depth", "3")
    depths = [stage.model.backbone.depth for stage in (shared.encode, shared.pretrain, shared.finetune)]
    assert depths == [3, 2, 2]
    assert parsed("paper-lvu-year", "--tracking.uri", "off").pretrain.tracking.uri == ""
    with pytest.raises(UserError, match=r"unknown setting 'loop\.epochs': did you mean"):
        command_line.parse(["sweep", "--loop.epochs", "3"])


def test_no_workers_for_all_leaves_features_its_worker() -> None:
    config = parsed("paper-lvu-year", "--encode.scale.num-workers", "3", "--scale.num-workers", "0")
    workers = [stage.scale.num_workers for stage in (config.encode, config.pretrain, config.finetune, config.evaluate)]
    assert workers == [3, 0, 0, 0]
    assert parsed("paper-lvu-year", "--scale.num-workers", "2").encode.scale.num_workers == 2
    with pytest.raises(UserError, match="does not work in its own process"):
        parsed("paper-lvu-year", "--encode.scale.num-workers", "0")


def test_run_json_names_the_recipe(tmp_path: Path) -> None:
    config = parsed("paper-coin", "--seeds", "2", "--pretrain.loop.epochs", "1")
    (tmp_path / "run.json").write_text(json.dumps(to_json("recipe", config)))
    assert parsed("--config", str(tmp_path / "run.json")) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paper-lvu-directer"], "unknown recipe 'paper-lvu-directer': did you mean paper-lvu-director?"),
        (["quickstart"], "unknown recipe 'quickstart'"),
        ([], "no recipe is named: give `recipe NAME` with one of paper-lvu-relationship, "),
        (["--preset", "quickstart"], "no recipe is named: give `recipe NAME`"),
        (["paper-coin"], "videos is '': recipe paper-coin needs --videos"),
        (["paper-coin", "--videos", "videos"], "annotations is '': recipe paper-coin needs --annotations"),
        (["paper-coin", "--videos", "vidoes"], "videos is 'vidoes': there is no such folder; did you mean videos?"),
        (
            ["paper-coin", "--videos", "videos", "--annotations", "no.json"],
            "annotations is 'no.json': there is no such",
        ),
        (
            ["paper-year", "--videos", "videos", "--annotations", "breakfast"],
            "unknown recipe 'paper-year': did you mean",
        ),
        (["paper-lvu-year", "--seeds", "0"], "seeds is 0: give at least 1"),
        (
            ["paper-lvu-year", "--pretrain.out", "x"],
            "pretrain.out is 'x': the recipe sets it for stage pretrain; leave",
        ),
        (
            ["paper-lvu-year", "--finetune.loop.seed", "1"],
            "finetune.loop.seed is 1: a recipe fine-tunes with each of its",
        ),
        (
            ["paper-lvu-year", "--finetune.checkpoint", "c"],
            "finetune.checkpoint is 'c': the recipe pretrains one of its",
        ),
        (["paper-lvu-year", "--stages", "pretrain", "index"], "stages is ('pretrain', 'index'): give some of index, "),
        (["paper-lvu-year", "--stages", "finetune"], "stages is ('finetune',): give finetune and evaluate together"),
        (["paper-lvu-year", "--stages", "pretrain"], "stages is ('pretrain',): without index, give the manifest"),
        (["paper-lvu-year", "--node", "h100"], "node is 'h100': input should be 'cpu-2' or 'h200'"),
    ],
)
def test_mistakes_cost_one_sentence_and_status_2(
    arguments: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(data.rglob("*"))
    assert command_line.main(["recipe", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert set(data.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("paper-lvu-year", "breakfast", "it holds annotations of Breakfast, not LVU's year; give the folder lvu_1.0"),
        ("paper-lvu-year", "lvu_1.0/relationship", "it holds annotations of LVU's relationship, not LVU's year"),
        ("paper-lvu-year", "coin", "it holds annotations of COIN, not LVU's year"),
        ("paper-lvu-scene", "lvu_1.0", "it holds LVU's annotations without task scene"),
        ("paper-breakfast", "kinetics", "it holds annotations of Kinetics, not Breakfast's; give the folder with"),
        ("paper-breakfast", "coin/COIN.json", "it holds annotations of COIN, not Breakfast's"),
        ("paper-coin", "lvu_1.0", "it holds annotations of LVU, not COIN's; give COIN.json"),
        ("paper-coin", "breakfast/train.csv", "it holds annotations of Breakfast, not COIN's"),
        ("paper-kinetics", "lvu_1.0/year", "it holds annotations of LVU, not Kinetics's"),
        ("paper-kinetics", "videos", "it holds no annotations that are known, not Kinetics's"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_annotations_of_another_benchmark(
    name: str, given: str, message: str, dry: tuple[str, ...], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["recipe", name, "--videos", "videos", "--annotations", given, *dry]
    assert command_line.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: annotations is '")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "--finetune.model.decoder.name lst",
            "finetune.model.decoder.name is 'lst': it starts from what is pretrained",
        ),
        ("--pretrain.model.decoder.blocks 2", "finetune.model.decoder.blocks is 3: it starts from what is pretrained"),
        ("--encode.model.backbone.name vit_base_patch16_224", "pretrain.model.backbone.name is 'vit_large"),
        ("--encode.model.backbone.weights vit.safetensors", "pretrain.model.backbone.weights is 'timm'"),
        ("--finetune.model.backbone.cls_token False", "finetune.model.backbone.cls_token is False"),
        ("--encode.frames-per-second 0.25", "encode.frames_per_second is 0.25, too few for stage pretrain"),
        ("--finetune.clips.long-stride 0.5 --finetune.clips.short-stride 0.5", "encode.frames_per_second is 1, too"),
        ("--pretrain.lsmcl.mask-on patches", "settings of stage pretrain (pretrain.KEY): lsmcl.mask_on is 'patches'"),
        ("--finetune.model.backbone.frozen False", "settings of stage finetune (finetune.KEY): model.backbone.frozen"),
        ("--evaluate.split tset", "unknown evaluate.split 'tset'"),
        ("--finetune.task distant --finetune.labels l", "finetune.task is 'distant'"),
        ("--model.backbone.name vit_huge", "backbone.name is 'vit_huge': timm has no such model"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_settings_that_cannot_work_together_are_refused_before_anything_starts(
    given: str, message: str, dry: tuple[str, ...], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "l").mkdir()
    (data / "vit.safetensors").write_bytes(b"")
    before = sorted(data.rglob("*"))
    arguments = ["recipe", "paper-lvu-year", "--videos", "videos", "--annotations", "lvu_1.0", *given.split(), *dry]
    assert command_line.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(data.rglob("*")) == before


def test_what_works_together_is_not_refused(data: Path) -> None:
    base = {"videos": "videos", "annotations": "lvu_1.0", "tracking.uri": "off"}
    steps.check(override(recipe("paper-lvu-year"), base))
    steps.check(override(recipe("paper-lvu-year"), base | {"finetune.model.decoder.name": "vis4mer"}))
    lst = {f"{stage}.model.decoder.name": "lst" for stage in ("pretrain", "finetune")}
    steps.check(override(recipe("paper-lvu-year"), base | lst))
    alone = {"stages": ("index", "features", "finetune", "evaluate"), "finetune.model.decoder.name": "lst"}
    steps.check(override(recipe("paper-lvu-year"), base | alone))
    # Whole videos have no stride, and those of frames need the rates of the videos.
    whole = base | {"annotations": "breakfast", "finetune.clips.short_stride": 0.1}
    whole |= {"finetune.clips.long_stride": 0.1}
    steps.check(override(recipe("paper-breakfast"), whole | {"pretrain.clips.unit": "frames"}))


def test_an_out_of_another_recipe(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(data / "out", {"run.json": json.dumps(to_json("recipe", recipe("paper-breakfast")))})
    given = ["--videos", "videos", "--annotations", "lvu_1.0", "--out", "out"]
    assert command_line.main(["recipe", "paper-lvu-year", *given]) == 2
    assert "--out 'out' holds a run of recipe 'paper-breakfast', not 'paper-lvu-year'" in capsys.readouterr().err


# --- steps ----------------------------------------------------------------------------------------------------------


def names_of(config: RecipeConfig) -> list[str]:
    return [step.name for step in steps.steps_of(config)]


def test_steps_follow_one_another_and_read_what_came_before(data: Path) -> None:
    changes = {"videos": "videos", "annotations": "lvu_1.0", "out": "out", "seeds": 2, "tracking.experiment": "e"}
    config = override(recipe("paper-lvu-year"), changes)
    found = {step.name: flatten(step.config) for step in steps.steps_of(config)}
    assert list(found) == [
        *("index", "features", "pretrain", "finetune/seed_0", "evaluate/seed_0", "finetune/seed_1", "evaluate/seed_1"),
        "report",
    ]
    out = data / "out"
    assert found["index"]["annotations"] == str(data / "lvu_1.0/year")
    assert {values["out"] for values in found.values()} == {str(out / name) for name in found}
    assert {values["tracking.experiment"] for values in found.values()} == {"e"}
    for name in ("features", "pretrain", "finetune/seed_0", "evaluate/seed_1"):
        assert found[name]["manifest"] == str(out / "index")
    for name in ("pretrain", "finetune/seed_0", "evaluate/seed_1"):
        assert found[name]["features"] == str(out / "features")
    assert found["finetune/seed_1"]["checkpoint"] == str(out / "pretrain")
    assert found["evaluate/seed_1"]["checkpoint"] == str(out / "finetune/seed_1")
    assert [found[f"finetune/seed_{seed}"]["loop.seed"] for seed in (0, 1)] == [0, 1]


def _finished(out: str, name: str, settings: StageConfig, **more: object) -> None:
    """Write what a finished stage leaves."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(to_json(name, settings) | more))
    (folder / "result.json").write_text(json.dumps({"checkpoint": f"{out}/c"}))


def _trained(config: RecipeConfig, weights: str) -> steps.Step:
    """Write a fine-tuned checkpoint, and return the step that evaluates it."""
    tuned, evaluated = steps.steps_of(config)[-2:]
    _finished(tuned.config.out, "finetune", tuned.config)
    meta = Meta(kind="class", step=1, model={}, files={MODEL: weights})
    (Path(tuned.config.out) / "c").mkdir(exist_ok=True)
    (Path(tuned.config.out) / "c/meta.json").write_bytes(meta_bytes(meta))
    return evaluated


def test_what_was_trained_again_is_evaluated_again(data: Path) -> None:
    changes = {"manifest": "m", "seeds": 1, "tracking.uri": "off", "out": "out", "stages": ("finetune", "evaluate")}
    config = override(recipe("paper-breakfast"), changes)
    step = _trained(config, "first")
    assert not stage.has_row(steps.steps_of(config))
    _finished(step.config.out, "evaluate", step.config, inputs={"checkpoint": "first"})
    assert stage.has_row(steps.steps_of(config))
    assert stage.earlier_result(step) is not None
    _finished(f"{step.config.out}/shards", "evaluate", step.config)
    assert stage.earlier_result(_trained(config, "second")) is None
    # Else the stage would refuse what is there.
    assert not (Path(step.config.out) / "result.json").exists()
    assert not (Path(step.config.out) / "shards").exists()
    # A run of an earlier version does not say what it evaluated.
    _finished(step.config.out, "evaluate", step.config)
    assert stage.earlier_result(step) is None
    shutil.rmtree(data / "out/finetune")
    assert not stage.has_row(steps.steps_of(config))


def test_what_is_ready_is_not_made(data: Path) -> None:
    config = override(recipe("paper-breakfast"), {"manifest": "m", "features": "f", "seeds": 1, "tracking.uri": "off"})
    assert names_of(config) == ["pretrain", "finetune/seed_0", "evaluate/seed_0"]
    alone = ("features", "finetune", "evaluate")
    assert names_of(override(config, {"features": "", "stages": alone})) == [
        "features",
        "finetune/seed_0",
        "evaluate/seed_0",
    ]
    started = override(config, {"stages": alone[1:], "finetune.checkpoint": "c"})
    assert flatten(steps.steps_of(started)[0].config)["checkpoint"] == "c"
    kinetics = override(recipe("paper-kinetics"), {"videos": "videos", "annotations": "kinetics"})
    assert names_of(kinetics) == ["index", "pretrain", "report"]
