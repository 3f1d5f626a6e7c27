from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor, nn

from s5 import rng
from s5.config import AttentionConfig, DecoderConfig, DecoderName, ModelConfig, OptimConfig, SelectionConfig, SSMConfig
from s5.models.blocks import Block, drop_channels, pool_pairs
from s5.models.decoders import Consensus, Pyramid, build_decoder
from s5.models.merging import merge
from s5.models.video_model import VideoModel, check_model
from s5.tasks.lsmcl import LSMCL
from s5.tasks.supervised import Supervised
from s5.training.optim import parameter_groups
from tests.s5.toys import MODEL, TASK, batch, decided

NAMES: tuple[DecoderName, ...] = get_args(DecoderName)
PYRAMIDS = [name for name in NAMES if name != "tsn"]
SHORTENING = ("s5", "vtm")
WITH_POSITIONS: list[DecoderName] = ["lst", "performer", "orthoformer"]
ATTENTION = AttentionConfig(heads=4, features=8, prototypes=5)


def build(name: DecoderName, width: int = 16, selection: SelectionConfig | None = None) -> Pyramid | Consensus:
    torch.manual_seed(0)
    config = DecoderConfig(
        name=name,
        ssm=SSMConfig(state=8),
        attention=ATTENTION,
        selection=selection or SelectionConfig(features="s4"),
        blocks=2,
        dropout=0.2,
        positions=30,
    )
    return decided(build_decoder(config, width))


def pyramid(name: DecoderName = "s5", width: int = 16, selection: SelectionConfig | None = None) -> Pyramid:
    decoder = build(name, width, selection)
    assert isinstance(decoder, Pyramid)
    return decoder


def tokens(batch: int = 4, length: int = 30, width: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, width)


def test_pool_pairs() -> None:
    x = torch.arange(5.0)[None, :, None]
    assert pool_pairs(x)[0, :, 0].tolist() == [0.5, 2.5, 4.0]
    assert pool_pairs(x[:, :4])[0, :, 0].tolist() == [0.5, 2.5]
    assert pool_pairs(x[:, 3:4])[0, :, 0].tolist() == [3.0]


def test_dropout_is_tied_over_the_sequence() -> None:
    dropped = drop_channels(torch.ones(200, 7, 50), 0.2, torch.arange(200), "dropout")
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert abs(float((dropped == 0).float().mean()) - 0.2) < 0.02


@pytest.mark.parametrize("length", [1, 2, 3, 30])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_shapes(name: DecoderName, length: int, training: bool) -> None:
    decoder = build(name).train(training)
    out = decoder(tokens(length=length))
    assert out.features_BD.shape == (4, decoder.out_width) == (4, 16 if name == "tsn" else 4)
    if name in SHORTENING:
        kept = max(1, round(length / 2))
        assert [indices.shape for indices in out.kept] == [(4, kept)]
        assert out.keep_ratio == kept / length
        assert 0 <= float(out.selection["entropy"]) <= 1.001
        assert ("overlap" in out.selection) == (training and name == "s5")
    else:
        assert out.kept == []
        assert out.keep_ratio == 1
        assert out.selection == {}


@pytest.mark.parametrize("name", ["vis4mer", "lst"])
def test_block_is_the_published_sequence_of_operations(name: DecoderName) -> None:
    decoder = pyramid(name).eval()
    if decoder.positions is not None:
        torch.nn.init.zeros_(decoder.positions)
    x = tokens(length=8)
    expected = x
    for block in decoder.blocks:
        assert isinstance(block, Block)
        y = nn.functional.layer_norm(expected, expected.shape[2:], block.norm.weight, block.norm.bias)
        y = expected + block.layer(y)
        y = nn.functional.avg_pool1d(y.transpose(1, 2), 2).transpose(1, 2)
        expected = nn.functional.gelu(block.narrow(y))
    torch.testing.assert_close(decoder(x).features_BD, expected.mean(1))


@pytest.mark.parametrize("ratios", [(0.5,), (0.5, 0.5), (1.0, 0.5)])
def test_the_first_tokens_kept_are_all_that_matters(ratios: tuple[float, ...]) -> None:
    decoder = pyramid(selection=SelectionConfig(keep_ratio=ratios)).eval()
    x = tokens()
    out = decoder(x)
    selecting = [ratio for ratio in ratios if ratio < 1]
    assert len(out.kept) == len(selecting)
    if ratios[0] < 1:
        plain = pyramid("vis4mer", selection=SelectionConfig()).eval()
        plain.load_state_dict({k: v for k, v in decoder.state_dict().items() if "selection." not in k})
        rows = torch.arange(4)[:, None]
        if len(selecting) == 1:
            torch.testing.assert_close(plain(x[rows, out.kept[0]]).features_BD, out.features_BD)


def test_vtm_is_vis4mer_on_merged_tokens() -> None:
    decoder, plain = pyramid("vtm").eval(), pyramid("vis4mer").eval()
    state = {key: value for key, value in decoder.state_dict().items() if "merging." not in key}
    plain.load_state_dict(state)
    block, x = decoder.blocks[0], tokens()
    assert isinstance(block, Block)
    assert block.merging is not None
    merged, targets = merge(x, block.merging.saliency(block.norm(x))[..., 0], 15)
    out = decoder(x)
    assert torch.equal(out.kept[0], targets)
    torch.testing.assert_close(out.features_BD, plain(merged).features_BD)


@pytest.mark.parametrize("name", SHORTENING)
def test_generator_none_is_vis4mer(name: DecoderName) -> None:
    off, plain = pyramid(name, selection=SelectionConfig(generator="none")), pyramid("vis4mer")
    assert off.state_dict().keys() == plain.state_dict().keys()
    seeds = torch.arange(4)
    assert torch.equal(off(tokens(), seeds).features_BD, plain(tokens(), seeds).features_BD)


def test_weights_without_selection_load() -> None:
    plain, selective = pyramid("vis4mer"), pyramid()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    missing, unexpected = selective.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(".selection." in key for key in missing)
    selective.reset_momentum()
    block = selective.blocks[0]
    assert isinstance(block, Block)
    assert block.selection is not None
    assert block.selection.momentum is not None
    for name, parameter in block.selection.momentum.average.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(f"blocks.0.layer.ssm.{name}"))


@pytest.mark.parametrize(("name", "kind"), [("s5", "s4"), *((name, "s4d") for name in NAMES)])
def test_noise_belongs_to_the_sample(name: DecoderName, kind: Literal["s4d", "s4"]) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(name=name, blocks=2, ssm=SSMConfig(kind=kind, state=8), attention=ATTENTION)
    decoder = build_decoder(config, 16).double()
    x, seeds = tokens().double().requires_grad_(), rng.fold(torch.arange(4), "test")
    whole = decoder(x, seeds)
    torch.manual_seed(5)
    halves = [decoder(x[part], seeds[part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole.features_BD, torch.cat([half.features_BD for half in halves]))
    if name in SHORTENING:
        assert torch.equal(whole.kept[0], torch.cat([half.kept[0] for half in halves]))
    parameters = [x, *(p for p in decoder.parameters() if p.requires_grad)]
    together = torch.autograd.grad(whole.features_BD.square().sum(), parameters)
    apart = torch.autograd.grad(sum(half.features_BD.square().sum() for half in halves), parameters)
    for first, second in zip(together, apart, strict=True):
        torch.testing.assert_close(first, second)
    assert not torch.equal(whole.features_BD, decoder(x, seeds + 1).features_BD)


@pytest.mark.parametrize("name", NAMES)
def test_without_seeds_torch_decides(name: DecoderName) -> None:
    decoder, x = build(name), tokens()
    torch.manual_seed(7)
    first, second = decoder(x), decoder(x)
    assert not torch.equal(first.features_BD, second.features_BD)
    torch.manual_seed(7)
    assert torch.equal(first.features_BD, decoder(x).features_BD)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_deterministic(name: DecoderName) -> None:
    decoder, x = build(name).eval(), tokens()
    assert torch.equal(decoder(x).features_BD, decoder(x, torch.arange(4)).features_BD)


@pytest.mark.parametrize(("name", "generator"), [("s5", "transformer"), *((name, "linear") for name in PYRAMIDS)])
def test_every_parameter_but_the_average_learns(name: DecoderName, generator: Literal["linear", "transformer"]) -> None:
    decoder = pyramid(name, selection=SelectionConfig(keep_ratio=(0.5, 0.5), generator=generator))
    decoder(tokens()).features_BD.square().sum().backward()
    for name, parameter in decoder.named_parameters():
        averaged = ".momentum." in name
        assert parameter.requires_grad != averaged
        if not averaged:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_momentum_follows_training() -> None:
    decoder = pyramid(selection=SelectionConfig(features="s4", momentum=0.5))
    block = decoder.blocks[0]
    assert isinstance(block, Block)
    assert block.selection is not None
    assert block.selection.momentum is not None
    average = block.selection.momentum.average
    before = average.C.clone()
    with torch.no_grad():
        block.layer.ssm.C.add_(1)
    decoder.update_momentum()
    torch.testing.assert_close(average.C, before + 0.5)
    decoder.set_progress(1.0)


def test_a_whole_layer_follows_and_starts_from_weights_without_selection() -> None:
    decoder = pyramid(selection=SelectionConfig(features="s4", momentum=0.5, momentum_s4="layer"))
    plain = pyramid("vis4mer")
    decoder.load_state_dict(plain.state_dict(), strict=False)
    decoder.reset_momentum()
    block = decoder.blocks[0]
    assert isinstance(block, Block)
    assert block.selection is not None
    assert block.selection.momentum is not None
    average = dict(block.selection.momentum.average.named_parameters())
    for name, online in block.layer.named_parameters():
        assert torch.equal(average[name], online)
    before = average["output.weight"].clone()
    with torch.no_grad():
        block.layer.output.weight.add_(1)
    decoder.update_momentum()
    torch.testing.assert_close(average["output.weight"], before + 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast(name: DecoderName) -> None:
    decoder = build(name).eval()
    exact = decoder(tokens()).features_BD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = decoder(tokens()).features_BD
        assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()
        decoder.train()
        x = tokens().bfloat16().requires_grad_()
        features = decoder(x).features_BD
    features.float().square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("length", [30, 17])
@pytest.mark.parametrize("name", WITH_POSITIONS)
def test_positions_are_added_frame_by_frame(name: DecoderName, length: int) -> None:
    """As many frames as tokens where nothing else is said."""
    decoder = pyramid(name).eval()
    assert decoder.positions is not None
    positions = decoder.positions.detach().clone()
    x, frames = tokens(length=length), 10 if length == 30 else None
    out = decoder(x, frames=frames).features_BD
    torch.nn.init.zeros_(decoder.positions)
    shares = torch.arange(length) // (length // frames if frames else 1)
    torch.testing.assert_close(decoder(x + positions[shares], frames=frames).features_BD, out)
    groups: list[dict[str, Any]] = parameter_groups(decoder, OptimConfig())
    (group,) = (group for group in groups if any(p is decoder.positions for p in group["params"]))
    assert group["weight_decay"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_all_decoders_but_consensus_see_the_order_of_frames(name: DecoderName) -> None:
    decoder, x = build(name).double().eval(), tokens().double()
    frames = x.unflatten(1, (10, 3))
    turned = frames.flip(1).flatten(1, 2)
    change = (decoder(x, frames=10).features_BD - decoder(turned, frames=10).features_BD).abs().max()
    assert change < 1e-12 if name == "tsn" else change > 1e-6


# --- in the model ---------------------------------------------------------------------------------------------------


def model_config(name: DecoderName) -> ModelConfig:
    return replace(MODEL, decoder=replace(MODEL.decoder, name=name, attention=ATTENTION))


def test_consensus_gives_the_average_of_the_scores_of_frames() -> None:
    torch.manual_seed(0)
    model = VideoModel(model_config("tsn"), 5).eval()
    frames = batch(0).long
    single = torch.stack([model(frames[:, [t]]).logits_BC for t in range(frames.shape[1])])
    torch.testing.assert_close(model(frames).logits_BC, single.mean(0))


@pytest.mark.parametrize("name", NAMES)
def test_every_decoder_is_pretrained_and_then_fine_tuned(name: DecoderName) -> None:
    """Every trained weight gets a gradient in both; all of the pretrained encoder is taken over."""
    torch.manual_seed(0)
    check_model(model_config(name))
    pretraining = LSMCL(model_config(name), TASK)
    pretraining(batch(0))["loss"].backward()
    assert [key for key, p in pretraining.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any("selection." in key or "merging." in key for key in pretraining.state_dict())

    model = VideoModel(model_config(name), 2)
    weights = pretraining.encoder.state_dict()
    model.load_pretrained(weights)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())
    task = Supervised(model, "class")
    task.before_step(0.5)
    out = task(batch(0))
    out["loss"].backward()
    task.after_step(0.5)
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert float(out["keep_ratio"]) == (0.5 if name in SHORTENING else 1)


def test_a_tubelet_has_one_position() -> None:
    """Three frames: three positions are needed, or one where they are one tubelet."""
    config = replace(model_config("lst"), decoder=replace(model_config("lst").decoder, positions=1))
    frames = batch(0).long
    with pytest.raises(ValueError, match=r"decoder.positions is 1: a clip has 3 frames"):
        VideoModel(config, 2)(frames)
    spanning = replace(config, backbone=replace(config.backbone, tubelet=3))
    assert VideoModel(spanning, 2)(frames).logits_BC.shape == (4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name: DecoderName) -> None:
    decoder, seeds = build(name), torch.arange(4)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    expected = decoder(tokens(), seeds)
    torch.testing.assert_close(compiled(tokens(), seeds).features_BD, expected.features_BD)
    torch._dynamo.config.error_on_recompile = True
    try:
        decoder.set_progress(0.5)
        compiled(tokens(), seeds)
    finally:
        torch._dynamo.config.error_on_recompile = False


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch's compiler needs a C++ compiler on a CPU")
def test_compiled_s5_equals_eager() -> None:
    decoder, seeds = pyramid("s5").train(), torch.arange(4)
    parameters = [p for p in decoder.parameters() if p.requires_grad]

    def gradients(features_BD: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(features_BD.square().sum(), parameters)

    compiled = torch.compile(decoder, fullgraph=True)(tokens(), seeds)
    expected = decoder(tokens(), seeds)
    assert torch.equal(compiled.kept[0], expected.kept[0])
    torch.testing.assert_close(compiled.features_BD, expected.features_BD)
    for ours, reference in zip(gradients(compiled.features_BD), gradients(expected.features_BD), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5)
