"""One optimiser step: forward and backward in whole or in parts, in a chosen precision, clipped, or skipped.

Shapes: B rows (clips or pairs) of this worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from s5 import distributed
from s5.batch import ClipBatch
from s5.config import LoopConfig
from s5.models.backbone import Backbone
from s5.models.decoders import Decoder
from s5.tasks.task import Task

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_recompute_and_compile(task: nn.Module, config: LoopConfig) -> None:
    """Set whether a task's frame encoders and decoders recompute and are compiled; weights stay as they are."""
    for module in task.modules():
        if isinstance(module, Backbone | Decoder):
            module.recompute = config.recompute
            if config.compile:
                module.compile()
        if isinstance(module, Decoder):
            # The stepper skips steps that are not finite, on all workers at once.
            module.check_finite = False


def backward_in_parts(
    task: Task, batch: ClipBatch, rows: int, autocast: Callable[[], AbstractContextManager[object]], scaler: GradScaler
) -> dict[str, Tensor]:
    """Compute the gradient of a whole batch's loss with the graph of only `rows` rows in memory at a time.

    GradCache (arXiv 2101.06983): all rows are encoded without a graph; the loss of the whole batch gives the gradient
    of the encodings; each part is then encoded again, with a graph, and continues the chain rule from there. Noise is
    a function of a row's seed, so that both encodings are the same. It costs one more forward pass of what is
    trained.

    Returns:
        The scalars of the batch, as `task(batch)`.
    """
    parts = batch.parts(rows)
    with torch.no_grad(), autocast():
        encoded = _joined([task.encode(part) for part in parts])
        targets = _joined([task.targets(part) for part in parts])
    leaves = {name: value.requires_grad_() for name, value in encoded.items()}
    with autocast():
        scalars = task.losses(leaves, targets, batch)
    scaler.scale(visible(scalars["loss"])).backward()  # type: ignore[no-untyped-call]
    first = 0
    for part in parts:
        with autocast():
            again = task.encode(part)
        here = slice(first, first + len(part.video_ids))
        first = here.stop
        pairs = [
            (again[name], leaf.grad[here])
            for name, leaf in leaves.items()
            if leaf.grad is not None and again[name].requires_grad
        ]
        # Nothing that is encoded is trained where the backbone is frozen and no weight comes after it.
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
    return scalars


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def visible(loss: Tensor) -> Tensor:
    """Return the loss, with a gradient that is not finite where the loss is not: all workers see the gradient."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class Stepper:
    """Takes optimiser steps, and skips those whose loss or gradient is not finite.

    Args:
        task: what is trained.
        optimizer: over the task's trained weights.
        clip_norm: largest norm of the gradient, 0 for no limit.
        config: precision and parts.
        device: where it runs.
    """

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
        config: LoopConfig,
        device: torch.device,
    ) -> None:
        self.task, self.optimizer = task, optimizer
        self.model: Callable[[ClipBatch], dict[str, Tensor]] = task
        """The task, or its wrapper that averages gradients over workers. With `micro_batch` it is the task: the
        gradients of parts are averaged here, once."""
        self.trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.limit = clip_norm or math.inf
        self.config, self.device = config, device
        self.scaler = GradScaler(device.type, enabled=config.precision == "fp16")

    def __call__(self, batch: ClipBatch) -> tuple[dict[str, Tensor], bool]:
        """Return the scalars of a batch, and whether its step was taken: the same on all workers."""
        scalars = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([weight.grad for weight in self.trained if weight.grad is not None])
        length = float(norm)
        # The gradient is that of all workers, so they agree.
        taken = math.isfinite(length)
        # A gradient that is short enough would be read and written to be scaled by 1.
        if taken and length > self.limit:
            nn.utils.clip_grads_with_norm_(self.trained, self.limit, norm)
        if taken:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return scalars | {"gradient_norm": norm}, taken

    @property
    def seeks_scale(self) -> bool:
        """Whether fp16 may still overflow for no other reason than the scale of the loss."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def _backward(self, batch: ClipBatch) -> dict[str, Tensor]:
        rows = self.config.micro_batch
        if rows and len(batch.video_ids) > rows:
            scalars = backward_in_parts(self.task, batch, rows, self._autocast, self.scaler)
        else:
            with self._autocast():
                scalars = self.model(batch)
            self.scaler.scale(visible(scalars["loss"])).backward()  # type: ignore[no-untyped-call]
        if rows:
            distributed.average_gradients(self.trained)
        return scalars

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = AUTOCAST.get(self.config.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)
