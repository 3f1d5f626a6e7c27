"""What several gloo processes compute equals what one does with the same global batch: values and gradients."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
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
from s5.batch import ClipBatch
from s5.config import LoopConfig
from s5.errors import Failure
from s5.models.video_model import VideoModel
from s5.tasks.lsmcl import LSMCL
from s5.tasks.supervised import Supervised
from s5.training.context import SoloContext
from s5.training.step import Stepper
from tests.s5.toys import MODEL, TASK, batch, lsmcl_loop

BATCH, STEPS = 8, 3
GROUPS = ["two", pytest.param("four", marks=pytest.mark.drill)]
"""Fixtures of so many workers; four only add minutes of imports."""
Worker = Callable[[int, int], Any]


def _enter(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    workers: tuple[Worker, ...] = (pretrain, pretrain_unevenly, finetune, finetune_unevenly, in_parts)
    workers += (normalise, collect, stop) if world == 2 else ()
    found = {worker.__name__: worker(rank, world) for worker in workers}
    torch.save(found, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def together(world: int, folder: Path) -> list[dict[str, Any]]:
    """Return what each of `world` processes finds. Starting them costs most of the time, hence one start for all."""
    mp.start_processes(_enter, (world, str(folder)), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(4, tmp_path_factory.mktemp("four"))


def mine(size: int, rank: int, world: int) -> slice:
    """Return which rows of a global batch are this worker's."""
    share = distributed.share_of(size, rank, world)
    return slice(share.start, share.stop)


def share(step: int, size: int, rank: int, world: int) -> ClipBatch:
    """Return this worker's rows of a global batch."""
    rows = mine(size, rank, world)
    return replace(batch(step, size, first=rows.start, stop=rows.stop), global_size=size)


def normalise(rank: int, world: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, 5, dtype=torch.float32) * 3 + 100
    target = torch.randn(BATCH, 5)
    norm = distributed.BatchNorm(5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 6.0))
    rows = mine(BATCH, rank, world)
    part = x[rows].clone().requires_grad_()
    out = norm(part)
    # The loss is a mean over all rows.
    ((out - target[rows]).square().mean(1).sum() / BATCH).backward()
    assert part.grad is not None
    return {"out": out.detach(), "grad": part.grad, "mean": norm.running_mean, "var": norm.running_var}


@pytest.mark.slow
def test_batch_norm_has_the_statistics_of_the_global_batch(two: list[dict[str, Any]]) -> None:
    parts = [part["normalise"] for part in two]
    whole = normalise(0, 1)
    for name in ("out", "grad"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], rtol=1e-4, atol=1e-5)
    for part in parts:
        torch.testing.assert_close(part["mean"], whole["mean"])
        torch.testing.assert_close(part["var"], whole["var"], rtol=1e-4, atol=1e-5)


def train(task: nn.Module, rank: int, world: int, size: int = BATCH) -> dict[str, Any]:
    """Return the losses of all workers, the first gradients and the weights after some steps of plain SGD.

    AdamW would blow rounding noise up: it divides a gradient near zero by its own size.
    """
    model = DistributedDataParallel(task, broadcast_buffers=False) if world > 1 else task
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.05)
    scalars: list[dict[str, float]] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        out = model(share(step, size, rank, world))
        out["loss"].backward()
        scalars.append({name: float(distributed.mean(value)) for name, value in out.items()})
        gradients = gradients or {k: p.grad.clone() for k, p in task.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        task.after_step(step / STEPS)  # type: ignore[operator]
    weights = {name: value.clone() for name, value in task.state_dict().items()}
    return {"scalars": scalars, "gradients": gradients, "weights": weights}


def pretrain(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return train(LSMCL(MODEL, TASK), rank, world)


def pretrain_unevenly(rank: int, world: int) -> dict[str, Any]:
    """A batch that the workers cannot share evenly: seven pairs."""
    torch.manual_seed(0)
    return train(LSMCL(MODEL, TASK), rank, world, BATCH - 1)


def finetune(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return train(Supervised(VideoModel(MODEL, 2), "class"), rank, world)


def finetune_unevenly(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return train(Supervised(VideoModel(MODEL, 2), "class"), rank, world, BATCH - 1)


def in_parts(rank: int, world: int) -> dict[str, Any]:
    """Steps that several workers take in parts of at most two pairs, and one worker at once."""
    torch.manual_seed(rank)
    task = LSMCL(MODEL, TASK)
    distributed.copy_from_first(task)
    # Several messages, and weights larger than one.
    distributed.BUCKET = 1000
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.05)
    config = LoopConfig(micro_batch=2 if world > 1 else 0)
    stepper = Stepper(task, optimizer, 0.0, config, torch.device("cpu"))
    for step in range(STEPS):
        stepper(share(step, BATCH - 1, rank, world))
        task.after_step(step / STEPS)
    return task.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_parts_of_a_batch_have_the_gradient_of_the_whole(request: pytest.FixtureRequest, group: str) -> None:
    """The negatives of each pair are those of all workers and all parts."""
    whole = in_parts(0, 1)
    for part in (found["in_parts"] for found in request.getfixturevalue(group)):
        torch.testing.assert_close(part, whole, rtol=1e-3, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("worker", [pretrain, pretrain_unevenly, finetune, finetune_unevenly])
def test_workers_train_as_one(request: pytest.FixtureRequest, worker: Worker, group: str) -> None:
    """Metrics, gradients, running statistics, weights and momentum branch; also of a batch shared unevenly."""
    whole = worker(0, 1)
    for part in (found[worker.__name__] for found in request.getfixturevalue(group)):
        for found, expected in zip(part["scalars"], whole["scalars"], strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
        for kind in ("gradients", "weights"):
            for name, value in whole[kind].items():
                torch.testing.assert_close(part[kind][name], value, rtol=1e-3, atol=5e-5, msg=f"{kind} {name}")


def collect(rank: int, world: int) -> tuple[Any, ...]:
    rows = torch.full((2, 3), float(rank))
    flag = distributed.any_worker(rank == world - 1, torch.device("cpu"))
    return distributed.gather(rows, 2 * world), distributed.gather_objects(f"rank{rank}"), flag, distributed.mean(rows)


@pytest.mark.slow
def test_collectives_keep_the_order_of_ranks(two: list[dict[str, Any]]) -> None:
    for rows, names, flag, mean in (part["collect"] for part in two):
        assert rows[:, 0].tolist() == [0, 0, 1, 1]
        assert names == ["rank0", "rank1"]
        assert flag
        assert mean.unique().tolist() == [0.5]


@dataclass
class GroupContext(SoloContext):
    """One of several workers, without checkpoints."""

    def wrap(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module, broadcast_buffers=False)


def stop(rank: int, world: int) -> tuple[int, bool, float]:
    """Return how a run ends where rank 0 alone is asked to stop, at step 3; each worker has a failure a step."""
    context = GroupContext(rank=rank, world_size=world)

    def source(start: int) -> Generator[ClipBatch]:
        for step in range(start, 8):
            context.stop = rank == 0 and step + 1 == 3
            yield replace(share(step, BATCH, rank, world), failures=[Failure("a", "a.mp4", "truncated")])

    result = lsmcl_loop(context, source, log_every=100).run()
    return result.step, result.stopped, result.metrics["data/failures_total"]


@pytest.mark.slow
def test_all_workers_stop_at_the_same_step_between_two_rows(two: list[dict[str, Any]]) -> None:
    assert [part["stop"] for part in two] == [(3, True, 6)] * 2


def test_one_process_needs_no_group() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(distributed.gather(x, 3), x)
    assert distributed.gather_objects("a") == ["a"]
    assert not distributed.any_worker(False, torch.device("cpu"))
    plain, own = nn.BatchNorm1d(4), distributed.BatchNorm(4)
    torch.testing.assert_close(plain(x), own(x))
    torch.testing.assert_close(plain.state_dict(), own.state_dict())
    before = own.running_mean.clone()  # type: ignore[union-attr]
    own(x * torch.nan)
    assert torch.equal(before, own.running_mean)  # type: ignore[arg-type]
