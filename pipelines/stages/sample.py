"""Stage `sample`: render long-form videos of activities that share their steps, with annotations.

Ten activities are made of three or four steps each out of a stock of eight. They overlap heavily in what is seen; some
differ in nothing but the order of the steps. Uninformative stretches lie before, between and after the steps.

    OUT/{train,val,test}/CLASS/v00042.mp4     the videos, H.264
    OUT/annotations.json                      class, split, length and stretches of every video, and the settings
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from numpy.typing import NDArray

from pipelines import storage
from pipelines.config import SampleConfig, flatten
from pipelines.data.rendering import STEP_NAMES, Stretch, VideoPlan, render_video, stored_digest
from pipelines.errors import UserError
from pipelines.running.resources import ensure_ray
from pipelines.running.stage import stage_run

ACTIVITIES: dict[str, tuple[tuple[int, ...], ...]] = {
    # The first six are three pairs of the same steps in another order; no step belongs to one activity alone. Steps
    # without their order tell seven sets apart, which is 70 % of a balanced test split at best.
    "all": (
        (0, 1, 2, 3),
        (3, 2, 1, 0),
        (1, 0, 2),
        (2, 0, 1),
        (4, 5, 1),
        (1, 5, 4),
        (4, 5, 6, 2),
        (5, 6, 7),
        (0, 3, 6, 7),
        (3, 4, 7),
    ),
    "order-only": tuple(itertools.permutations((1, 2, 3))),
}
"""Steps of each activity, by class set; the position is the label."""

CHUNK = 4
"""Videos of one rendering task."""
PENDING_TASKS = 64
"""Rendering tasks that are submitted ahead."""


def run(config: SampleConfig) -> dict[str, Any]:
    """Render the videos that are not there yet and write the annotations.

    The bytes of a video depend on the settings, the seed and its number alone; the first videos stay the same when
    `videos` grows. A second start renders only what is missing or was rendered from another plan.

    Returns:
        Counts of videos, `videos` in all and those `rendered` now, and their length in all, `video_seconds`.

    Raises:
        UserError: `out` is not a local folder, or holds videos that are not of this data set.
    """
    if storage.is_uri(storage.absolute(config.out)):
        raise UserError(f"out is {config.out!r}: videos are written to a local folder only; give one and copy it after")
    out = Path(storage.absolute(config.out))
    plans = draw_videos(config)
    refuse_strangers(out, plans)
    with stage_run("sample", config) as stage:
        missing = [plan for plan in plans if stored_digest(out / plan.path) != plan.digest]
        with stage.progress_bar("rendered", len(missing), "videos") as bar:
            for plan, video in render_all(missing):
                stage.folder.write(plan.path, video)
                bar.advance()
        storage.write_json(str(out / "annotations.json"), annotate_all(config, plans))
        stage.counts |= {"videos": len(plans), "rendered": len(missing)}
        stage.metrics["video_seconds"] = sum(plan.seconds for plan in plans)
    return {**stage.counts, **stage.metrics}


# --- planning -------------------------------------------------------------------------------------------------------


def draw_videos(config: SampleConfig) -> list[VideoPlan]:
    """Return the plan of every video, in the order of their ids; labels take turns."""
    activities = ACTIVITIES[config.classes]
    plans = []
    for number in range(config.videos):
        turn, label = divmod(number, len(activities))
        plans.append(
            VideoPlan(
                video_id=f"v{number:05d}",
                class_name=class_name(activities[label]),
                label=label,
                split=split_of(turn, config.val_share, config.test_share),
                stretches=plan_stretches(config, activities[label], number),
                difficulty=config.difficulty,
                fps=config.fps,
                size=config.size,
                seed=(config.seed, number, 1),
            )
        )
    return plans


def class_name(steps: tuple[int, ...]) -> str:
    """Return an activity's name: its steps in order, such as `one-two-three`."""
    return "-".join(STEP_NAMES[step] for step in steps)


def split_of(turn: int, val_share: float, test_share: float) -> Literal["train", "val", "test"]:
    """Return the split of a class's video number `turn`, counted from 0.

    Each video goes where most is lacking, so that every prefix of a class has the wanted shares to within one video.
    """
    shares: dict[Literal["train", "val", "test"], float]
    shares = {"train": 1 - val_share - test_share, "test": test_share, "val": val_share}
    counts = dict.fromkeys(shares, 0)
    for seen in range(turn + 1):
        # Rounded, or the last digit of a float would decide between equals.
        chosen = max(shares, key=lambda split: round(shares[split] * (seen + 1) - counts[split], 9))
        counts[chosen] += 1
    return chosen


def plan_stretches(config: SampleConfig, steps: tuple[int, ...], number: int) -> tuple[Stretch, ...]:
    """Draw the length of a video, 0.95 to 1.15 times `seconds`, and of its stretches.

    Uninformative stretches take `empty_share` of it, up to 0.1 more or less; they lie before, between and after the
    steps.
    """
    rng = np.random.default_rng((config.seed, number, 0))
    frames = round(config.seconds * rng.uniform(0.95, 1.15) * config.fps)
    share = config.empty_share + rng.uniform(-0.1, 0.1)
    weights = np.empty(2 * len(steps) + 1)
    weights[0::2] = share * normalised(rng.uniform(0.3, 1.7, size=len(steps) + 1))
    weights[1::2] = (1 - share) * normalised(rng.uniform(0.5, 1.5, size=len(steps)))
    # One frame at least for each; the rest by weight.
    ends = np.rint(np.cumsum(weights) * (frames - len(weights))).astype(int) + np.arange(1, len(weights) + 1)
    starts = [0, *ends[:-1].tolist()]
    shown = [steps[i // 2] if i % 2 else None for i in range(len(weights))]
    return tuple(Stretch(*stretch) for stretch in zip(starts, ends.tolist(), shown, strict=True))


def normalised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values that sum to 1."""
    total: float = values.sum()
    return values / total


def annotate_all(config: SampleConfig, plans: list[VideoPlan]) -> dict[str, Any]:
    """Return what annotations.json holds: the settings, the classes with their steps, and every video."""
    settings = {k: v for k, v in flatten(config).items() if k != "out" and not k.startswith("tracking.")}
    classes = {class_name(steps): [STEP_NAMES[i] for i in steps] for steps in ACTIVITIES[config.classes]}
    return {"config": settings, "classes": classes, "videos": [annotate(plan) for plan in plans]}


def annotate(plan: VideoPlan) -> dict[str, Any]:
    """Return a video's entry: times in seconds, `step` null in the uninformative stretches."""
    return {
        "id": plan.video_id,
        "path": plan.path,
        "class": plan.class_name,
        "label": plan.label,
        "split": plan.split,
        "seconds": plan.seconds,
        "stretches": [
            {
                "start_s": stretch.start / plan.fps,
                "end_s": stretch.end / plan.fps,
                "step": None if stretch.step is None else STEP_NAMES[stretch.step],
                "informative": stretch.step is not None,
            }
            for stretch in plan.stretches
        ],
    }


# --- rendering and files --------------------------------------------------------------------------------------------


def render_all(plans: list[VideoPlan]) -> Iterator[tuple[VideoPlan, bytes]]:
    """Render plans in Ray tasks and yield each video as it gets ready, in any order."""
    if not plans:
        return
    ensure_ray()
    chunks = [plans[i : i + CHUNK] for i in range(0, len(plans), CHUNK)]
    pending: dict[ray.ObjectRef[list[bytes]], list[VideoPlan]] = {}
    while chunks or pending:
        while chunks and len(pending) < PENDING_TASKS:
            chunk = chunks.pop(0)
            pending[render_chunk.remote(chunk)] = chunk
        # Videos come back to the driver: `out` is a folder of its machine, not of the workers'.
        (ready,), _ = ray.wait(list(pending))
        yield from zip(pending.pop(ready), ray.get(ready), strict=True)


@ray.remote(num_cpus=1)
def render_chunk(plans: list[VideoPlan]) -> list[bytes]:
    """Render a few videos in one task."""
    return [render_video(plan) for plan in plans]


def refuse_strangers(out: Path, plans: list[VideoPlan]) -> None:
    """Raise `UserError` if the folder holds videos of another data set, which `index` would take in."""
    known = {plan.path for plan in plans}
    strangers = sorted({p.relative_to(out).as_posix() for p in out.rglob("*.mp4")} - known)
    if strangers:
        what = f"{len(strangers)} videos that are not of this data set, such as {strangers[0]}"
        raise UserError(f"out is {str(out)!r}: it holds {what}; give another folder or delete them")
