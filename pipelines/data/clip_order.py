"""The clip order: which video is trained on at which step, by seed alone and independent of the number of workers.

An epoch is a permutation of the videos, cut to whole global batches; which videos are left over changes from epoch to
epoch. A step's batch is shared among the workers in contiguous parts, as even as they can be, so a run may resume at
any step on any number of workers with nothing trained twice and nothing left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from s5.config import LoopConfig
from s5.distributed import share_of

IntArray = npt.NDArray[np.int64]

AUTOMATIC_BATCH = 32
"""Largest global batch where none is given."""
SPARES = 2
"""Substitutes planned for each video."""


@dataclass(frozen=True)
class OrderRows:
    """A stretch of the order, one entry (R,) a video: steps in order, positions within the global batch in order."""

    step: IntArray
    """Step, counted from 0 over the whole run."""
    epoch: IntArray
    """Epoch of the step."""
    position: IntArray
    """Place in the global batch."""
    video: IntArray
    """Index of the video."""
    spares: IntArray
    """(R, SPARES) indices of the videos that stand in for it, in order; -1 for none."""


@dataclass(frozen=True)
class ClipOrder:
    """The order of training. Raises `ValueError` where there are fewer videos than a global batch takes."""

    num_videos: int
    """Videos of the training split."""
    batch_size: int
    """Videos of a global batch."""
    epochs: int
    """Epochs of the run."""
    seed: int
    """Seed of the permutations."""
    steps: int = 0
    """Steps of the run instead of `epochs`; 0 to go by `epochs`."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_videos < self.batch_size:
            raise ValueError(f"batch_size is {self.batch_size}: give 1 to {self.num_videos}, the number of videos")

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.num_videos // self.batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps or self.steps_per_epoch * self.epochs

    def order(self, epoch: int) -> IntArray:
        """Return the permutation (num_videos,) of an epoch."""
        key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).permutation(self.num_videos).astype(np.int64)

    def rows(self, start_step: int, stop_step: int, rank: int = 0, world_size: int = 1) -> OrderRows:
        """Return one worker's part of the steps `start_step` to `stop_step` (exclusive).

        Raises:
            ValueError: there are more workers than a global batch has videos, or the steps lie outside the plan.
        """
        if not 0 <= rank < world_size <= self.batch_size:
            raise ValueError(f"world_size is {world_size}: give at most the batch size, {self.batch_size}")
        if not 0 <= start_step <= stop_step <= self.total_steps:
            raise ValueError(f"steps {start_step} to {stop_step} are not within 0 to {self.total_steps}")
        mine = np.array(share_of(self.batch_size, rank, world_size))
        videos: list[IntArray] = []
        spares: list[IntArray] = []
        order = np.empty(0, dtype=np.int64)
        for step in range(start_step, stop_step):
            epoch, index = divmod(step, self.steps_per_epoch)
            if step == start_step or index == 0:
                order = self.order(epoch)
            batch = order[index * self.batch_size : (index + 1) * self.batch_size]
            videos.append(batch[mine])
            spares.append(self._spares(order, index)[mine])
        steps = np.repeat(np.arange(start_step, stop_step, dtype=np.int64), len(mine))
        return OrderRows(
            step=steps,
            epoch=steps // self.steps_per_epoch,
            position=np.tile(mine, stop_step - start_step).astype(np.int64),
            video=np.concatenate(videos) if videos else np.empty(0, dtype=np.int64),
            spares=np.concatenate(spares) if spares else np.empty((0, SPARES), dtype=np.int64),
        )

    def _spares(self, order: IntArray, index: int) -> IntArray:
        """Return the substitutes (batch_size, SPARES) of a batch: videos outside it, distinct within it where possible.

        First come the videos that this epoch leaves over, then those furthest away in its order.
        """
        size, used = self.batch_size, self.steps_per_epoch * self.batch_size
        others = used - size
        pool = len(order) - size
        spares = np.full((size, SPARES), -1, dtype=np.int64)
        row = np.arange(size)
        for column in range(min(SPARES, pool)):
            # With fewer than SPARES * size others, a video stands in for several, but never twice for the same one.
            shift = column * (size if pool >= SPARES * size else pool // SPARES)
            place = (row + shift) % pool
            left_over = place < len(order) - used
            spares[left_over, column] = order[used + (place[left_over] + index * size) % (len(order) - used or 1)]
            # The pool continues with the other batches, from half-way between the next one and this one again.
            away = (place[~left_over] - (len(order) - used) + others // 2) % (others or 1)
            spares[~left_over, column] = order[((index + 1) * size + away) % used]
        return spares


def with_batch_size(loop: LoopConfig, num_videos: int, num_workers: int) -> LoopConfig:
    """Return the settings with a global batch in place of 0: as many videos as there are up to 32, evenly shared."""
    if loop.batch_size:
        return loop
    fit = min(num_videos, AUTOMATIC_BATCH) // num_workers * num_workers
    return replace(loop, batch_size=max(fit, num_workers, 2))


def order_of(loop: LoopConfig, num_videos: int) -> ClipOrder:
    """Return the plan of a run over so many videos."""
    return ClipOrder(num_videos, loop.batch_size, loop.epochs, loop.seed, loop.steps)
