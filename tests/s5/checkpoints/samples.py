"""Small checkpoints that the tests share, and ways to damage them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from s5.checkpoints import checkpoint
from s5.checkpoints.backend import LocalBackend
from s5.checkpoints.checkpoint import META, MODEL, OPTIMIZER, Meta
from s5.checkpoints.writer import CheckpointWriter
from s5.training.context import SoloContext
from tests.s5.toys import saved

FILES = (MODEL, OPTIMIZER, META)


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a task and its optimiser after a step."""
    task = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(task.parameters())
    task(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return task, optimizer


def meta(step: int, **evaluated: float) -> Meta:
    return Meta(kind="class", step=step, model={"width": 8}, metrics={"loss": 0.25}, evaluated=evaluated)


def save_all(context: SoloContext, *metas: Meta) -> None:
    """Save checkpoints one after another."""
    assert context.checkpoints is not None
    for each in metas:
        with CheckpointWriter(context.checkpoints, context) as writer:
            writer.save(*small(), each)


def resumed(folder: Path, context: SoloContext | None = None) -> int:
    """Return the step that a new run would resume from."""
    context = context or SoloContext(folder)
    assert context.checkpoints is not None
    with context.checkpoints.resume_folder(0, context.notify) as found:
        return 0 if found is None else checkpoint.read_meta(found).step


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in saved(folder)]


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


class Gate(LocalBackend):
    """A backend that writes nothing until it is opened."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reached, self.open = threading.Event(), threading.Event()

    def put(self, name: str, file: str, blocks: Iterable[memoryview]) -> None:
        self.reached.set()
        assert self.open.wait(60)
        super().put(name, file, blocks)
