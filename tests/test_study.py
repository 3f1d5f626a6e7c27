"""What the study counts and compares; the study itself takes an hour."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config import SampleConfig
from pipelines.data.rendering import step_pixels
from pipelines.stages.sample import draw_videos
from tests.bench.study import PRETRAININGS, Study, parts, with_labels
from tests.bench.study_results import KEPT, TELLS, drawings, settings, tables, telling

STUDY = Study(Path("out"), seeds=2, steps=1, data_seed=0, quick=True)


@pytest.mark.parametrize(("share", "each"), [(0.05, 1), (0.1, 2), (1.0, 20)])
def test_fewer_labels_of_every_class_and_all_that_is_held_out(share: float, each: int) -> None:
    split = ["train"] * 60 + ["val"] * 30
    table = pa.table({"split": split, "label": [i % 3 for i in range(90)]})
    kept = Counter((row["split"], row["label"]) for row in with_labels(table, share).to_pylist())
    assert kept == {("train", label): each for label in range(3)} | {("val", label): 10 for label in range(3)}


def test_telling_tokens_are_where_objects_of_steps_are() -> None:
    (plan,) = draw_videos(SampleConfig(videos=1, seconds=12, fps=4, size=32, empty_share=0.5))
    times_U = np.array([0.0, 3.0, 6.0])
    found_L = telling(plan, times_U, tokens=4)
    for frame, time_s in enumerate(times_U):
        picture = step_pixels(plan)[round(time_s * plan.fps)]
        for token in range(4):
            row, column = divmod(token, 2)
            part = picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert found_L[4 * frame + token] == (part.mean() >= TELLS)


def test_settings_are_means_over_seeds_with_intervals() -> None:
    rows = [
        {"setting": name, "seed": seed, "val/accuracy": accuracy, "train/seconds": 2.0 + seed}
        for name, found in {"a": (0.4, 0.6), "b": (0.8,)}.items()
        for seed, accuracy in reversed(list(enumerate(found)))
    ]
    found = settings(rows)
    assert found["a"]["values"] == [0.4, 0.6]
    assert (found["a"]["mean"], found["a"]["seconds"]) == (pytest.approx(0.5), 2.5)
    assert found["a"]["interval"] == pytest.approx((0.5 - 1.2706, 0.5 + 1.2706), abs=1e-3)
    assert found["b"]["interval"] is None


def test_a_quick_study_is_a_part_of_the_whole() -> None:
    whole = list(parts(Study(STUDY.out, 3, 1, 0, quick=False)))
    quick = list(parts(STUDY))
    assert quick == [name for name in whole if name in quick]
    assert len(quick) < len(whole)
    assert set(PRETRAININGS) == {"lsmcl", "no-masking", "same-stride"}


def test_tables_show_what_is_there() -> None:
    row = {"values": [0.5], "mean": 0.5, "interval": None, "seconds": 3.0}
    found = {
        "settings": {"selection": {"keep=0.5": row}},
        "kept": {"selection": {"keep=0.5": dict.fromkeys(KEPT, row) | {"features": "s4"}}},
        "probes": {},
        "dropped": {},
    }
    assert list(drawings(found)) == ["kept"]
    accuracies, tokens, *empty = tables(found)
    assert accuracies.rows == (("keep=0.5", "0.500", "3.0"),)
    assert tokens.rows == (("keep=0.5", *["0.500"] * len(KEPT)),)
    assert not any(table.rows for table in empty)
