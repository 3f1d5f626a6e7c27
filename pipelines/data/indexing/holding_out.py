"""Which training videos are held out for splits that the annotations do not have: by class or group, seed and id."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import islice

from pipelines.config import IndexConfig
from pipelines.data.annotations.shared import AnnotatedVideo, Annotations
from pipelines.data.manifest import SPLITS

BENCHMARK_VAL_SHARE = 0.1
"""Share held out for validation of a benchmark that has no such split, where the settings say nothing."""


def shares(annotations: Annotations, config: IndexConfig) -> dict[str, float]:
    """Return the shares of the training videos that are held out for the splits that the annotations do not have."""
    default = BENCHMARK_VAL_SHARE if annotations.dataset else 0.0
    wanted = {"val": default if config.val_share is None else config.val_share, "test": config.test_share}
    present = {video.split for video in annotations.videos}
    return {split: share for split, share in wanted.items() if split not in present}


def hold_out(videos: list[AnnotatedVideo], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Choose shares of the training videos for other splits, by hash: of each class, or whole groups where there are.

    Of each class, a video stays for training.

    What is chosen depends on what is listed, not on what is found: a video that vanishes moves no other.

    Returns:
        The new split of each video held out, by id.
    """
    if not any(shares.values()):
        return {}
    by_class: dict[str | None, list[AnnotatedVideo]] = {}
    by_group: dict[str, list[AnnotatedVideo]] = {}
    # A stretch that is listed again is rejected: only the first counts.
    for video in {video.video_id: video for video in reversed(videos)}.values():
        if video.split in ("", "train"):
            if video.group:
                by_group.setdefault(video.group, []).append(video)
            else:
                by_class.setdefault(video.class_name, []).append(video)
    held = _groups_held(by_group, shares, seed)
    for members in by_class.values():
        spread = iter(sorted(members, key=lambda video: _place(seed, video.video_id))[:-1])
        for split, share in shares.items():
            held |= {video.video_id: split for video in islice(spread, round(len(members) * share))}
    return held


def _place(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{name}".encode()).digest()


def _groups_held(groups: dict[str, list[AnnotatedVideo]], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Choose groups, as long as each brings a split nearer to its share: first those of most classes it has not yet."""
    classes = {name: {video.class_name for video in members} for name, members in groups.items()}
    total, left, held = sum(map(len, groups.values())), dict(groups), dict[str, str]()

    def learnable_without(name: str) -> bool:
        return classes[name] <= set[str | None]().union(*(classes[other] for other in left if other != name))

    for split, share in shares.items():
        lacking, covered = round(total * share), set[str | None]()
        while nearer := [
            name for name, members in left.items() if len(members) < 2 * lacking and learnable_without(name)
        ]:
            chosen = min(nearer, key=lambda name: (-len(classes[name] - covered), _place(seed, name)))
            covered |= classes[chosen]
            lacking -= len(left[chosen])
            held |= {video.video_id: split for video in left.pop(chosen)}
    return held


def keep_learnable(videos: list[AnnotatedVideo], held: dict[str, str]) -> None:
    """Give a held-out video, with its group, back to training where none of its class could be read there."""
    learned = {video.class_name for video in videos if video.split in ("", "train") and video.video_id not in held}
    for video in videos:
        if video.video_id in held and video.class_name not in learned:
            for other in [each for each in videos if video.group and each.group == video.group] or [video]:
                if held.pop(other.video_id, None):
                    learned.add(other.class_name)


def listed_counts(videos: list[AnnotatedVideo], held: dict[str, str]) -> dict[str, int]:
    """Return the number of videos of each split that has any."""
    counts = Counter(held.get(video.video_id) or video.split or "train" for video in videos)
    return {split: counts[split] for split in SPLITS if split in counts}
