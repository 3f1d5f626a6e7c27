"""Collectives that the loss and the norms need, the same in one process and in many.

With no process group every function is the identity, so that the same lines run alone and under DDP.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

Value = TypeVar("Value")


def world_size() -> int:
    """Return the number of processes, 1 with no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process' rank, 0 with no process group."""
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def gather(x_BD: Tensor) -> Tensor:
    """Return the rows of all workers in the order of their ranks, without gradient; every worker has as many."""
    if world_size() == 1:
        return x_BD
    parts = [torch.empty_like(x_BD) for _ in range(world_size())]
    dist.all_gather(parts, x_BD.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def mean(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all workers, without gradient."""
    if world_size() == 1:
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def any_worker(flag: bool, device: torch.device) -> bool:
    """Return whether any worker's flag is set: the same answer on all of them."""
    if world_size() == 1:
        return flag
    raised = torch.tensor([int(flag)], device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def _total(values: Tensor) -> Tensor:
    """Return the sum over all workers; its gradient crosses workers too."""
    return cast(Tensor, all_reduce(values))  # type: ignore[no-untyped-call]


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of (B, D) with the statistics of the global batch, on CPU (gloo) as on GPU (NCCL).

    PyTorch's `SyncBatchNorm` runs on GPUs only. Statistics are in fp32 and their gradient crosses workers, so that
    values and gradients do not depend on the number of workers. Every worker has to hold as many rows.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised rows; running statistics are used in evaluation."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        x_BD = input.float()
        count = x_BD.shape[0] * world_size()
        # The second moment is taken about the global mean in a second pass: E[x^2] - E[x]^2 cancels.
        mean_D = _total(x_BD.sum(0)) / count
        variance_D = _total((x_BD - mean_D).square().sum(0)) / count
        self._track(mean_D.detach(), variance_D.detach() * count / max(count - 1, 1))
        normalised: Tensor = (x_BD - mean_D) * torch.rsqrt(variance_D + self.eps)
        if self.affine:
            normalised = normalised * self.weight + self.bias
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean_D: Tensor, variance_D: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        share = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_D, share)
        self.running_var.lerp_(variance_D, share)
        self.num_batches_tracked += 1


def gather_objects(value: Value) -> list[Value]:
    """Return the values of all workers in the order of their ranks; for small or rare ones: they are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Value | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[Value], values)
