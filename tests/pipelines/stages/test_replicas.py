"""Replicas of an evaluation on a real cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import ScaleConfig
from pipelines.running.progress import ProgressBar
from pipelines.stages import evaluate


class Dying:
    """Stands for a replica whose process is lost while it works, the first time."""

    def __init__(self, files: dict[str, bytes], device: str) -> None:
        self.files = files

    def videos_seen(self) -> int:
        return 0

    def run(self, rank: int, folder: Path) -> tuple[int, bytes]:
        mark = folder / f"started_{rank}"
        if rank == 1 and not mark.exists():
            mark.touch()
            os._exit(1)
        return rank, self.files["model"]


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_lost_replica_is_replaced_and_its_share_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "Replica", Dying)
    scale = ScaleConfig(num_workers=2, cpus_per_worker=0.5)
    arguments: list[tuple[Any, ...]] = [(rank, tmp_path) for rank in range(2)]
    with ProgressBar("evaluate", "evaluated", 2, "videos") as bar:
        found = evaluate._by_replicas(scale, {"model": b"weights"}, arguments, bar)
    assert list(found) == [(0, b"weights"), (1, b"weights")]
    assert (tmp_path / "started_1").exists()
