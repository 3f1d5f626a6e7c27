"""What becomes of the clips of all workers: an order, failures and one result a video."""

from __future__ import annotations

import math

import pytest
import torch

from s5.batch import ClipBatch
from s5.errors import Failure
from s5.evaluation import inference
from s5.evaluation.inference import ClipOutputs


def _outputs(names: list[str], failures: list[Failure]) -> ClipOutputs:
    """Return outputs whose label is the video's letter and whose values are all different."""
    torch.manual_seed(len(names))
    labels = torch.tensor([ord(name) for name in names])
    return ClipOutputs(names, torch.randn(len(names), 3).softmax(-1), labels, labels / 2, failures)


def test_a_video_gets_the_class_of_the_sum_of_its_probabilities() -> None:
    found = _outputs(["b", "a", "a", "c", "b", "a"], [])
    videos = inference.by_video(found)
    assert videos.video_ids == ["b", "a", "c"]
    for row, name in enumerate(videos.video_ids):
        total = [
            math.fsum(float(v[k]) for n, v in zip(found.video_ids, found.values, strict=True) if n == name)
            for k in range(3)
        ]
        assert int(videos.values[row].argmax()) == total.index(max(total))
        torch.testing.assert_close(videos.values[row] * found.video_ids.count(name), torch.tensor(total))
    assert videos.labels.tolist() == [ord(name) for name in "bac"]
    assert videos.targets.tolist() == [ord(name) / 2 for name in "bac"]


def test_the_clips_of_two_workers_are_those_of_one() -> None:
    whole = inference.merge([_outputs(["a", "a", "b", "c"], [])])
    parts = [
        ClipOutputs([whole.video_ids[i] for i in rows], whole.values[rows], whole.labels[rows], whole.targets[rows], [])
        for rows in ([2], [3, 0, 1])
    ]
    merged = inference.merge(parts)
    assert merged.video_ids == whole.video_ids
    assert torch.equal(merged.values, whole.values)


def test_a_video_of_which_a_part_fails_is_one_failure_and_has_no_clips() -> None:
    parts = [_outputs(["b", "b", "a"], [Failure("b", "b.mp4", "cut"), Failure("b", "b.mp4", "slow")]), _outputs([], [])]
    merged = inference.merge(parts)
    assert merged.video_ids == ["a"]
    assert merged.labels.tolist() == [ord("a")]
    assert merged.failures == [Failure("b", "b.mp4", "cut")]
    nothing = inference.merge([_outputs(["b"], [Failure("b", "b.mp4", "cut")])])
    assert (nothing.video_ids, len(nothing.failures), nothing.values.numel()) == ([], 1, 0)


@pytest.mark.parametrize("videos", [1, 2, 5, 100])
def test_parts_have_all_clips_of_their_videos_and_the_failures_before_them(videos: int) -> None:
    names = [name for number in range(9) for name in [f"v{number}"] * (1 + number % 4)]
    batches = [
        ClipBatch(
            step=0,
            epoch=0,
            video_ids=names[first : first + 4],
            long=torch.full((len(names[first : first + 4]), 2, 8, 8, 3), first, dtype=torch.uint8),
            short=None,
            seeds=torch.arange(first, min(first + 4, len(names))),
            labels=torch.arange(first, min(first + 4, len(names))),
            targets=torch.zeros(len(names[first : first + 4])),
            failures=[Failure(f"x{first}", "", "cut")],
        )
        for first in range(0, len(names), 4)
    ]

    def output(batch: ClipBatch) -> torch.Tensor:
        return batch.seeds[:, None] * torch.ones(2)

    whole = inference.run(output, batches, torch.device("cpu"), ["v3"])
    parts = list(inference.run_in_parts(output, batches, torch.device("cpu"), videos, ["v3"]))
    again = inference.joined(parts)
    assert again.video_ids == whole.video_ids == names
    assert torch.equal(again.values, whole.values)
    assert torch.equal(again.labels, whole.labels)
    assert again.failures == whole.failures
    assert [frame is None for frame in again.thumbnails] == [name != "v3" for name in names]
    owners = [set(part.video_ids) for part in parts]
    assert sum(map(len, owners)) == 9
    assert all(len(each) >= videos for each in owners[:-1])
    assert (len(parts) > 1) == (videos < 9)
