"""The published tables, and the row beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config import override
from pipelines.config.paper import RECIPES
from pipelines.config.presets import preset
from pipelines.recipes.published import LVU, WHOLE, published
from pipelines.recipes.row import in_words, method_of, row_of
from pipelines.running.intervals import interval

DOCS = Path(__file__).parents[3] / "docs/recipes.md"


def result(**metrics: float) -> dict[str, Any]:
    return {"metrics": {f"test/{key}": value for key, value in metrics.items()}}


def test_published_results_are_in_the_columns_of_their_tasks() -> None:
    assert published("lvu", "scene")["S5 + LSMCL"] == 72.53
    assert published("lvu", "view_count") == {
        **{"LST": 3.83, "Performer": 3.93, "Orthoformer": 3.86, "ViS4mer": 3.63},
        **{"S5": 3.51, "S5 + LSMCL": 3.51, "Learnable VTM": 4.01},
    }
    assert published("coin", "")["TSN"] == 73.40
    assert published("kinetics", "") == {}


def test_the_tables_of_the_documentation_are_these() -> None:
    text = DOCS.read_text()
    for method, row in LVU.items():
        cells = " | ".join("" if value is None else f"{value:.2f}" for value in row).replace("|  |", "| |").strip()
        assert f"\n| {method} | {cells} |\n" in text
    for method, value in WHOLE["coin"].items():
        other = WHOLE["breakfast"].get(method)
        cells = " | ".join(filter(None, (method, other and f"{other:.2f}")))
        assert f"| {value:.2f} |" in next(line for line in text.splitlines() if line.startswith(f"| {cells} |"))


def test_the_interval_is_students() -> None:
    # t of 4 degrees of freedom at 0.975 is 2.776; the standard deviation of these is 1.581.
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3 - 2.776 * 1.5811 / 5**0.5, 3 + 1.9629), abs=1e-3)
    assert interval([1.0]) is None
    assert interval([2.0, 2.0]) == (2.0, 2.0)


def test_a_row_has_mean_interval_and_coverage() -> None:
    config = override(preset("paper-lvu-director").recipe, {"seeds": 2})
    row = row_of(config, [result(accuracy=0.5, videos=100, listed=107), result(accuracy=0.6, videos=99, listed=107)])
    assert (row["method"], row["metric"], row["mean"]) == ("S5 + LSMCL", "top-1 %", pytest.approx(55))
    assert row["seeds"] == {"0": 50.0, "1": 60.0}
    assert (row["videos"], row["listed"], row["rejects"]) == (99, 107, 8)
    said = in_words(row).splitlines()
    assert said[0] == "LVU director, test, top-1 %"
    assert len(said) == 2 + len(published("lvu", "director"))
    assert "S5 + LSMCL, here" in said[-1]
    assert "on 99 of 107 listed videos, so not comparable: 8 rejects" in said[-1]


def test_a_regression_is_an_error_and_one_seed_has_no_interval() -> None:
    config = override(preset("paper-lvu-view_count").recipe, {"seeds": 1})
    row = row_of(config, [result(mse=3.9, videos=126, listed=126)])
    assert (row["metric"], row["mean"], row["interval"], row["rejects"]) == ("mean squared error", 3.9, None, 0)
    assert "one seed; on all 126 listed videos" in in_words(row)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "paper-kinetics"])
def test_every_recipe_is_named_as_the_published_method(name: str) -> None:
    config = preset(name).recipe
    row = row_of(config, [result(**dict.fromkeys(("mse", "accuracy"), 0.5), videos=3, listed=3)])
    assert row["method"] in row["published"]
    alone = override(config, {"stages": ("index", "features", "finetune", "evaluate")})
    assert method_of(alone) == "S5"
    assert method_of(override(alone, {"finetune.checkpoint": "c", "finetune.model.decoder.name": "vis4mer"})) == (
        "ViS4mer + LSMCL"
    )
