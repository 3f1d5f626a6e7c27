"""What a resumed training stage says of its length, without Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.config import PretrainConfig, override
from pipelines.training import training_stage
from pipelines.training.driver import Outcome
from s5.training.loop import TrainingResult


def test_seconds_of_a_resumed_stage_are_those_of_all_its_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = TrainingResult(4, 2, {"train/loss": 1.0}, stopped=False, earlier_seconds=1000.0)
    monkeypatch.setattr(training_stage, "launch", lambda *given, **named: Outcome(fit, "last", "last"))
    for name in ("check_cluster", "data_set", "listed_count"):
        monkeypatch.setattr(training_stage, name, lambda *given: 1)
    config = override(PretrainConfig(), {"out": str(tmp_path / "out"), "tracking.uri": "off"})
    order = SimpleNamespace(total_steps=4)
    job: Any = SimpleNamespace(config=config, train=["video"], order=order, inputs={"manifest": "digest"})
    build: Any = None
    result = training_stage.run_training("pretrain", job, build, list, lambda stage, bar: lambda step, row: None)
    assert 1000 <= result["seconds"] < 1100
