"""What the spaces of sweeps mean, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config import (
    FinetuneConfig,
    SweepConfig,
    flatten,
    override,
)
from pipelines.errors import UserError
from pipelines.tuning import search_space, trials
from tests.pipelines.tuning.planned import trials_of, values_of


def test_draws_follow_from_the_seed() -> None:
    entries = ("optim.lr=loguniform(1e-5,1e-2)", "clips.frames=4,8", "lsmcl.momentum=uniform(0.9,0.99)")
    drawn = values_of(*entries, samples=8)
    assert drawn == values_of(*entries, samples=8) != values_of(*entries, samples=8, seed=1)
    assert [*drawn[:3], *drawn[8:11]] == values_of(*entries, samples=3)
    assert len({search_space.name_of(values) for values in drawn}) == len(drawn) == 16
    assert all(list(values) == ["optim.lr", "clips.frames", "lsmcl.momentum"] for values in drawn)
    assert all(1e-5 <= values["optim.lr"] <= 1e-2 and 0.9 <= values["lsmcl.momentum"] <= 0.99 for values in drawn)
    assert 0.2 < sum(values["optim.lr"] < 10**-3.5 for values in drawn) / len(drawn) < 0.8


def test_a_grid_runs_each_trial_once() -> None:
    assert len(values_of("clips.frames=4,8,4", "lsmcl.mask_ratio=0.25,0.75", samples=3)) == 4


def test_other_values_have_other_names() -> None:
    values: list[Any] = [0.12341, 0.12342, 1e-5, "a/b", "a_b", "a b", "x" * 300, "x" * 299]
    names = {search_space.name_of({"optim.lr": value}) for value in values}
    assert len(names) == len(values)
    assert {"lr=0.12341", "lr=1e-05", "lr=a_b"} <= names
    assert all(len(name) < 60 and "/" not in name for name in names)


def test_lists_stand_in_brackets_and_a_single_value_is_a_list_of_one() -> None:
    entry = "model.decoder.selection.keep_ratio=[0.5, 0.7],0.4,[0.3],[0.5,0.5]"
    config = SweepConfig(space=(entry, "finetune.optim.betas=[0.9,0.95],[0.9,0.999]"), stages="finetune")
    found = trials_of(config)
    settings = [trial.stages["finetune"] for trial in found]
    ratios = [each.model.decoder.selection.keep_ratio for each in settings if isinstance(each, FinetuneConfig)]
    assert ratios == [pair for pair in [(0.5, 0.7), (0.4,), (0.3,), (0.5, 0.5)] for _ in range(2)]
    assert [each.optim.betas for each in settings[:2]] == [(0.9, 0.95), (0.9, 0.999)]
    assert found[0].name == "betas=0.9+0.95,keep_ratio=0.5+0.7"
    assert len({trial.name for trial in found}) == 8
    assert [search_space.text_of(value) for value in found[2].values.values()] == ["[0.4]", "[0.9,0.95]"]


def test_a_drawn_value_of_a_list_is_a_list_of_one() -> None:
    config = SweepConfig(space=("model.decoder.selection.keep_ratio=uniform(0.2,0.8)",), stages="finetune", samples=2)
    for trial in trials_of(config):
        settings = trial.stages["finetune"]
        assert isinstance(settings, FinetuneConfig)
        assert settings.model.decoder.selection.keep_ratio == next(iter(trial.values.values()))


@pytest.mark.parametrize("text", ["[0.5,0.7", "0.5],0.7", "[[0.5],0.7]", "[0.5]0.7", "[0.5]x[0.7]"])
def test_brackets_that_do_not_pair_are_named(text: str) -> None:
    with pytest.raises(UserError, match=r"space is .*: write a list as \[value,value\], and a comma between two lists"):
        values_of(f"model.decoder.selection.keep_ratio={text}", stages="finetune")


@pytest.mark.parametrize("length", [1, 40, 400])
def test_names_of_many_keys_fit_a_folder(length: int, tmp_path: Path) -> None:
    keys = list(flatten(FinetuneConfig()))[:30]
    values: list[dict[str, Any]] = [{key: f"{'x' * length}{last}" for key in keys} for last in "ab"]
    names = {search_space.name_of(each) for each in values}
    assert len(names) == 2
    for name in names:
        # As Tune does: with a trial's id in front.
        (tmp_path / f"abcde_00000_{name}").mkdir()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("clips.frames=,",), "write key=value,value"),
        (("clips.frames=4", "clips.frames=8"), "clips.frames is there already"),
    ],
)
def test_entries_without_or_with_two_values_are_named(entries: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        values_of(*entries)


# --- before any work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "val/acuracy"}, r"unknown metric 'val/acuracy': did you mean val/accuracy\?"),
        ({"metric": "val/mse"}, "unknown metric 'val/mse'"),
        ({"metric": "val/accuracy", "stages": "pretrain"}, "unknown metric 'val/accuracy'"),
        ({"metric": "knn/top1", "early_stopping": True}, "early_stopping compares evaluations of finetune; give val/"),
    ],
)
def test_a_metric_that_no_trial_has_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trials.objective_of(override(SweepConfig(), changes))


@pytest.mark.parametrize(
    ("metric", "task", "mode"),
    [
        ("val/mse", "regression", "min"),
        ("train/loss", "class", "min"),
        ("knn/top1", "class", "max"),
        ("val/accuracy", "class", "max"),
    ],
)
def test_errors_and_losses_are_minimised(metric: str, task: str, mode: str) -> None:
    config = override(SweepConfig(metric=metric), {"finetune.task": task})
    assert trials.objective_of(config).mode == mode


def test_paths_of_trials_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space_ = ("finetune.checkpoint=a,b", "model.backbone.weights=timm,w.pt,s3://b/w.pt")
    config = SweepConfig(out="out", space=space_, stages="finetune")
    found = trials_of(config)
    settings = [each.stages["finetune"] for each in found]
    assert {each.manifest for each in settings} == {f"{tmp_path}/out/index/manifest.parquet"}
    assert {each.checkpoint for each in settings if isinstance(each, FinetuneConfig)} == {
        f"{tmp_path}/a",
        f"{tmp_path}/b",
    }
    assert {each.model.backbone.weights for each in settings} == {"timm", f"{tmp_path}/w.pt", "s3://b/w.pt"}
    assert all(each.out.startswith(f"{tmp_path}/out/trials/checkpoint=") for each in settings)
    assert {each.tracking.uri for each in settings} == {f"sqlite:///{tmp_path}/mlflow.db"}
