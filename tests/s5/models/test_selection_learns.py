"""The mask generator finds the tokens that tell, where it is known which ones do."""

from __future__ import annotations

import pytest
import torch

from s5.config import SelectionConfig
from tests.bench.selection import Case, train


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.drill)])
def test_the_tokens_that_tell_are_kept(seed: int) -> None:
    case = Case(name="8 tokens", tokens=8, frames=40, steps=240, selection=SelectionConfig(keep_ratio=(0.25,)))
    history: dict[int, dict[str, float]] = {}
    train(case, seed, torch.device("cpu"), history.__setitem__)
    last = history[240]
    # A random generator keeps 0.25 of each. With two of the three steps, whose order is the class, 0.67 is kept.
    assert last["telling"] > 0.6, history
    assert last["noise"] < 0.25, history
