"""AdamW, its parameter groups, and schedules as functions of the progress of training, 0 to 1."""

from __future__ import annotations

import math

import torch
from torch import nn

from s5.config import OptimConfig


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Return AdamW's groups of a module's trained weights.

    A weight's own hint (`optim_hints`, set where it is made) comes first; a hinted learning rate is an upper bound.
    Norms, biases and what timm's models name in `no_weight_decay()` have no decay.
    """
    undecayed = _undecayed(module)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        hints: dict[str, float] = getattr(parameter, "optim_hints", {})
        plain = config.weight_decay if parameter.ndim > 1 and name not in undecayed else 0.0
        key = (min(hints.get("lr", config.lr), config.lr), hints.get("weight_decay", plain))
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def _undecayed(module: nn.Module) -> set[str]:
    names: set[str] = set()
    for prefix, child in module.named_modules():
        if prefix and hasattr(child, "no_weight_decay"):
            names |= {f"{prefix}.{name}" for name in child.no_weight_decay()}
    return names


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over a module's trained weights."""
    return torch.optim.AdamW(parameter_groups(module, config), betas=config.betas, fused=config.fused)


def schedule(progress: float, warmup: float) -> float:
    """Return the share of the peak learning rate: a linear rise over `warmup` of the training, then half a cosine."""
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Set every group to that share of its peak; return the highest learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
    return max(float(group["lr"]) for group in optimizer.param_groups)
