"""What decoders refuse: settings, shapes, and numbers that are not finite, each with the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s5.config import AttentionConfig, DecoderConfig, DecoderName, SelectionConfig
from s5.models.decoders import build_decoder
from tests.s5.models.test_decoders import NAMES, PYRAMIDS, build, pyramid, tokens


def test_momentum_s4_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"selection.momentum_s4 is 'all': give convolution or layer"):
        SelectionConfig(momentum_s4="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"momentum": 0.5}, {"momentum_s4": "layer"}])
def test_settings_of_a_momentum_s4_that_is_not_there(settings: dict[str, Any]) -> None:
    for unused in (SelectionConfig(**settings), SelectionConfig(features="s4", generator="random", **settings)):
        with pytest.raises(ValueError, match=r"there is no momentum S4; give selection.features s4 and a generator"):
            unused.require_used()
    SelectionConfig(features="s4", **settings).require_used()


def test_refuses_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"width is 18: .*multiple of 4"):
        pyramid(width=18)
    for shape in ((4, 0, 16), (4, 30, 8), (4, 16)):
        with pytest.raises(ValueError, match="tokens have shape"):
            pyramid()(torch.zeros(shape))


def test_frames_that_do_not_fit_are_named() -> None:
    message = r"decoder.positions is 30: a clip has 31 frames; give at least as many positions as frames"
    with pytest.raises(ValueError, match=message):
        build("lst")(tokens(length=31))
    for name in NAMES:
        for frames in (0, 7):
            with pytest.raises(ValueError, match=rf"frames is {frames}: give a divisor of the number of tokens, 30"):
                build(name)(tokens(), frames=frames)


def test_settings_that_no_decoder_has_are_named() -> None:
    message = r"decoder.name is 'lstm': give one of s5, vis4mer, lst, performer, orthoformer, tsn, vtm"
    with pytest.raises(ValueError, match=message):
        DecoderConfig(name="lstm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"decoder.positions is 0: give at least 1"):
        DecoderConfig(positions=0)
    config = DecoderConfig(name="lst", blocks=2, attention=AttentionConfig(heads=16))
    with pytest.raises(ValueError, match=r"decoder.attention.heads is 16: give a divisor of 24"):
        build_decoder(config, 48)
    assert DecoderConfig(name="tsn", width=18).width == 18


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["s5", "lst", "vtm", "tsn"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tokens_that_are_not_finite_are_told_by_sample(name: DecoderName, value: float, training: bool) -> None:
    x = tokens()
    x[1, 3, 2] = x[3, 0, 0] = value
    with pytest.raises(FloatingPointError, match=r"input tokens have NaN or infinity in samples \[1, 3\] .*backbone"):
        build(name).train(training)(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_decoder_that_has_diverged_is_told_from_bad_tokens(name: DecoderName, training: bool) -> None:
    decoder = pyramid(name).train(training)
    with torch.no_grad():
        next(iter(decoder.blocks[-1].parameters())).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"the decoder's output .* \[0, 1, 2, 3\] .* finite: lower optim.lr"):
        decoder(tokens())
