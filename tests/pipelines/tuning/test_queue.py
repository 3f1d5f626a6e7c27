"""The order of trials and their records, without Ray: shared pretrainings, extensions, means over seeds, memory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from pipelines import storage
from pipelines.config import SweepConfig, override, to_json
from pipelines.errors import UserError
from pipelines.tuning import plans, records, results
from pipelines.tuning.placement import Placement
from pipelines.tuning.search_space import parse
from pipelines.tuning.trial_queue import FAILED_IN, FAILURE, PRETRAINED, TRIAL, Plan, TrialQueue
from pipelines.tuning.trials import Settings, objective_of

KEEP = "finetune.model.decoder.selection.keep_ratio"


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each trial be placed as it is."""
    monkeypatch.setattr(Placement, "placed", lambda self, trial: trial)


def check_stage(settings: Settings, metric: str, makes_checkpoint: bool) -> dict[str, str]:
    return {"manifest": "digest"}


def sweep_of(out: Path, *space: str, **changes: Any) -> SweepConfig:
    return override(SweepConfig(space=space, out=str(out)), changes)


def queue_of(config: SweepConfig) -> tuple[TrialQueue, Plan]:
    plan = plans.plan_of(config, check_stage)
    return TrialQueue(plan, Placement(4, inside=True, here=True)), plan


def finish(plan: Plan, out: str, value: float, seconds: float = 1.0) -> None:
    """Write a record as the process of a trial does at its end."""
    done = dataclasses.replace(
        plan.records[out], status="finished", metrics={plan.objective.metric: value}, seconds=seconds
    )
    storage.write_json(f"{out}.json", dataclasses.asdict(done))
    plan.records[out] = done


def test_trials_that_pretrain_alike_wait_for_the_first(tmp_path: Path) -> None:
    queue, _ = queue_of(sweep_of(tmp_path, f"{KEEP}=0.5,1.0", seeds=2))
    first, other_seed = queue.suggest("a")[TRIAL], queue.suggest("b")[TRIAL]
    assert (first.seed, other_seed.seed) == (0, 1)
    assert first.pretrained != other_seed.pretrained
    assert queue.suggest("c") is None
    queue.on_trial_result("b", {PRETRAINED: True})
    follower = queue.suggest("c")[TRIAL]
    assert (follower.seed, follower.pretrained) == (1, other_seed.pretrained)
    assert follower.stages["finetune"].checkpoint == other_seed.stages["pretrain"].out
    assert follower.stages["finetune"].out != other_seed.stages["finetune"].out
    queue.on_trial_complete("a", {"val/accuracy": 0.5})
    assert queue.suggest("d")[TRIAL].pretrained == first.pretrained
    assert queue.suggest("e") == Searcher.FINISHED


def test_what_starts_from_a_failed_pretraining_fails_without_a_start(tmp_path: Path) -> None:
    queue, plan = queue_of(sweep_of(tmp_path, f"{KEEP}=0.25,0.5,1.0"))
    queue.suggest("a")
    queue.on_trial_complete("a", {FAILURE: "no room", FAILED_IN: "pretrain"})
    assert queue.suggest("b") == Searcher.FINISHED
    assert [r.failure for r in plan.records.values()][1:] == ["its pretraining failed in another trial: no room"] * 2


def test_pretrainings_that_differ_are_not_shared(tmp_path: Path) -> None:
    queue, _ = queue_of(sweep_of(tmp_path, "lsmcl.mask_ratio=0.25,0.5", "clips.frames=8,16"))
    assert len({queue.suggest(name)[TRIAL].pretrained for name in "abcd"}) == 4


def test_an_extended_sweep_runs_what_is_new(tmp_path: Path) -> None:
    queue, plan = queue_of(sweep_of(tmp_path, f"{KEEP}=0.5,1.0"))
    out = queue.suggest("a")[TRIAL].out
    finish(plan, out, 0.5)
    _, more = queue_of(sweep_of(tmp_path, f"{KEEP}=0.25,0.5,1.0", seeds=2))
    assert (list(more.records), len(more.waiting), more.total) == ([out], 5, 6)
    _, longer = queue_of(sweep_of(tmp_path, f"{KEEP}=0.5,1.0", **{"finetune.loop.epochs": 20}))
    assert (len(longer.records), len(longer.waiting)) == (0, 2)
    # The pretraining is as long as before.
    assert longer.waiting[0].pretrained == more.waiting[0].pretrained


@pytest.mark.parametrize(
    ("space", "changes", "message"),
    [
        (("lsmcl.mask_ratio=0.5",), {}, "with lsmcl.mask_ratio 0.25, outside this space"),
        (("lsmcl.mask_ratio=uniform(0.3,0.6)",), {}, "with lsmcl.mask_ratio 0.25, outside this space"),
        (("clips.frames=4,8",), {}, "over lsmcl.mask_ratio, which this space does not have"),
        (("lsmcl.mask_ratio=0.25,0.5", "clips.frames=4,8"), {}, "does not vary clips.frames"),
        (("lsmcl.mask_ratio=0.25,0.5",), {"seeds": 1}, "a sweep of 2 seeds, more than 1"),
        (("lsmcl.mask_ratio=0.25,0.5",), {"pretrain.optim.lr": 0.5}, "a run with pretrain.optim.lr"),
        (("lsmcl.mask_ratio=0.25,0.5,0.75",), {}, ""),
        (("lsmcl.mask_ratio=uniform(0.1,0.6)",), {"search": "random", "samples": 5}, ""),
    ],
)
def test_a_sweep_that_is_no_extension_is_refused(
    space: tuple[str, ...], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    first = sweep_of(tmp_path, "lsmcl.mask_ratio=0.25,0.5", seeds=2)
    (tmp_path / "trials").mkdir()
    storage.write_json(str(tmp_path / "run.json"), to_json("sweep", first))
    assert plans.finished(first) is None
    second = sweep_of(tmp_path, *space, **({"seeds": 2} | changes))
    if message:
        with pytest.raises(UserError, match=message):
            plans.finished(second)
    else:
        assert plans.finished(second) is None


def test_a_larger_range_takes_more_samples(tmp_path: Path) -> None:
    first = sweep_of(tmp_path, "lsmcl.mask_ratio=uniform(0.25,0.5)", search="random", samples=4)
    (tmp_path / "trials").mkdir()
    storage.write_json(str(tmp_path / "run.json"), to_json("sweep", first))
    larger = dataclasses.replace(first, space=("lsmcl.mask_ratio=uniform(0.1,0.5)",))
    with pytest.raises(UserError, match="has drawn its 4 samples: give more --samples"):
        plans.finished(larger)
    assert plans.finished(dataclasses.replace(larger, samples=5)) is None


def test_proposed_values_that_do_not_fit_together_are_failures(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = ("model.decoder.blocks=1,2,3", "model.decoder.selection.keep_ratio=[0.5],[0.5,0.4],[0.5,0.4,0.3]")
    queue, plan = queue_of(sweep_of(tmp_path, *space, search="tpe", samples=8, stages="finetune"))
    while (suggested := queue.suggest("a")) != Searcher.FINISHED:
        finish(plan, suggested[TRIAL].out, 0.5)
        queue.on_trial_complete("a", {"val/accuracy": 0.5})
    unfit = [record for record in plan.records.values() if record.status == "failed"]
    assert unfit
    assert all("keep_ratio" in record.failure for record in unfit)
    assert all(record.values["model.decoder.blocks"] < 3 for record in unfit)


def test_trials_on_another_manifest_are_not_mixed(tmp_path: Path) -> None:
    config = sweep_of(tmp_path, f"{KEEP}=0.5,1.0")
    queue, plan = queue_of(config)
    finish(plan, queue.suggest("a")[TRIAL].out, 0.5)
    with pytest.raises(UserError, match="holds trials on another manifest, which has changed since"):
        plans.plan_of(config, lambda *given: {"manifest": "other"})


def test_settings_are_compared_by_their_means_over_seeds(tmp_path: Path) -> None:
    config = sweep_of(tmp_path, f"{KEEP}=0.5,1.0", seeds=3, stages="finetune")
    queue, plan = queue_of(config)
    # 0.5 has the luckiest seed, 1.0 the better mean.
    reached = {(0.5,): [0.9, 0.1, 0.2], (1.0,): [0.6, 0.5, 0.7]}
    for name in "abcdef":
        trial = queue.suggest(name)[TRIAL]
        finish(plan, trial.out, reached[trial.values[KEEP]][trial.seed], seconds=2.0 if trial.seed else 3.0)
    rows = results.settings_table(parse(config), plan.records, objective_of(config))
    assert [row["setting"] for row in rows] == ["keep_ratio=1.0", "keep_ratio=0.5"]
    assert rows[0]["val/accuracy"]["mean"] == pytest.approx(0.6)
    # t of 2 degrees of freedom, 4.303, times 0.1 / sqrt(3).
    assert rows[0]["val/accuracy"]["interval"] == pytest.approx([0.6 - 0.2484, 0.6 + 0.2484], abs=1e-3)
    assert rows[1]["difference"]["from"] == "keep_ratio=1.0"
    assert rows[1]["difference"]["val/accuracy"]["mean"] == pytest.approx(-0.2)
    assert rows[0]["difference"] is None
    assert [row["unbeaten"] for row in rows] == [True, False]
    table = results.table([KEEP], plan.records)
    assert sorted(zip(table[KEEP].to_pylist(), table["seed"].to_pylist(), strict=True))[0] == ([0.5], 0)
    best = results.best_trial(plan.records, "keep_ratio=1.0", plan.objective)
    assert best.seed == 2


def test_a_key_without_a_natural_baseline_is_compared_with_its_first_value(tmp_path: Path) -> None:
    config = sweep_of(tmp_path, "clips.long_stride=2,4", seeds=3, stages="finetune")
    queue, plan = queue_of(config)
    for name in "abcdef":
        trial = queue.suggest(name)[TRIAL]
        finish(plan, trial.out, 0.1 * trial.seed + (0.3 if trial.values["clips.long_stride"] == 4 else 0))
    longer, shorter = results.settings_table(parse(config), plan.records, objective_of(config))
    assert shorter["difference"] is None
    # Seeds differ by more than the settings' means; paired by seed they do not.
    assert longer["difference"]["val/accuracy"]["interval"] == pytest.approx([0.3, 0.3])
    assert "from long_stride=2.0, paired by seed: +0.300" in results.in_words(longer, "val/accuracy")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("CUDA out of memory. Tried to allocate 20 GiB", "out of memory"),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", "out of memory"),
        ("Traceback\n  x\nTask was killed due to the node running low on memory.\nSee the docs.", "out of memory"),
        ("The process is killed by SIGKILL by OOM killer due to high memory usage, or by another", "failed"),
        ("loss is not finite", "failed"),
    ],
)
def test_a_lack_of_memory_is_named(text: str, status: str) -> None:
    record = records.failed(records.Record("a", 0, {}), text)
    assert record.status == status
    assert (record.failure.startswith("out of memory: ")) == (status == "out of memory")
    assert os.linesep not in record.failure


def test_tpe_finds_what_is_good_and_goes_on_where_it_stood(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = ("optim.lr=uniform(0.001,1)", "model.decoder.selection.generator=linear,random")
    config = sweep_of(tmp_path, *space, search="tpe", samples=24, stages="finetune")

    def run(config: SweepConfig) -> tuple[list[dict[str, Any]], Plan]:
        queue, plan = queue_of(config)
        tried = []
        while (suggested := queue.suggest("a")) != Searcher.FINISHED:
            trial = suggested[TRIAL]
            tried.append(trial.values)
            good = 1 - abs(trial.values["optim.lr"] - 0.7)
            finish(plan, trial.out, good)
            queue.on_trial_complete("a", {"val/accuracy": good})
        return tried, plan

    tried, _ = run(config)
    assert len(tried) == 24
    early, late = ([abs(values["optim.lr"] - 0.7) for values in part] for part in (tried[:8], tried[-8:]))
    assert sum(late) < sum(early) / 2
    again, _ = run(sweep_of(tmp_path / "again", *space, search="tpe", samples=24, stages="finetune"))
    assert again == tried
    further, plan = run(dataclasses.replace(config, samples=26))
    assert (len(further), len(plan.records)) == (2, 26)
