"""Settings of the step change nothing but speed and memory: each is compared with the plain one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from s5.batch import ClipBatch
from s5.config import DecoderConfig, LoopConfig, ModelConfig, OptimConfig
from s5.models.backbone import Backbone
from s5.models.decoders import build_decoder
from s5.models.video_model import VideoModel
from s5.tasks.lsmcl import LSMCL, info_nce
from s5.tasks.supervised import Supervised
from s5.training.optim import build_optimizer
from s5.training.step import Stepper, backward_in_parts, set_recompute_and_compile
from tests.s5.toys import MODEL, TASK, batch

CPU = torch.device("cpu")
SIZE, STEPS = 6, 4
Make = Callable[[], LSMCL | Supervised]


def lsmcl() -> LSMCL:
    torch.manual_seed(0)
    return LSMCL(MODEL, TASK).train()


def classifier() -> Supervised:
    torch.manual_seed(0)
    return Supervised(VideoModel(MODEL, 2), "class").train()


def regression() -> Supervised:
    torch.manual_seed(0)
    return Supervised(VideoModel(MODEL, 1), "regression").train()


def gradients(task: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


class SavedBytes:
    """Bytes that graphs hold for their backward passes, and the most of it so far."""

    def __init__(self) -> None:
        self.now = self.most = 0

    class Held:
        def __init__(self, owner: SavedBytes, value: Tensor) -> None:
            self.owner, self.value = owner, value
            owner.now += value.nbytes
            owner.most = max(owner.most, owner.now)

        def __del__(self) -> None:
            self.owner.now -= self.value.nbytes

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(lambda x: self.Held(self, x), lambda held: held.value)


def trained(make: Make, *, optim: OptimConfig | None = None, **loop: object) -> tuple[list[float], nn.Module]:
    """Return the losses and the task after some steps of one setting."""
    task = make()
    config = replace(LoopConfig(), **loop)  # type: ignore[arg-type]
    optimizer = build_optimizer(task, optim or OptimConfig(lr=1e-3))
    set_recompute_and_compile(task, config)
    stepper = Stepper(task, optimizer, 1.0, config, CPU)
    losses = []
    for step in range(STEPS):
        scalars, taken = stepper(batch(step, SIZE))
        assert taken
        task.after_step(step / STEPS)
        losses.append(float(scalars["loss"].detach()))
    return losses, task


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
@pytest.mark.parametrize("make", [lsmcl, classifier, regression])
def test_parts_have_the_gradient_and_the_scalars_of_the_whole(make: Make, rows: int) -> None:
    whole, parted = make(), make()
    expected = whole(batch(0, SIZE))
    expected["loss"].backward()
    scalars = backward_in_parts(parted, batch(0, SIZE), rows, nullcontext, GradScaler("cpu", enabled=False))
    torch.testing.assert_close(scalars, expected)
    assert gradients(parted).keys() == gradients(whole).keys()
    torch.testing.assert_close(gradients(parted), gradients(whole), rtol=1e-4, atol=1e-5)
    # Running statistics see the whole batch once.
    torch.testing.assert_close(dict(parted.named_buffers()), dict(whole.named_buffers()))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 3e-3)])
@pytest.mark.parametrize("make", [lsmcl, classifier])
def test_parts_have_the_gradient_of_the_whole_in_half_precision(make: Make, precision: str, tolerance: float) -> None:
    """Autocast covers every pass of the parts as it covers the whole, and the loss is scaled once."""
    whole, parted = (half_step(make, precision, micro_batch=rows)[1] for rows in (0, 2))
    assert (whole - parted).norm() < tolerance * whole.norm()
    assert not torch.equal(whole, parted)


def test_parts_work_where_no_weight_is_trained_in_front_of_the_heads() -> None:
    frozen = ModelConfig(backbone=replace(MODEL.backbone, frozen=True), decoder=DecoderConfig(name="tsn"))
    found = []
    for rows in (0, 2):
        torch.manual_seed(0)
        task = LSMCL(frozen, TASK).train()
        optimizer = build_optimizer(task, OptimConfig(lr=1e-3))
        Stepper(task, optimizer, 1.0, LoopConfig(micro_batch=rows), CPU)(batch(0, SIZE))
        found.append(task.state_dict())
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(("rows", "passes"), [(0, 1), (SIZE, 1), (100, 1), (4, 4)])
def test_a_share_that_fits_is_computed_at_once(rows: int, passes: int) -> None:
    task, seen = classifier(), []
    task.model.backbone.register_forward_hook(lambda *_: seen.append(1))
    Stepper(task, build_optimizer(task, OptimConfig()), 1.0, LoopConfig(micro_batch=rows), CPU)(batch(0, SIZE))
    assert len(seen) == passes


class Infinite(Supervised):
    """Its loss is infinite and its gradient is not."""

    def forward(self, item: ClipBatch) -> dict[str, Tensor]:
        scalars = super().forward(item)
        return scalars | {"loss": scalars["loss"] + torch.inf}


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is() -> None:
    task = Infinite(VideoModel(MODEL, 2), "class").train()
    assert all(g.isfinite().all() for g in torch.autograd.grad(task(batch(0))["loss"], task.model.head.parameters()))
    _, taken = Stepper(task, build_optimizer(task, OptimConfig()), 1.0, LoopConfig(), CPU)(batch(0))
    assert not taken


def test_similarities_are_in_fp32_under_autocast() -> None:
    """Rounded to bf16, many of them would tie."""
    query, key = torch.randn(8, 16), torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, similarity = info_nce(query, key, 0.2)
    expected_loss, expected = info_nce(query, key, 0.2)
    assert torch.equal(similarity, expected)
    assert torch.equal(loss, expected_loss)


def test_parts_hold_the_graph_of_some_rows_at_a_time() -> None:
    most = []
    for rows in (SIZE, 2):
        saved = SavedBytes()
        with saved.hooks():
            backward_in_parts(lsmcl(), batch(0, SIZE), rows, nullcontext, GradScaler("cpu", enabled=False))
        most.append(saved.most)
    assert most[1] < 0.5 * most[0]


@pytest.mark.parametrize("make", [lsmcl, classifier])
def test_recomputing_changes_no_value_and_holds_less(make: Make) -> None:
    deep = replace(MODEL, backbone=replace(MODEL.backbone, depth=4))
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        task = LSMCL(deep, TASK) if make is lsmcl else Supervised(VideoModel(deep, 2), "class")
        set_recompute_and_compile(task.train(), LoopConfig(recompute=recompute))
        saved = SavedBytes()
        with saved.hooks():
            task(batch(0, SIZE))["loss"].backward()
        found.append((saved.most, gradients(task)))
    (plain_bytes, plain), (bytes_, recomputed) = found
    torch.testing.assert_close(recomputed, plain)
    assert bytes_ < 0.6 * plain_bytes


def half_step(make: Make, precision: str, micro_batch: int = 0) -> tuple[float, Tensor, nn.Module]:
    """Return the loss of a first step, its gradient in one piece, and the task after it."""
    task = make()
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=1.0)
    config = LoopConfig(precision=precision, micro_batch=micro_batch)  # type: ignore[arg-type]
    stepper = Stepper(task, optimizer, 0.0, config, CPU)
    # The usual one overflows at this size.
    stepper.scaler = GradScaler("cpu", init_scale=2.0**6, enabled=precision == "fp16")
    before = [p.detach().clone() for p in stepper.trained]
    scalars, taken = stepper(batch(0, SIZE))
    assert taken
    moved = torch.cat([(old - new.detach()).flatten() for old, new in zip(before, stepper.trained, strict=True)])
    task.after_step(0.5)
    return float(scalars["loss"].detach()), moved, task


def test_decoders_recompute_their_blocks_too() -> None:
    most = []
    for recompute in (False, True):
        torch.manual_seed(0)
        decoder = build_decoder(DecoderConfig(name="lst", blocks=2), 32).train()
        set_recompute_and_compile(decoder, LoopConfig(recompute=recompute))
        saved = SavedBytes()
        with saved.hooks():
            features = decoder(torch.randn(2, 40, 32), torch.arange(2)).features_BD
            held = saved.now
            features.sum().backward()
        most.append(held)
    assert most[1] < 0.6 * most[0]


@pytest.mark.parametrize(("precision", "tolerance", "least_cosine"), [("bf16", 0.02, 0.9), ("fp16", 0.003, 0.999)])
@pytest.mark.parametrize("make", [lsmcl, classifier])
def test_half_precision_stays_close_and_keeps_weights_in_fp32(
    make: Make, precision: str, tolerance: float, least_cosine: float
) -> None:
    expected, gradient, _ = half_step(make, "fp32")
    loss, half_gradient, task = half_step(make, precision)
    assert loss == pytest.approx(expected, rel=tolerance)
    assert loss != expected
    assert torch.cosine_similarity(gradient, half_gradient, dim=0) > least_cosine
    # The momentum branch is a part of the state: its average would stand still in half precision.
    assert {value.dtype for value in task.state_dict().values() if value.is_floating_point()} == {torch.float32}


def test_fp16_lowers_its_scale_instead_of_taking_a_step_that_overflows() -> None:
    task = lsmcl()
    stepper = Stepper(task, build_optimizer(task, OptimConfig()), 1.0, LoopConfig(precision="fp16"), CPU)
    stepper.scaler = GradScaler("cpu", init_scale=2.0**40)
    before = {name: value.clone() for name, value in task.named_parameters()}
    _, taken = stepper(batch(0, SIZE))
    assert (taken, stepper.seeks_scale, stepper.scaler.get_scale()) == (False, True, 2.0**39)
    torch.testing.assert_close(dict(task.named_parameters()), before, rtol=0, atol=0)
    stepper.scaler.update(2.0**-1)
    assert not stepper.seeks_scale


@pytest.mark.parametrize("make", [lsmcl, classifier])
def test_one_kernel_updates_weights_as_many_do(make: Make) -> None:
    for fused in (True, False):
        assert build_optimizer(make(), OptimConfig(fused=fused)).defaults["fused"] == fused
    one, _ = trained(make)
    plain, _ = trained(make, optim=OptimConfig(lr=1e-3, fused=False))
    assert one == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("limit", [0.25, 100.0])
def test_the_gradient_is_clipped_to_its_norm(limit: float) -> None:
    task = lsmcl()
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=1.0)
    before = {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}
    scalars, _ = Stepper(task, optimizer, limit, LoopConfig(), CPU)(batch(0, SIZE))
    moved = [(p.detach() - before[name]).square().sum() for name, p in task.named_parameters() if name in before]
    norm = float(scalars["gradient_norm"])
    assert 0.25 < norm < 100
    assert math.sqrt(sum(map(float, moved))) == pytest.approx(min(limit, norm), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.drill, pytest.mark.skipif(shutil.which("c++") is None, reason="a CPU needs c++")],
        ),
    ],
)
def test_compiling_changes_no_value(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own compiler, whose code for a decoder another test compares, or by tracing alone, within seconds."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    expected, plain = trained(lsmcl)
    losses, compiled = trained(lsmcl, compile=True)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert sum(module._compiled_call_impl is not None for module in compiled.modules()) == 4
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_frames_reach_the_patch_projection_channels_last() -> None:
    """As they are decoded, so that no setting has to ask for it."""
    seen: list[Tensor] = []
    backbone = Backbone(MODEL.backbone)
    backbone.vit.patch_embed.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    backbone(batch(0, SIZE).long)
    assert seen[0].shape[1] == 3
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
