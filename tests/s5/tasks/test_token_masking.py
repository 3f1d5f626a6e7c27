"""Masking of tokens after the backbone, and a frozen backbone that encodes each frame once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s5 import rng
from s5.batch import ClipBatch
from s5.config import DecoderConfig, ModelConfig, OptimConfig, ViewsConfig
from s5.models.video_model import VideoModel
from s5.tasks.augment import augment
from s5.tasks.lsmcl import LSMCL
from s5.training.optim import build_optimizer
from tests.s5.tasks.test_lsmcl import slow_info_nce
from tests.s5.toys import MODEL, TASK, batch

FROZEN = replace(MODEL, backbone=replace(MODEL.backbone, frozen=True))
TOKENS = replace(TASK, mask_on="tokens")
VIEWS = ViewsConfig(flip=0.5, jitter=0.4, jitter_share=0.8, grey=0.2, blur=(1.0, 0.1), solarise=(0.0, 0.2))


def slow_features(task: LSMCL, encoder: VideoModel, one: ClipBatch, eta: float) -> Tensor:
    """Clip by clip: the branch's own backbone encodes all frames; a loop picks the tokens with the smallest draws."""
    rows = []
    views: tuple[tuple[Any, Tensor | None, Tensor], ...]
    views = ("long", one.long, one.seeds), ("short", one.short, ~one.seeds)
    for view, clips, seeds in views:
        assert clips is not None
        seen = augment(clips, one.seeds, view, task.views)
        for clip, seed, own in zip(seen, seeds, one.seeds, strict=True):
            tokens = encoder.projection(encoder.backbone(clip[None]))[0]
            draws = rng.uniform(own[None], f"{view}/mask", len(tokens))[0].tolist()
            kept = sorted(sorted(range(len(tokens)), key=lambda i: draws[i])[: round(len(tokens) * (1 - eta))])
            frames = torch.tensor([[i // encoder.backbone.tokens for i in kept]])
            picked = torch.stack([tokens[i] for i in kept])[None]
            rows.append(encoder.decoder(picked, seed[None], len(clip), frames).features_BD[0])
    return torch.stack(rows).view(2, len(one.seeds), -1).transpose(0, 1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("decoder", ["s5", "lst", "tsn"])
@pytest.mark.parametrize("cls_token", [False, True])
def test_masked_tokens_are_those_of_the_slow_loop(frozen: bool, decoder: Any, cls_token: bool) -> None:
    backbone = replace(MODEL.backbone, frozen=frozen, cls_token=cls_token)
    task = LSMCL(ModelConfig(backbone=backbone, decoder=replace(MODEL.decoder, name=decoder)), TOKENS, VIEWS)
    one = batch(0)
    for encoder, found in ((task.encoder, task.encode(one)), (task.momentum_encoder, task.targets(one))):
        torch.testing.assert_close(found["features"], slow_features(task, encoder, one, 0.5), rtol=1e-4, atol=1e-5)
    assert task(one)["loss"].isfinite()


def slow_loss(task: LSMCL, one: ClipBatch, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """The whole loss: the query of each view (0 long, 1 short), of the online branch, against the keys of another."""
    ratio, temperature = task.config.mask_ratio, task.config.temperature
    online, momentum = (slow_features(task, branch, one, ratio) for branch in (task.encoder, task.momentum_encoder))
    queries = [task.predictor(task.projector(online[None, :, view]))[0] for view in (0, 1)]
    keys = [task.momentum_projector(momentum[None, :, view])[0].detach() for view in (0, 1)]
    return sum((slow_info_nce(queries[q], keys[k], temperature, 0) for q, k in pairs), torch.zeros(()))


def test_the_loss_is_that_of_the_slow_loop() -> None:
    """Short finds long and long finds short; the online branch makes queries, the other keys: values and gradients."""
    torch.manual_seed(0)
    task, one = LSMCL(MODEL, TOKENS, VIEWS), batch(0)
    with torch.no_grad():
        for weight in (*task.momentum_encoder.parameters(), *task.momentum_projector.parameters()):
            weight += 0.1 * torch.randn_like(weight)
    learning = [weight for weight in task.parameters() if weight.requires_grad]

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, learning)])

    fast, slow = task(one)["loss"], slow_loss(task, one, ((1, 0), (0, 1)))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    expected = gradient(slow)
    # Batch normalisation of four clips enlarges what rounding leaves.
    assert (gradient(fast) - expected).norm() < 1e-3 * expected.norm()
    for wrong in (((0, 0), (1, 1)), ((1, 0), (1, 0)), ((0, 1), (0, 1))):
        assert (slow_loss(task, one, wrong) - fast).abs() > 1e-3
        assert (gradient(slow_loss(task, one, wrong)) - expected).norm() > 0.1 * expected.norm()


def test_a_mask_may_empty_a_frame() -> None:
    task = LSMCL(MODEL, replace(TOKENS, mask_ratio=0.9))
    patches = LSMCL(MODEL, replace(TASK, mask_ratio=0.9))
    emptied = 0
    for step in range(10):
        keep_BK = task._mask(batch(step), "long")
        assert keep_BK is not None
        assert keep_BK.shape == (4, 5)
        assert (keep_BK.diff(dim=1) > 0).all()
        emptied += sum(len(set((row // 16).tolist())) < 3 for row in keep_BK)
        keep_BUK = patches._mask(batch(step), "long")
        assert keep_BUK is not None
        assert keep_BUK.shape == (4, 3, 2)
    assert emptied > 0


def calls(module: nn.Module) -> list[int]:
    """Count the frames that a backbone encodes from now on."""
    seen: list[int] = []
    module.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[0] * inputs[0].shape[1]))
    return seen


@pytest.mark.parametrize("mask_on", ["patches", "tokens"])
def test_a_frozen_backbone_encodes_each_frame_once_for_both_branches(mask_on: Any) -> None:
    task = LSMCL(FROZEN, replace(TASK, mask_on=mask_on))
    online, momentum = calls(task.encoder.backbone), calls(task.momentum_encoder.backbone)
    task(batch(0))["loss"].backward()
    assert (online, momentum) == ([2 * 4 * 3], [])
    learning = LSMCL(MODEL, replace(TASK, mask_on=mask_on))
    online, momentum = calls(learning.encoder.backbone), calls(learning.momentum_encoder.backbone)
    learning(batch(0))
    assert (online, momentum) == ([24], [24])


@pytest.mark.parametrize("model", [MODEL, FROZEN, replace(FROZEN, decoder=DecoderConfig(name="tsn"))])
def test_patches_have_the_very_values_of_two_encodings(model: ModelConfig) -> None:
    """As `VideoModel.encode` of each branch on frames and patches that stay gives them, step after step."""
    task = LSMCL(model, TASK, VIEWS).train()
    optimizer = build_optimizer(task, OptimConfig(lr=1e-2))
    for step in range(3):
        one = batch(step)
        assert one.short is not None
        frames = torch.cat([augment(one.long, one.seeds, "long", VIEWS), augment(one.short, one.seeds, "short", VIEWS)])
        keep = torch.cat([mask for v in ("long", "short") if (mask := task._mask(one, v)) is not None])
        seeds = torch.cat([one.seeds, ~one.seeds])
        for branch, found in ((task.encoder, task.encode(one)), (task.momentum_encoder, task.targets(one))):
            plain = branch.encode(frames, seeds, keep).features_BD
            assert torch.equal(found["features"], torch.stack(plain.chunk(2), 1))
        task(one)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.after_step(step / 3)
    if model.backbone.frozen:
        pair = zip(task.encoder.backbone.parameters(), task.momentum_encoder.backbone.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pair)


def test_cached_tokens_give_the_loss_and_gradient_of_frames() -> None:
    task = LSMCL(FROZEN, TOKENS)
    one = batch(0)
    assert one.short is not None
    with torch.no_grad():
        long, short = (task.encoder.backbone(x).unflatten(1, (3, 16)) for x in (one.long, one.short))
    gradients = []
    for clips in (one, replace(one, long=long, short=short), replace(one, long=long.half(), short=short.half())):
        loss = task(clips)["loss"]
        weights = [p for p in task.parameters() if p.requires_grad]
        gradients.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    frames, tokens, halves = (torch.cat([values.flatten() for values in found]) for found in gradients)
    assert torch.equal(frames, tokens)
    assert float((halves - frames).norm() / frames.norm()) < 0.02


def test_patches_of_cached_tokens_cannot_be_masked() -> None:
    one = replace(batch(0), long=torch.zeros(4, 3, 16, 16).half(), short=torch.zeros(4, 3, 16, 16).half())
    with pytest.raises(ValueError, match=r"lsmcl.mask_on is 'patches': tokens are of whole frames"):
        LSMCL(FROZEN, TASK)(one)
