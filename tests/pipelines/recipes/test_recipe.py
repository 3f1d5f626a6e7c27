"""A whole recipe on a real Ray cluster: stopped at each arrow and started again, it goes on where it stood."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipelines.config import RecipeConfig, SampleConfig, TrackingConfig, override
from pipelines.config.dotted import hints
from pipelines.config.presets import preset
from pipelines.config.recipes import GROUPS
from pipelines.errors import StageError, UserError
from pipelines.stages import recipe, sample
from s5.models.backbone import Backbone
from tests.tiny import HEADS, TINY

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]

STEPS = ["index", "features", "pretrain", "finetune/seed_0", "evaluate/seed_0", "report"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RecipeConfig:
    """Render videos, list them as Breakfast lists its own, and return a recipe that takes seconds a stage."""
    folder = tmp_path_factory.mktemp("breakfast")
    rendered = folder / "rendered"
    off = TrackingConfig(uri="off")
    sample.run(SampleConfig(out=str(rendered), tracking=off, videos=14, seconds=12, fps=4, size=32))
    lists = {"train": "", "test": ""}
    for number, file in enumerate(sorted(rendered.rglob("*.mp4"))):
        split, label = "test" if number % 4 == 3 else "train", number % 2
        lists[split] += f"P{number:02}-cam01-P{number:02}_dish,12,dish {label},{label}\n"
        target = folder / f"videos/P{number:02}/cam01/P{number:02}_dish.mp4"
        target.parent.mkdir(parents=True)
        file.rename(target)
    for split, lines in lists.items():
        (folder / f"{split}.csv").write_text(f"file_name,duration,action,class_id\n{lines}")
    changes = _everywhere(preset("paper-breakfast").recipe, TINY | {"loop.batch_size": 4, "loop.epochs": 1})
    changes["encode.scale.num_workers"] = 1
    small = override(
        preset("paper-breakfast").recipe, changes | {f"pretrain.{key}": value for key, value in HEADS.items()}
    )
    weights = folder / "vit.safetensors"
    torch.manual_seed(0)
    save_file(Backbone(replace(small.encode.model.backbone, weights="")).vit.state_dict(), weights)
    paths = {"videos": str(folder / "videos"), "annotations": str(folder), "out": str(folder / "out")}
    more = _everywhere(small, {"model.backbone.weights": str(weights)}) | {"seeds": 1}
    return override(small, paths | more | {"index.val_share": 0.2})


def _everywhere(config: RecipeConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the changes for all stages that have the settings."""
    known = hints(config)
    return {
        f"{group}.{key}": value
        for key, value in changes.items()
        for group in GROUPS.values()
        if f"{group}.{key}" in known
    }


def test_stopped_at_each_arrow_it_goes_on_and_ends_in_a_row(
    config: RecipeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(config.out)
    made: list[str] = []

    def stopping(runner: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """Run a stage, and fail after each one that had not been run before."""

        def run(settings: Any) -> dict[str, Any]:
            finished = (Path(settings.out) / "result.json").exists()
            result = runner(settings)
            if not finished:
                made.append(Path(settings.out).relative_to(out).as_posix())
                raise StageError("stopped at the arrow")
            return result

        return run

    monkeypatch.setattr(recipe, "RUNNERS", {name: stopping(runner) for name, runner in recipe.RUNNERS.items()})
    for count in range(1, len(STEPS) + 1):
        with pytest.raises(StageError, match="stopped at the arrow"):
            recipe.run(config)
        assert made == STEPS[:count]
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("**/result.json")}
    result = recipe.run(config)
    assert made == STEPS
    assert stamps.items() <= {path: path.stat().st_mtime_ns for path in out.glob("**/result.json")}.items()
    row = json.loads((out / "row.json").read_text())
    assert row == result["row"]
    evaluated = json.loads((out / "evaluate/seed_0/metrics.json").read_text())
    assert row["mean"] == 100 * evaluated["test/accuracy"]
    assert (row["listed"], row["videos"], row["rejects"], row["interval"]) == (3, 3, 0, None)
    said = capsys.readouterr().out
    assert "S5 + LSMCL, here" in said
    assert "peak learning rate 1.5625e-05: optim.lr 0.001 x 4/256" in said
    assert recipe.run(config) == result
    assert "is finished already; give another --out to run the recipe again" in capsys.readouterr().out


def test_changed_settings_are_refused_as_each_stage_refuses_them(config: RecipeConfig) -> None:
    (Path(config.out) / "result.json").unlink(missing_ok=True)
    for changes, message in (
        ({"index.val_share": 0.3}, r"out/index' holds a run with val_share 0.2, not 0.3"),
        ({"encode.frames_per_second": 4.0}, r"out/features' holds a run with frames_per_second 2.0, not 4.0"),
        ({"finetune.optim.lr": 0.5}, r"out/finetune/seed_0' holds a run with optim.lr 0.001, not 0.5"),
        ({"evaluate.neighbours": 3}, r"out/evaluate/seed_0' holds a run with neighbours 5, not 3"),
    ):
        with pytest.raises(UserError, match=message):
            recipe.run(override(config, changes))


def test_too_few_videos_are_said_before_features_are_made(config: RecipeConfig, tmp_path: Path) -> None:
    changes = {"out": str(tmp_path / "out"), "pretrain.loop.batch_size": 64, "tracking.uri": "off"}
    with pytest.raises(UserError, match=r"loop\.batch_size is 64: split train has \d+ videos"):
        recipe.run(override(config, changes))
    assert not (tmp_path / "out/features").exists()
