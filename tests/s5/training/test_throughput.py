from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from s5.batch import ClipBatch
from s5.models.video_model import VideoModel
from s5.tasks.lsmcl import LSMCL
from s5.tasks.supervised import Supervised
from s5.training.context import SoloContext
from s5.training.throughput import ThroughputWindow, Trace, model_flops, peak_flops
from tests.s5.toys import MODEL, TASK, batch, lsmcl_loop


class Product(nn.Module):
    """Takes one matrix product a row: 16 numbers to 8."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8, bias=False)

    def forward(self, item: ClipBatch) -> dict[str, torch.Tensor]:
        rows = item.long.flatten(1)[:, :16].float()
        return {"loss": self.linear(rows).square().sum()}


def test_flops_are_those_of_the_products_forward_and_backward() -> None:
    # Forward, and backward for the weight; the input needs no gradient. A multiplication with its addition counts two.
    assert model_flops(Product(), batch(0, size=6)) == 6 * 2 * (2 * 16 * 8)


@pytest.mark.parametrize("task", [LSMCL(MODEL, TASK), Supervised(VideoModel(MODEL, 2), "class")])
def test_counting_flops_changes_nothing_and_masking_saves_them(task: nn.Module) -> None:
    task.train()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    flops = model_flops(task, batch(0))
    assert flops == pytest.approx(2 * model_flops(task, batch(0, size=2)))
    assert task.training
    assert all(parameter.grad is None for parameter in task.parameters())
    torch.testing.assert_close(task.state_dict(), before, rtol=0, atol=0)


def test_rows_have_the_percentiles_of_the_steps_and_the_utilisation_where_the_peak_is_known() -> None:
    known, unknown = ThroughputWindow(4, flops=1e9, peak=1e15), ThroughputWindow(4, flops=1e9)
    for window in (known, unknown):
        for number in range(1, 22):
            window.add({"loss": torch.ones(())}, batch(0), waited=0.0, seconds=float(number), taken=True)
    row = known.row(2)
    assert row["train/step_seconds_p50"] == 11
    assert row["train/step_seconds_p95"] == 20
    assert row["train/memory_gib"] > 0.01
    assert row["train/mfu"] == pytest.approx(row["train/model_tflops"] / 1000)
    assert "train/mfu" not in unknown.row(2)


def test_the_peak_of_a_cpu_is_unknown_and_of_gpus_known_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), "bf16") == 989e12
    assert peak_flops(torch.device("cuda"), "fp32") is None
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Other")
    assert peak_flops(torch.device("cuda"), "bf16") is None


def test_a_trace_of_some_steps_is_kept(tmp_path: Path) -> None:
    lsmcl_loop(SoloContext(tmp_path), profile_steps=2).run()
    trace = json.loads((tmp_path / "profile" / "steps_4_to_5.json").read_text())
    assert any("convolve" in event.get("name", "") for event in trace["traceEvents"])


def test_no_trace_unless_asked_for(tmp_path: Path) -> None:
    trace = Trace(SoloContext(tmp_path), first=1, steps=0)
    trace.before(1)
    trace.after(1)
    assert not list(tmp_path.iterdir())
