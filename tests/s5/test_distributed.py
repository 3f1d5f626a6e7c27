"""What several gloo processes compute equals what one does with the same global batch: values and gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from s5 import distributed
from s5.finetune import Supervised
from s5.lsmcl import LSMCL
from s5.model import VideoModel
from tests.s5.toys import MODEL, TASK, batch

BATCH, STEPS = 8, 3
Worker = Callable[[int, int], Any]


def _enter(rank: int, world: int, folder: str, worker: Worker) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.save(worker(rank, world), os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def together(worker: Worker, world: int, folder: Path) -> list[Any]:
    """Return what each of `world` processes returns."""
    mp.start_processes(_enter, (world, str(folder), worker), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def normalise(rank: int, world: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, 5, dtype=torch.float32) * 3 + 100
    target = torch.randn(BATCH, 5)
    norm = distributed.BatchNorm(5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 6.0))
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    mine = x[share].clone().requires_grad_()
    out = norm(mine)
    # The loss is a mean over workers, as under DDP.
    ((out - target[share]).square().mean() / world).backward()
    assert mine.grad is not None
    return {"out": out.detach(), "grad": mine.grad, "mean": norm.running_mean, "var": norm.running_var}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_batch_norm_has_the_statistics_of_the_global_batch(tmp_path: Path, world: int) -> None:
    parts = together(normalise, world, tmp_path)
    whole = normalise(0, 1)
    for name in ("out", "grad"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], rtol=1e-4, atol=1e-5)
    for part in parts:
        torch.testing.assert_close(part["mean"], whole["mean"])
        torch.testing.assert_close(part["var"], whole["var"], rtol=1e-4, atol=1e-5)


def train(task: nn.Module, rank: int, world: int) -> dict[str, Any]:
    """Return the losses of all workers and the weights after some steps of plain SGD.

    AdamW would blow rounding noise up: it divides a gradient near zero by its own size.
    """
    model = DistributedDataParallel(task, broadcast_buffers=False) if world > 1 else task
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(STEPS):
        out = model(batch(step, BATCH, first=rank * BATCH // world, stop=(rank + 1) * BATCH // world))
        out["loss"].backward()
        losses.append(float(distributed.mean(out["loss"])))
        optimizer.step()
        optimizer.zero_grad()
        task.after_step(step / STEPS)  # type: ignore[operator]
    return {"losses": losses, "weights": {k: v.clone() for k, v in task.state_dict().items()}}


def pretrain(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return train(LSMCL(MODEL, TASK), rank, world)


def finetune(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return train(Supervised(VideoModel(MODEL, 2), "class"), rank, world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("worker", [pretrain, finetune])
def test_workers_train_as_one(tmp_path: Path, worker: Worker, world: int) -> None:
    parts = together(worker, world, tmp_path)
    whole = worker(0, 1)
    for part in parts:
        assert part["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        for name, value in whole["weights"].items():
            torch.testing.assert_close(part["weights"][name], value, rtol=1e-3, atol=1e-5, msg=name)


def gather(rank: int, world: int) -> tuple[Any, ...]:
    rows = torch.full((2, 3), float(rank))
    flag = distributed.any_worker(rank == world - 1, torch.device("cpu"))
    return distributed.gather(rows), distributed.gather_objects(f"rank{rank}"), flag, distributed.mean(rows)


@pytest.mark.slow
def test_collectives_keep_the_order_of_ranks(tmp_path: Path) -> None:
    for rows, names, flag, mean in together(gather, 2, tmp_path):
        assert rows[:, 0].tolist() == [0, 0, 1, 1]
        assert names == ["rank0", "rank1"]
        assert flag
        assert mean.unique().tolist() == [0.5]


def test_one_process_needs_no_group() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(distributed.gather(x), x)
    assert distributed.gather_objects("a") == ["a"]
    assert not distributed.any_worker(False, torch.device("cpu"))
    plain, own = nn.BatchNorm1d(4), distributed.BatchNorm(4)
    assert torch.equal(plain(x), own(x))
