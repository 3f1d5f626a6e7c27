"""Population-based training without Ray: who goes on from whom, with which values, and after an interruption."""

from __future__ import annotations

import dataclasses
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from pipelines import storage
from pipelines.config import SweepConfig, override, to_json
from pipelines.errors import StageError, UserError
from pipelines.storage.checkpoint_backend import copy_latest
from pipelines.tuning import plans, population, records, results
from pipelines.tuning.placement import Placement
from pipelines.tuning.records import Record
from pipelines.tuning.trial_process import StagesOfTrial
from pipelines.tuning.trial_queue import TRIAL, Plan, TrialQueue
from pipelines.tuning.trials import TrialSettings
from s5.checkpoints.checkpoint import verify
from s5.training.context import SoloContext
from tests.s5.toys import lsmcl_loop

METRIC = "val/accuracy"
LR = "optim.lr"
BOUNDS = (1e-4, 1.0)
SPACE = f"{LR}=loguniform(1e-4,1)"


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each trial be placed as it is."""
    monkeypatch.setattr(Placement, "placed", lambda self, trial: trial)


def sweep_of(out: Path, space: str = SPACE, **changes: Any) -> SweepConfig:
    base = {"stages": "finetune", "search": "pbt", "samples": 8, "out": str(out), "space": (space,)}
    return override(SweepConfig(), base | {"finetune.loop.epochs": 6} | changes)


def plan_of(config: SweepConfig) -> Plan:
    return plans.plan_of(config, lambda settings, metric, makes: {"manifest": "digest"})


def gain(rate: float, epoch: int, epochs: int) -> float:
    """What an epoch adds where the best rate falls from 1e-1 to 1e-3: the more, the nearer to that it is."""
    best = -1 - 2 * (epoch - 1) / (epochs - 1)
    return 1 / epochs - 0.1 * (math.log10(rate) - best) ** 2


class Trainer:
    """Trains the trials of a plan in turn, in a random order: a member's weights are the sum of its gains."""

    def __init__(self, plan: Plan, failing: Callable[[TrialSettings], bool] = lambda trial: False) -> None:
        self.plan, self._failing = plan, failing
        self.queue = TrialQueue(plan, Placement(4, inside=True, here=True))
        self.trained: list[str] = []

    def run(self, most: int = 1000, seed: int = 0) -> Trainer:
        running: dict[str, TrialSettings] = {}
        order = random.Random(seed)
        while len(self.trained) < most:
            found = self.queue.suggest(f"trial {len(self.trained) + len(running)}")
            if found == Searcher.FINISHED:
                break
            if found is not None:
                running[f"trial {len(self.trained) + len(running)}"] = found[TRIAL]
            if found is None or len(running) == 4:
                name = order.choice(sorted(running))
                self._end(name, running.pop(name))
        return self

    def _end(self, name: str, trial: TrialSettings) -> None:
        config = self.plan.config
        record = records.read(records.path_of(trial))
        if self._failing(trial):
            record = records.failed(record, "loss is not finite")
        else:
            before = self.plan.records[trial.start].metrics[METRIC] if trial.start else 0.0
            epochs = config.finetune.loop.epochs
            first = self.plan.records[trial.start].epoch if trial.start else 0
            gains = (gain(trial.values[LR], epoch, epochs) for epoch in range(first + 1, trial.epoch + 1))
            metrics = {METRIC: before + sum(gains)}
            record = dataclasses.replace(record, status="finished", metrics=metrics, seconds=1.0, checkpoint="there")
        self.plan.records[trial.out] = records.write(trial, record)
        self.trained.append(trial.name)
        self.queue.on_trial_complete(name, record.metrics)

    def best(self) -> Record:
        end = self.plan.config.finetune.loop.epochs
        last = [each for each in self.plan.records.values() if each.epoch == end and each.status == "finished"]
        return max(last, key=lambda record: record.metrics[METRIC])


def test_a_population_finds_a_schedule_that_no_single_value_equals(tmp_path: Path) -> None:
    epochs = 12
    trainer = Trainer(plan_of(sweep_of(tmp_path, SPACE, **{"samples": 12, "finetune.loop.epochs": epochs}))).run()
    assert len(trainer.trained) == trainer.plan.total == 12 * epochs
    constants = [10 ** (-4 + power / 50) for power in range(201)]
    constant = max(sum(gain(rate, epoch, epochs) for epoch in range(1, epochs + 1)) for rate in constants)
    best = trainer.best()
    assert best.metrics[METRIC] > constant + 0.2
    line = results.schedule(population.line_of(best, trainer.plan.records), trainer.plan.objective)
    assert [(part["from_epoch"], part["to_epoch"]) for part in line] == [(i, i + 1) for i in range(epochs)]
    assert line[0]["values"][LR] > 5 * line[-1]["values"][LR]


def test_the_worst_quarter_takes_over_the_best_and_the_others_go_on(tmp_path: Path) -> None:
    trainer = Trainer(plan_of(sweep_of(tmp_path))).run(most=8)
    first = {trial.out: trial for trial in trainer.plan.population.trials} if trainer.plan.population else {}
    ranked = sorted(first, key=lambda out: -trainer.plan.records[out].metrics[METRIC])
    assert trainer.plan.population is not None
    following = trainer.plan.population.advance(trainer.plan.records)
    for trial, out in zip(following, first, strict=True):
        assert trial.epoch == 2
        if out in ranked[-2:]:
            assert trial.start in ranked[:2]
            source, value = first[trial.start].values[LR], trial.values[LR]
            assert value != source
            assert BOUNDS[0] <= value <= BOUNDS[1]
        else:
            assert (trial.start, trial.values) == (out, first[out].values)


@pytest.mark.parametrize("most", [3, 8, 19, 40])
def test_an_interrupted_population_ends_as_one_that_was_not(tmp_path: Path, most: int) -> None:
    straight = Trainer(plan_of(sweep_of(tmp_path / "straight"))).run(seed=1)
    first = Trainer(plan_of(sweep_of(tmp_path / "again"))).run(most, seed=2)
    second = Trainer(plan_of(sweep_of(tmp_path / "again"))).run(seed=3)
    assert sorted(first.trained + second.trained) == sorted(straight.trained)
    assert second.best().metrics == straight.best().metrics
    assert second.best().values == straight.best().values


def test_a_member_that_fails_takes_over_another_and_the_last_ones_are_tried_again(tmp_path: Path) -> None:
    config = sweep_of(tmp_path)

    def failing(trial: TrialSettings) -> bool:
        return trial.epoch in (2, 6) and trial.setting != "member=5"

    trainer = Trainer(plan_of(config), failing).run()
    starts = {record.start for record in trainer.plan.records.values() if record.epoch == 3}
    assert {start.rpartition("/")[2] for start in starts} == {"member=5,2of6epochs"}
    again = plan_of(config)
    assert [trial.name for trial in again.waiting] == [f"member={i},epoch=6" for i in range(8) if i != 5]
    assert sum(record.status == "failed" for record in again.records.values()) == 7


def test_a_population_of_which_nothing_is_left_ends(tmp_path: Path) -> None:
    trainer = Trainer(plan_of(sweep_of(tmp_path)), lambda trial: trial.epoch == 2).run()
    assert len(trainer.trained) == 16


def test_choices_go_to_a_neighbour_or_are_drawn_anew(tmp_path: Path) -> None:
    config = sweep_of(tmp_path, f"{LR}=1e-4,1e-3,1e-2,1e-1", samples=4, **{"finetune.loop.epochs": 20})
    trainer = Trainer(plan_of(config)).run()
    assert {record.values[LR] for record in trainer.plan.records.values()} <= {1e-4, 1e-3, 1e-2, 1e-1}
    assert len(trainer.trained) == 80


def test_the_last_part_is_judged_by_its_own_end(tmp_path: Path) -> None:
    """Not by the checkpoint that it began from, which may be better."""
    found = Trainer(plan_of(sweep_of(tmp_path))).run(most=8).plan.population
    assert found is not None
    trial = dataclasses.replace(found.advance({})[0], start="")

    def finetune(settings: Any, parent_run: str, on_row: Any) -> dict[str, Any]:
        metrics = {METRIC: 0.5, f"best/{METRIC}": 0.9}
        return {"metrics": metrics, "seconds": 1.0, "checkpoint": "the first", "counts": {"steps": 12}}

    record = StagesOfTrial(trial, "")(records.started(trial, {}), {"finetune": finetune})
    assert record.metrics[METRIC] == 0.5
    assert record.checkpoint == f"{trial.out}/finetune/checkpoints/step_00000012"
    alone = dataclasses.replace(trial, epoch=0)
    assert StagesOfTrial(alone, "")(records.started(alone, {}), {"finetune": finetune}).metrics[METRIC] == 0.9


def made_checkpoint(folder: Path) -> str:
    """Train a toy for a few steps, and return its folder of checkpoints."""
    lsmcl_loop(SoloContext(folder)).run()
    return str(folder)


def test_a_member_goes_on_from_a_copy_of_the_latest_checkpoint(tmp_path: Path) -> None:
    config = sweep_of(tmp_path / "out")
    trial = Trainer(plan_of(config)).run(most=8).plan.population
    assert trial is not None
    member = trial.advance({})[0]
    with pytest.raises(StageError, match=r"there is no checkpoint in .*/finetune/checkpoints"):
        population.begin(member)
    source = made_checkpoint(Path(storage.join(member.start, "finetune", "checkpoints")))
    target = Path(storage.join(member.stages["finetune"].out, "checkpoints"))
    latest = sorted(path.name for path in Path(source).glob("step_*"))[-1]
    # An earlier copy was interrupted.
    (target / latest).mkdir(parents=True)
    (target / latest / "model.safetensors").write_bytes(b"half")
    population.begin(member)
    assert [path.name for path in target.iterdir()] == [latest]
    assert verify(target / latest) == verify(Path(source) / latest)
    # One of its own is left alone.
    (target / latest / "optimizer.safetensors").write_bytes(b"damaged")
    population.begin(member)
    assert (target / latest / "optimizer.safetensors").read_bytes() == b"damaged"
    assert not copy_latest(str(target), str(tmp_path / "elsewhere"))
    shutil.rmtree(source)
    assert not copy_latest(source, str(tmp_path / "elsewhere"))


def test_checkpoints_of_two_generations_are_kept(tmp_path: Path) -> None:
    made = Path(made_checkpoint(tmp_path / "made"))
    trainer = Trainer(plan_of(sweep_of(tmp_path / "out"))).run(most=8)
    folders = {out: Path(storage.join(out, "finetune", "checkpoints")) for out in trainer.plan.records}
    for folder in folders.values():
        shutil.copytree(made, folder)
    trainer.run(most=16)
    assert all(any(folder.iterdir()) for folder in folders.values())
    trainer.run(most=24)
    assert not any(any(folder.iterdir()) for folder in folders.values())
    assert {record.epoch for record in trainer.plan.records.values() if record.checkpoint} == {2, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": ("clips.frames=8,16",)},
            "space has clips.frames: search pbt changes settings in mid-run, which this",
        ),
        ({"space": (f"{LR}=0.1,0.2",)}, "samples is 8: the space has about 2 settings only, and each member begins"),
        ({"metric": "train/loss"}, "search pbt compares evaluations of finetune; give val/accuracy or val/loss"),
        ({"finetune.loop.evaluate_every": 6}, "finetune.loop.evaluate_every is 6: a population is compared before"),
        (
            {"finetune.loop.steps": 9},
            "finetune.loop.steps is 9: a population is compared after epochs; give",
        ),
        ({"seeds": 2}, "seeds is 2: members of a population take over each other's weights"),
        ({"finetune.loop.stop_after_epoch": 3}, "finetune.loop.stop_after_epoch is 3: trials train to their end"),
        ({"stages": "pretrain+finetune"}, "stages is 'pretrain[+]finetune': a population trains in one stage"),
        ({"early_stopping": True}, "early_stopping is True: a population replaces its worst members instead"),
        ({"against_seconds": True}, "against_seconds is True: a population compares one metric"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        plan_of(sweep_of(tmp_path, **changes) if "space" not in changes else sweep_of(tmp_path, *changes["space"]))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"samples": 9}, "samples"),
        ({"search": "random"}, "search"),
        ({"space": (f"{LR}=uniform(0.1,1)",)}, "space"),
        ({"finetune.loop.epochs": 9}, "finetune.loop.epochs"),
    ],
)
def test_a_population_is_not_extended(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    config = sweep_of(tmp_path)
    storage.write_json(str(tmp_path / "run.json"), to_json("sweep", config))
    assert plans.finished(config) is None
    with pytest.raises(UserError, match=f"with another {what}, and a population cannot be extended"):
        plans.finished(override(config, changes))
