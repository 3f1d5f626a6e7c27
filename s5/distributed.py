"""Collectives for losses, batch norms and the training loop, the same in one process and in many.

Without a process group every function is the identity, so that the same code runs alone and under DDP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")
BUCKET = 2**23
"""Numbers averaged over workers in one message."""


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process' rank, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def share_of(total: int, rank: int, world: int) -> range:
    """Return the rows of a global batch that belong to a worker: contiguous, and as even as possible."""
    return range(rank * total // world, (rank + 1) * total // world)


def weight(rows: int, total: int) -> float:
    """Return the factor that makes the mean over workers of means over their rows the mean over all `total` rows."""
    return rows * world_size() / total


@torch.no_grad()
def gather(x_BD: Tensor, total: int) -> Tensor:
    """Return the `total` rows of all workers in the order of their ranks, without gradient.

    Every worker holds the rows that `share_of` gives it; they are padded to the largest share to be sent.
    """
    world = world_size()
    if world == 1:
        return x_BD
    sizes = [len(share_of(total, rank, world)) for rank in range(world)]
    padded = x_BD.new_zeros(max(sizes), *x_BD.shape[1:])
    padded[: len(x_BD)] = x_BD
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


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


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the workers, as DDP does, after a backward pass in several parts."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world_size()
        sizes = [gradient.numel() for gradient in bucket]
        for gradient, values in zip(bucket, torch.split(flat, sizes), strict=True):
            gradient.copy_(values.view_as(gradient))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in groups of at most `BUCKET` numbers, or of one larger tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@torch.no_grad()
def copy_from_first(module: nn.Module) -> None:
    """Give every worker the weights and buffers of rank 0, as DDP does when it is constructed."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


class _Sum(torch.autograd.Function):
    """The sum over all workers, whose gradient is the sum of all workers' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _total(values: Tensor) -> Tensor:
    """Return the sum over all workers; its gradient crosses workers too."""
    return values if world_size() == 1 else cast(Tensor, _Sum.apply(values))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of (B, D) with the statistics of the global batch, on CPU (gloo) as on GPU (NCCL).

    PyTorch's `SyncBatchNorm` runs on GPUs only. Statistics are in fp32 and their gradient crosses workers, so that
    values and gradients do not depend on the number of workers, nor on how the rows are split among them. A batch
    that is not finite leaves the running statistics as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised rows; running statistics are used in evaluation."""
        if not self.training:
            return super().forward(input)
        x_BD = input.float()
        # The second moment is taken about the global mean in a second pass: E[x^2] - E[x]^2 cancels.
        rows = x_BD.new_full((1,), x_BD.shape[0])
        sums = _total(torch.cat([x_BD.sum(0), rows]))
        count = sums[-1].detach()
        mean_D = sums[:-1] / count
        variance_D = _total((x_BD - mean_D).square().sum(0)) / count
        self._track(mean_D.detach(), variance_D.detach() * count / (count - 1).clamp(min=1))
        normalised: Tensor = (x_BD - mean_D) * torch.rsqrt(variance_D + self.eps)
        if self.affine:
            normalised = normalised * self.weight + self.bias
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean_D: Tensor, variance_D: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        share = 0.1 if self.momentum is None else self.momentum
        finite = mean_D.isfinite().all() & variance_D.isfinite().all()
        for running_D, new_D in ((self.running_mean, mean_D), (self.running_var, variance_D)):
            running_D.lerp_(torch.where(finite, new_D, running_D), share)
        self.num_batches_tracked += finite


def gather_objects(value: Value) -> list[Value]:
    """Return the values of all workers in the order of their ranks; for small or rare ones: they are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Value | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[Value], values)
