from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from s5.config import LSMCLConfig, OptimConfig, ViewsConfig
from s5.models.backbone import Backbone
from s5.tasks.lsmcl import LSMCL, Head, embedding_spread, info_nce
from s5.training.optim import build_optimizer
from tests.s5.toys import MODEL, TASK, batch


def slow_info_nce(query_BD: Tensor, key_GD: Tensor, temperature: float, first: int) -> Tensor:
    """Equation by equation: -log of the positive's share among all keys, one query at a time."""
    total = torch.zeros((), dtype=query_BD.dtype)
    for i, query in enumerate(query_BD):
        scores = [torch.cosine_similarity(query, key, dim=0) / temperature for key in key_GD]
        total = total - torch.log(scores[first + i].exp() / torch.stack(scores).exp().sum())
    return total / len(query_BD) * 2 * temperature


@pytest.mark.parametrize("first", [0, 3])
def test_info_nce_equals_the_slow_loop(first: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8)
    fast, _ = info_nce(query, key, 0.2, first)
    (fast_gradient,) = torch.autograd.grad(fast, query)
    slow = slow_info_nce(query, key, 0.2, first)
    (slow_gradient,) = torch.autograd.grad(slow, query)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast_gradient, slow_gradient)


def test_info_nce_of_identical_keys_is_chance() -> None:
    loss, _ = info_nce(torch.randn(4, 8), torch.ones(4, 8), 1.0)
    assert float(loss) == pytest.approx(2 * math.log(4))


def test_a_head_normalises_each_view_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    heads = [Head([8, 16, 16, 4], last_affine=True).double() for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    x_VBD = torch.randn(2, 5, 8, dtype=torch.double) * torch.tensor([1.0, 3.0]).double()[:, None, None]
    together = heads[0](x_VBD)
    alone = torch.stack([heads[1](x_BD[None])[0] for x_BD in x_VBD])
    torch.testing.assert_close(together, alone)
    gradients = [
        torch.autograd.grad(y.sin().sum(), list(head.parameters()))
        for y, head in zip((together, alone), heads, strict=True)
    ]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(heads[0].state_dict(), heads[1].state_dict())


def test_embedding_spread_tells_collapse_from_random_directions() -> None:
    torch.manual_seed(0)
    assert float(embedding_spread(torch.randn(4096, 64))) == pytest.approx(1, abs=0.02)
    assert float(embedding_spread(torch.ones(16, 64) * 3)) == pytest.approx(0, abs=1e-5)


def test_long_and_short_clips_play_both_parts() -> None:
    """Swapping the two clips leaves the loss as it is: each serves as query and as key."""
    torch.manual_seed(0)
    task = LSMCL(MODEL, replace(TASK, mask_ratio=0.0)).eval()
    one = batch(0)
    assert one.short is not None
    two = replace(one, long=one.short, short=one.long)
    torch.testing.assert_close(task(one)["loss"], task(two)["loss"])


def test_momentum_branch_has_no_gradient_and_follows() -> None:
    torch.manual_seed(0)
    task = LSMCL(MODEL, replace(TASK, momentum=0.9))
    optimizer = build_optimizer(task, OptimConfig(lr=1e-2))
    before = {name: p.clone() for name, p in task.momentum_encoder.named_parameters()}
    task(batch(0))["loss"].backward()
    assert all(p.grad is None for p in task.momentum_encoder.parameters())
    assert all(p.grad is not None for p in task.encoder.parameters())
    optimizer.step()
    assert task.after_step(0.0) == {"momentum": pytest.approx(0.9)}
    online = dict(task.encoder.named_parameters())
    for name, average in task.momentum_encoder.named_parameters():
        torch.testing.assert_close(average, 0.9 * before[name] + 0.1 * online[name], msg=name)
    assert task.after_step(1.0)["momentum"] == pytest.approx(1.0)


def test_both_branches_of_lsmcl_start_from_the_weights_shipped() -> None:
    state = Backbone(MODEL.backbone).vit.state_dict()
    task = LSMCL(MODEL, TASK)
    task.load_backbone(state)
    for branch in (task.encoder, task.momentum_encoder):
        assert all(torch.equal(value, state[key]) for key, value in branch.backbone.vit.state_dict().items())


def test_pretraining_keeps_all_tokens_and_the_checkpoint_says_so() -> None:
    task = LSMCL(MODEL, TASK)
    assert task.encoder.config.decoder.selection.generator == "none"
    assert not any("selection" in name for name, _ in task.named_parameters())


def test_masked_patches_cannot_change_the_loss() -> None:
    """What masking hides is not seen at all: noise in a hidden patch leaves loss and gradient as they are."""
    torch.manual_seed(0)
    task = LSMCL(MODEL, TASK).eval()
    one = batch(0)
    keep_BUK = task._mask(one, "long")
    assert keep_BUK is not None
    hidden = next(i for i in range(task.encoder.backbone.patches) if i not in keep_BUK[0, 0].tolist())
    row, column = divmod(hidden, 4)
    long = one.long.clone()
    long[0, 0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 255
    assert not torch.equal(long, one.long)
    assert torch.equal(task(one)["loss"], task(replace(one, long=long))["loss"])


def test_tubelets_are_masked_as_wholes_and_train() -> None:
    task = LSMCL(replace(MODEL, backbone=replace(MODEL.backbone, tubelet=2)), TASK)
    one = batch(0, frames=4)
    keep_BUK = task._mask(one, "long")
    assert keep_BUK is not None
    assert keep_BUK.shape == (4, 2, 8)
    task(one)["loss"].backward()
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []


def test_learns_to_match_clips_of_one_video() -> None:
    """Videos told apart by their colour: top-1 rises from chance to nearly all, without collapse."""
    torch.manual_seed(0)
    task = LSMCL(MODEL, TASK, ViewsConfig(jitter=0.1))
    optimizer = build_optimizer(task, OptimConfig(lr=1e-2))
    colours = torch.cartesian_prod(*[torch.tensor([40, 215])] * 3).view(8, 1, 1, 1, 3)
    top1 = []
    for step in range(60):
        item = batch(step, size=8)
        assert item.short is not None
        long, short = ((0.1 * x + 0.9 * colours).to(torch.uint8) for x in (item.long, item.short))
        out = task(replace(item, long=long, short=short))
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.after_step(step / 60)
        top1.append(float(out["top1"]))
    assert sum(top1[:3]) / 3 < 0.5
    assert sum(top1[-5:]) / 5 > 0.9
    assert float(out["embedding_spread"]) > 0.3


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"lsmcl.mask_ratio is 1.0: give a value in \[0, 1\)"):
        LSMCLConfig(mask_ratio=1.0)
