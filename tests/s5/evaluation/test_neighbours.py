from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from s5.evaluation.neighbours import nearest, nearest_of, nearest_of_reference, vote


@pytest.mark.parametrize("rows", [(1, 1), (7, 5), (64, 1000), (1000, 64)])
@pytest.mark.parametrize("k", [1, 10, 90])
@pytest.mark.parametrize("grouped", [False, True])
def test_blocks_find_what_the_full_comparison_finds(rows: tuple[int, int], k: int, grouped: bool) -> None:
    queries, examples = (F.normalize(torch.randn(count, 12), dim=-1) for count in (53, 91))
    groups = (torch.arange(53) % 30, torch.arange(91)) if grouped else (None, None)
    index, similarity = nearest_of(queries, examples, k, *groups, rows=rows)
    full_index, full_similarity = nearest_of_reference(queries, examples, k, *groups)
    torch.testing.assert_close(similarity, full_similarity, rtol=0, atol=1e-6)
    assert torch.equal(index, full_index)


def test_equal_examples_of_several_blocks_come_in_their_order() -> None:
    index, _ = nearest_of(torch.ones(1, 1), torch.ones(9, 1), 3, rows=(1, 1))
    assert index.tolist() == [[0, 1, 2]]


def test_nearest_of_a_clip_is_another_one() -> None:
    features = torch.randn(40, 6)
    index, similarity = nearest(features, torch.arange(40), 50)
    assert index.shape == similarity.shape == (40, 39)
    assert not (index == torch.arange(40)[:, None]).any()


def test_neighbours_vote_by_their_similarity() -> None:
    index, similarity = torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.tensor([[0.9, 0.1, 0.1], [0.5, 0.5, 0.5]])
    assert vote(index, similarity, torch.tensor([1, 0, 0])).tolist() == [1, 0]
