"""Tables of runs: means over seeds, gains of masking, costs, settings that differ, published results."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from statistics import fmean, stdev

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from pipelines.plots.sweeps import tradeoff
from pipelines.recipes.published import published
from pipelines.reporting.beside import published_tables
from pipelines.reporting.by_stage import stage_tables
from pipelines.reporting.by_sweep import masked_share, sweep_tables
from pipelines.reporting.seeds import groups, mean_of
from pipelines.reporting.table import Table, labels, markdown
from pipelines.reporting.tradeoffs import cost_tables
from pipelines.tracking.history import Run
from tests.pipelines.reporting.study import BAD, FRAMES, RATIOS, SEEDS, a_run, gain_of, masking_sweep, recipe_runs


def titled(tables: list[Table]) -> dict[str, Table]:
    return {table.title: table for table in tables}


def test_the_interval_is_students() -> None:
    values = [0.5, 0.7, 0.9, 0.6]
    mean = mean_of(values)
    assert mean.bounds is not None
    assert mean.half is not None
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean.bounds == pytest.approx((expected.low, expected.high))
    assert mean.half == pytest.approx(stats.t.ppf(0.975, 3) * stdev(values) / 2)
    assert mean_of([0.5]).bounds is mean_of([0.5]).half is None


def tuned(out: str, checkpoint: str = "", **params: str) -> Run:
    return a_run("finetune", out, params={"checkpoint": checkpoint, "out": out, "tracking.uri": out, **params})


def test_runs_that_differ_in_their_seed_alone_are_together() -> None:
    first, second = tuned("a", **{"loop.seed": "0"}), tuned("b", **{"loop.seed": "1"})
    repeated, other = tuned("c", **{"loop.seed": "1"}), tuned("d", **{"loop.seed": "2", "optim.lr": "1"})
    runs = [first, second, repeated, other]
    # Of a seed that was run twice, the later run counts.
    assert groups(runs, runs) == [[first, repeated], [other]]


def test_checkpoints_that_differ_in_their_seed_alone_are_the_same_start() -> None:
    pretrained = [a_run("pretrain", f"p{seed}", params={"loop.seed": str(seed)}) for seed in SEEDS]
    longer = a_run("pretrain", "long", params={"loop.seed": "0", "loop.epochs": "9"})
    by_path = [tuned(f"f{seed}", f"/study/p{seed}", **{"loop.seed": "0"}) for seed in SEEDS]
    by_link = a_run(
        "finetune", "link", params={"checkpoint": "elsewhere", "loop.seed": "1"}, links={"checkpoint": "p0"}
    )
    odd = tuned("odd", "/study/long", **{"loop.seed": "0"})
    runs = [*pretrained, longer, *by_path, by_link, odd]
    assert groups([*by_path, by_link, odd], runs) == [[*by_path, by_link], [odd]]


def test_a_checkpoint_that_leads_back_to_its_own_run_ends() -> None:
    loop = [tuned("a", "/study/b"), tuned("b", "/study/a")]
    assert sorted(map(len, groups(loop, loop))) in ([1, 1], [2])


def test_stage_tables_have_seeds_and_what_differs() -> None:
    tables = titled(stage_tables("sqlite:///unread.db", recipe_runs()[:6]))
    assert list(tables) == [
        *("finetune", "finetune: over seeds", "finetune: settings that differ"),
        *("evaluate", "evaluate: over seeds", "evaluate: settings that differ"),
    ]
    seeds = tables["evaluate: over seeds"]
    accuracy = next(row for row in seeds.rows if row[1] == "test/accuracy")
    low, high = mean_of([0.64, 0.66, 0.68]).bounds or (0, 0)
    assert accuracy[2:] == ("0.660", f"{low:.3f} to {high:.3f}", "3")
    differing = tables["finetune: settings that differ"]
    assert differing.header == ("run", "loop.seed")
    assert [row[1] for row in differing.rows] == ["0", "1", "2"]
    assert not differing.on_terminal


@pytest.mark.parametrize(("metric", "mode"), [("val/accuracy", "max"), ("val/mse", "min")])
def test_gains_are_paired_with_the_trial_that_masks_nothing(metric: str, mode: str) -> None:
    tables = titled(sweep_tables(masking_sweep(metric, mode)))
    gains = tables["sweep: gain or loss of masking"]
    assert gains.header[:3] == ("lsmcl.mask_ratio", "clips.frames", f"gain in {metric}")
    expected = {
        (ratio, frames): [gain_of(ratio, frames) + 0.002 * (seed - 1) * float(ratio) for seed in SEEDS]
        for ratio, frames in itertools.product(RATIOS[1:], FRAMES)
    }
    assert {row[:2] for row in gains.rows} == set(expected)
    for ratio, frames, gain, interval, pairs in gains.rows:
        found = expected[ratio, frames]
        assert float(gain) == pytest.approx(fmean(found), abs=6e-4)
        half = stats.t.ppf(0.975, 2) * stdev(found) / math.sqrt(3)
        assert [float(bound) for bound in interval.split(" to ")] == pytest.approx(
            [fmean(found) - half, fmean(found) + half], abs=6e-4
        )
        assert pairs == "3"
    assert [figure.name for figure in gains.figures] == ["sweep_gain_or_loss_of_masking"]
    # Seeds differ by more than masking gains: without pairs, nothing could be told.
    means = tables["sweep: over seeds"]
    best = next(row for row in means.rows if row[:2] == ("0.75", "120"))
    low, high = map(float, best[3].split(" to "))
    assert (high - low) / 2 > 0.04


def test_seeds_may_stand_beside_the_values_of_trials() -> None:
    named = masking_sweep()
    beside = [
        dataclasses.replace(run, params={key.replace("trial.loop.seed", "seed"): v for key, v in run.params.items()})
        for run in named
    ]
    rows = {title: table.rows for title, table in titled(sweep_tables(named)).items()}
    assert {title: table.rows for title, table in titled(sweep_tables(beside)).items()} == rows


def test_without_a_trial_that_masks_nothing_there_is_no_gain() -> None:
    runs = [run for run in masking_sweep() if run.params.get("trial.lsmcl.mask_ratio") != "0"]
    assert list(titled(sweep_tables(runs))) == ["sweep", "sweep: over seeds"]


def test_failed_trials_and_missing_pairs_are_left_out() -> None:
    runs = masking_sweep()
    for run in runs:
        if run.params.get("trial.clips.frames") == "60" and run.params["trial.loop.seed"] != "0":
            run.metrics["val/accuracy"] = math.nan
    gains = titled(sweep_tables(runs))["sweep: gain or loss of masking"]
    assert {row[-2:] for row in gains.rows if row[1] == "60"} == {("–", "1")}


def test_trials_from_before_more_epochs_are_not_mixed_with_later_ones() -> None:
    def of_length(epochs: int) -> list[Run]:
        runs = masking_sweep()
        return [
            dataclasses.replace(run, out=f"{run.out},{epochs}", params=run.params | {"length": f"{epochs}epochs"})
            for run in runs[1:]
        ]

    later = [masking_sweep()[0], *of_length(40)]
    earlier = [dataclasses.replace(run, metrics={"val/accuracy": 0.99}) for run in of_length(10)]
    both = [later[0], *earlier, *later[1:]]
    assert [table.rows for table in sweep_tables(both)] == [table.rows for table in sweep_tables(later)]


def test_means_are_of_finished_runs() -> None:
    runs = recipe_runs()
    unfinished = [
        dataclasses.replace(
            run,
            run_id=f"{run.run_id}-{status}",
            out=f"{run.out}-{status}",
            status=status,
            params=run.params | {"loop.seed": f"9{number}"},
            metrics={name: 0.01 for name in run.metrics},
        )
        for run in runs
        for number, status in enumerate(("RUNNING", "FAILED", "KILLED"))
    ]
    for tables in (published_tables, cost_tables):
        assert [table.rows for table in tables([*runs, *unfinished])] == [table.rows for table in tables(runs)]
    seeds = "finetune: over seeds"
    found = [titled(stage_tables("sqlite:///unread.db", each))[seeds] for each in (runs, [*runs, *unfinished])]
    assert [row[2:] for row in found[0].rows] == [row[2:] for row in found[1].rows]


@pytest.mark.parametrize(
    ("key", "text", "share"),
    [
        ("lsmcl.mask_ratio", "0.25", 0.25),
        ("pretrain.lsmcl.mask_ratio", "0", 0.0),
        ("model.decoder.selection.keep_ratio", "[0.75]", 0.25),
        ("model.decoder.selection.keep_ratio", "1", 0.0),
        ("model.decoder.selection.keep_ratio", "[0.5,0.5]", None),
        ("lsmcl.mask_on", "tokens", None),
        ("lsmcl.mask_ratio", "true", None),
    ],
)
def test_share_that_a_value_masks(key: str, text: str, share: float | None) -> None:
    assert masked_share(key, text) == share


def test_published_rows_stand_beside_ours_where_the_task_is_the_same() -> None:
    (table,) = published_tables(recipe_runs())
    assert table.title == "LVU director beside the published results"
    theirs = published("lvu", "director")
    assert [row[0] for row in table.rows] == [*theirs, "S5 + LSMCL, here", "ViS4mer + LSMCL, here"]
    low, high = mean_of([64.0, 66.0, 68.0]).bounds or (0, 0)
    ours = table.rows[len(theirs)]
    assert ours[1:4] == ("66.00", f"{low:.2f} to {high:.2f}", "3")
    assert "105 of 107 listed videos, so not comparable" in ours[4]
    own = [a_run("evaluate", "own", metrics={"test/accuracy": 0.9}, benchmark=("", ""))]
    unpublished = [a_run("evaluate", "k", metrics={"test/accuracy": 0.9}, benchmark=("kinetics", ""))]
    assert published_tables(own) == published_tables(unpublished) == []


def test_costs_are_of_all_training_runs_those_of_trials_too() -> None:
    runs = recipe_runs()
    runs += [
        a_run("finetune", "trial", parent_run="t", params={"model.decoder.name": "s5"}, metrics={"val/accuracy": 0.9})
    ]
    (table,) = cost_tables(runs)
    assert table.rows[0] == ("trial", "s5", "–", "–", "–", "0.900")
    assert table.rows[1][1:] == ("s5", "0.500", "25.000", "4.150", "0.660")
    assert len(table.figures) == 3
    assert cost_tables(runs[:1]) == []
    same = [run for run in recipe_runs() if run.params.get("model.decoder.name") == "s5"]
    assert cost_tables(same)[0].figures == ()


def test_names_come_once_and_are_harmless_in_markdown() -> None:
    runs = [a_run("pretrain", "x/a", name=BAD), a_run("pretrain", "x/b", name=BAD)]
    assert labels(runs) == [f"{BAD} (a)", f"{BAD} (b)"]
    text = markdown(BAD, BAD, [Table(f"{BAD}\n# other", ("a", "b"), (("x|y", "<b>\n|"),))])
    assert "<script" not in text
    assert "x\\|y | &lt;b>" in text
    assert "\n# other" not in text


@pytest.mark.parametrize("characters", [3, 10, 12, 16, 27, 30, 44, 80])
def test_a_legend_is_not_cut_off(characters: int) -> None:
    names = [f"{letter}{'x' * (characters - 1)}" for letter in "abcde"]
    drawing = tradeoff({name: [(0.1, 0.2)] for name in names}, "across", "upwards")
    picture = np.asarray(Image.open(io.BytesIO(drawing.png)).convert("L"))
    assert (picture[:, [0, -1]] == 255).all()
    assert (picture[-1] == 255).all()
