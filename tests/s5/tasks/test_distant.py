"""Distant supervision: the divergence equals a slow loop, and steps are learned from narration that is often wrong."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from s5.batch import ClipBatch
from s5.checkpoints.checkpoint import Meta, read_model
from s5.config import LoopConfig, OptimConfig
from s5.models.video_model import VideoModel
from s5.tasks.distant import Distant, StepLabels, step_divergence
from s5.training.context import SoloContext
from s5.training.loop import TrainingInputs, TrainingLoop
from tests.s5.toys import MODEL, batch, saved

STEPS, KEPT = 8, 3
SEGMENTS, CLIPS, RUN = 480, 16, 90
MISALIGNED = 0.3
"""Share of the segments that another step is narrated over than the one that is shown."""
ACCURACY = 0.9
"""Share of unseen clips whose shown step is predicted, at least; chance is 1 / STEPS."""


def labels_of(steps: torch.Tensor) -> StepLabels:
    """Return soft labels whose likeliest step is the given one."""
    others = [torch.randperm(STEPS)[:KEPT].tolist() for _ in steps]
    rows = [
        [first, *(s for s in other if s != first)][:KEPT] for first, other in zip(steps.tolist(), others, strict=True)
    ]
    probabilities = torch.tensor([0.8, 0.15, 0.05]).expand(len(rows), KEPT)
    return StepLabels({f"v@{i}": i for i in range(len(rows))}, torch.tensor(rows), probabilities)


def test_divergence_equals_a_slow_loop_in_value_and_gradient() -> None:
    logits = torch.randn(5, 6, dtype=torch.float64).float().requires_grad_()
    steps = torch.stack([torch.randperm(6)[:KEPT] for _ in range(5)])
    probabilities = torch.rand(5, KEPT).softmax(1)
    # A step with no probability adds nothing, and no NaN.
    probabilities[0] = torch.tensor([1.0, 0.0, 0.0])
    fast = step_divergence(logits, steps, probabilities)
    (gradient,) = torch.autograd.grad(fast.mean(), logits)
    again = logits.detach().clone().requires_grad_()
    total = torch.zeros(())
    for row, label, shares, found in zip(again, steps.tolist(), probabilities.tolist(), fast.tolist(), strict=True):
        value = torch.zeros(())
        for step, share in zip(label, shares, strict=True):
            if share > 0:
                value = value + share * (math.log(share) - (row[step] - torch.logsumexp(row, 0)))
        assert found == pytest.approx(float(value.detach()), abs=1e-6)
        total = total + value / len(steps)
    (expected,) = torch.autograd.grad(total, again)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    # It is least, 0, where the prediction is the label itself.
    perfect = torch.full((1, 6), -math.inf).scatter(1, steps[1:2], probabilities[1:2].log())
    assert float(step_divergence(perfect, steps[1:2], probabilities[1:2])) == pytest.approx(0, abs=1e-6)


def test_parts_of_a_batch_give_its_scalars_and_targets() -> None:
    torch.manual_seed(0)
    whole = replace(batch(0), video_ids=["v@3", "v@1", "v@0", "v@2"])
    labels = labels_of(torch.arange(4))
    task = Distant(VideoModel(MODEL, STEPS), labels).eval()
    targets = task.targets(whole)
    assert targets["steps"][:, 0].tolist() == [3, 1, 0, 2]
    parts = [task.targets(part)["steps"] for part in whole.parts(3)]
    assert torch.equal(torch.cat(parts), targets["steps"])
    with torch.no_grad():
        scalars, scores_B2 = task(whole), task.scores(whole)
    assert scores_B2.mean(0).tolist() == pytest.approx([float(scalars["loss"]), float(scalars["accuracy"])], rel=1e-5)
    assert {"selection_entropy", "keep_ratio"} <= scalars.keys()


def planted(shown: torch.Tensor, names: list[str], looks_SD: torch.Tensor, step: int = 0) -> ClipBatch:
    """Return clips as tokens: noise, and in half of the tokens the look of the step that is shown."""
    tokens = torch.randn(len(shown), 4, 16, 16)
    tokens[:, :, ::2] += looks_SD[shown][:, None, None]
    seeds = torch.randint(2**40, (len(shown),))
    nothing = torch.full((len(shown),), -1)
    return ClipBatch(step, 0, names, tokens.half(), None, seeds, nothing, nothing.float(), [])


def test_steps_are_learned_although_narration_is_often_misaligned(tmp_path: Path) -> None:
    looks = torch.randn(STEPS, 16)
    shown = torch.randint(STEPS, (SEGMENTS,))
    wrong = torch.rand(SEGMENTS) < MISALIGNED
    narrated = torch.where(wrong, (shown + torch.randint(1, STEPS, (SEGMENTS,))) % STEPS, shown)
    labels = labels_of(narrated)
    assert 0.25 < float((labels.steps_NK[:, 0] != shown).float().mean()) < 0.35
    clips = planted(shown, list(labels.rows), looks)

    def batches(start: int) -> Generator[ClipBatch]:
        for step in range(start, RUN):
            rows = torch.randperm(SEGMENTS, generator=torch.Generator().manual_seed(step))[:CLIPS].tolist()
            yield replace(
                clips,
                step=step,
                video_ids=[clips.video_ids[i] for i in rows],
                long=clips.long[rows],
                seeds=clips.seeds[rows],
            )

    decoder = replace(MODEL.decoder, width=64, dropout=0.0)
    config = replace(MODEL, backbone=replace(MODEL.backbone, frozen=True), decoder=decoder)
    torch.manual_seed(0)
    task = Distant(VideoModel(config, STEPS), labels)
    names = [f"step {step}" for step in range(STEPS)]
    inputs = TrainingInputs(
        batches=batches,
        steps=RUN,
        steps_per_epoch=30,
        optim=OptimConfig(lr=1e-2, weight_decay=0.05),
        loop=LoopConfig(batch_size=CLIPS),
        meta=lambda step, metrics: Meta(
            kind="distant", step=step, model=asdict(config), classes=names, metrics=metrics
        ),
    )
    context = SoloContext(tmp_path)
    TrainingLoop(task, inputs, context).run()
    losses = [row["train/loss"] for _, row in context.rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    model, meta = read_model(saved(tmp_path)[-1])
    assert meta.pretrained
    assert meta.classes == names
    test = torch.arange(200) % STEPS
    with torch.no_grad():
        predicted = model(planted(test, [""] * 200, looks).long).logits_BC.argmax(1)
    accuracy = float((predicted == test).float().mean())
    assert accuracy > ACCURACY, accuracy
