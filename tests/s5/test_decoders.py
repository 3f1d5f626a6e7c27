from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from s5 import noise
from s5.blocks import Block, drop_channels, pool_pairs
from s5.config import DecoderConfig, DecoderName, SelectionConfig, SSMConfig
from s5.decoders import Pyramid


def pyramid(name: DecoderName = "s5", width: int = 16, selection: SelectionConfig | None = None) -> Pyramid:
    torch.manual_seed(0)
    config = DecoderConfig(
        name=name, ssm=SSMConfig(state=8), selection=selection or SelectionConfig(), blocks=2, dropout=0.2
    )
    return Pyramid(config, width)


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
@pytest.mark.parametrize("name", ["s5", "vis4mer"])
@pytest.mark.parametrize("training", [True, False])
def test_shapes(name: DecoderName, length: int, training: bool) -> None:
    decoder = pyramid(name).train(training)
    out = decoder(tokens(length=length))
    assert out.features_BD.shape == (4, decoder.out_width) == (4, 4)
    if name == "vis4mer":
        assert out.kept == []
        assert out.entropy is None
    else:
        assert [indices.shape for indices in out.kept] == [(4, max(1, round(length / 2)))]
        assert 0 <= float(out.entropy) <= 1.001


def test_block_is_the_published_sequence_of_operations() -> None:
    decoder = pyramid("vis4mer").eval()
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


def test_generator_none_is_vis4mer() -> None:
    off, plain = pyramid(selection=SelectionConfig(generator="none")), pyramid("vis4mer")
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


@pytest.mark.parametrize("kind", ["s4d", "s4"])
def test_noise_belongs_to_the_sample(kind: Literal["s4d", "s4"]) -> None:
    torch.manual_seed(0)
    decoder = Pyramid(DecoderConfig(blocks=2, ssm=SSMConfig(kind=kind, state=8)), 16).double()
    x, seeds = tokens().double(), noise.fold(torch.arange(4), "test")
    whole = decoder(x, seeds)
    torch.manual_seed(5)
    halves = [decoder(x[part], seeds[part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole.features_BD, torch.cat([half.features_BD for half in halves]))
    assert torch.equal(whole.kept[0], torch.cat([half.kept[0] for half in halves]))
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    together = torch.autograd.grad(whole.features_BD.square().sum(), parameters)
    apart = torch.autograd.grad(sum(half.features_BD.square().sum() for half in halves), parameters)
    for first, second in zip(together, apart, strict=True):
        torch.testing.assert_close(first, second)
    assert not torch.equal(whole.features_BD, decoder(x, seeds + 1).features_BD)


def test_without_seeds_torch_decides() -> None:
    decoder, x = pyramid(), tokens()
    torch.manual_seed(7)
    first, second = decoder(x), decoder(x)
    assert not torch.equal(first.features_BD, second.features_BD)
    torch.manual_seed(7)
    assert torch.equal(first.features_BD, decoder(x).features_BD)


def test_evaluation_is_deterministic() -> None:
    decoder, x = pyramid().eval(), tokens()
    assert torch.equal(decoder(x).features_BD, decoder(x, torch.arange(4)).features_BD)


@pytest.mark.parametrize("generator", ["linear", "transformer"])
def test_every_parameter_but_the_average_learns(generator: Literal["linear", "transformer"]) -> None:
    decoder = pyramid(selection=SelectionConfig(keep_ratio=(0.5, 0.5), generator=generator))
    decoder(tokens()).features_BD.square().sum().backward()
    for name, parameter in decoder.named_parameters():
        averaged = ".momentum." in name
        assert parameter.requires_grad != averaged
        if not averaged:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_momentum_follows_training() -> None:
    decoder = pyramid(selection=SelectionConfig(momentum=0.5))
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


def test_bf16_autocast() -> None:
    decoder = pyramid().eval()
    exact = decoder(tokens()).features_BD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = decoder(tokens()).features_BD
        assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()
        decoder.train()
        features = decoder(tokens().bfloat16()).features_BD
    features.float().square().sum().backward()
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


def test_refuses_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"width is 18: .*multiple of 4"):
        pyramid(width=18)
    for shape in ((4, 0, 16), (4, 30, 8), (4, 16)):
        with pytest.raises(ValueError, match="tokens have shape"):
            pyramid()(torch.zeros(shape))


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    decoder, seeds = pyramid(), torch.arange(4)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    expected = decoder(tokens(), seeds)
    torch.testing.assert_close(compiled(tokens(), seeds).features_BD, expected.features_BD)
    torch._dynamo.config.error_on_recompile = True
    try:
        decoder.set_progress(0.5)
        compiled(tokens(), seeds)
    finally:
        torch._dynamo.config.error_on_recompile = False


def needle_clips(seeds_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """64 tokens of noise, one of which is marked and carries the class; class and place follow from the seed."""
    batch = len(seeds_B)
    labels = (noise.uniform(seeds_B, "label") * 4).long()
    places = (noise.uniform(seeds_B, "place") * 64).long()
    x = gauss(seeds_B, 64, 16)
    x[torch.arange(batch), places] = 4 * nn.functional.one_hot(labels, 16).float()
    x[torch.arange(batch), places, 8] = 8.0
    return x, labels, places


def gauss(seeds_B: Tensor, *shape: int) -> Tensor:
    return torch.special.ndtri(noise.uniform(seeds_B, "gauss", *shape).clamp(1e-6, 1 - 1e-6))


@pytest.mark.slow
def test_selection_learns_to_keep_the_one_token_that_matters() -> None:
    torch.manual_seed(0)
    selection = SelectionConfig(keep_ratio=(4 / 64,), momentum=0.9)
    decoder = Pyramid(DecoderConfig(blocks=1, dropout=0.0, ssm=SSMConfig(state=8), selection=selection), 16)
    head = nn.Linear(decoder.out_width, 4)
    optimizer = torch.optim.Adam([p for p in (*decoder.parameters(), *head.parameters()) if p.requires_grad], lr=1e-2)

    def kept_share(seeds: Tensor) -> float:
        x, _, places = needle_clips(seeds)
        with torch.no_grad():
            kept = decoder.eval()(x).kept[0]
        return float((kept == places[:, None]).any(1).float().mean())

    held_out = torch.arange(1_000_000, 1_000_256)
    before = kept_share(held_out)
    for step in range(600):
        seeds = torch.arange(64 * step, 64 * step + 64)
        x, labels, _ = needle_clips(seeds)
        out = decoder.train()(x, seeds)
        loss = nn.functional.cross_entropy(head(out.features_BD), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decoder.update_momentum()
    after = kept_share(held_out)
    assert before < 0.5
    assert after > 0.75, (before, after, loss.item())
