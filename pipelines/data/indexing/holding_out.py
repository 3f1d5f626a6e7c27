"""Which training videos are held out for splits that the annotations do not have: by class, seed and id alone."""

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
    """Choose shares of each class's training videos for other splits, by hash; one stays for training.

    What is chosen depends on what is listed, not on what is found: a video that vanishes moves no other.

    Returns:
        The new split of each video held out, by id.
    """

    def place(video: AnnotatedVideo) -> bytes:
        return hashlib.blake2b(f"{seed}/{video.video_id}".encode()).digest()

    if not any(shares.values()):
        return {}
    by_class: dict[str | None, list[AnnotatedVideo]] = {}
    # A stretch that is listed again is rejected: only the first counts.
    for video in {video.video_id: video for video in reversed(videos)}.values():
        if video.split in ("", "train"):
            by_class.setdefault(video.class_name, []).append(video)
    held: dict[str, str] = {}
    for members in by_class.values():
        spread = iter(sorted(members, key=place)[:-1])
        for split, share in shares.items():
            held |= {video.video_id: split for video in islice(spread, round(len(members) * share))}
    return held


def keep_learnable(videos: list[AnnotatedVideo], held: dict[str, str]) -> None:
    """Give a held-out video back to training where no other video of its class could be read there."""
    learned = {video.class_name for video in videos if video.split in ("", "train") and video.video_id not in held}
    for video in videos:
        if video.video_id in held and video.class_name not in learned:
            del held[video.video_id]
            learned.add(video.class_name)


def listed_counts(videos: list[AnnotatedVideo], held: dict[str, str]) -> dict[str, int]:
    """Return the number of videos of each split that has any."""
    counts = Counter(held.get(video.video_id) or video.split or "train" for video in videos)
    return {split: counts[split] for split in SPLITS if split in counts}
