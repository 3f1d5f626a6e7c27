"""Where a worker's batches of clips come from: frames decoded as they are needed, or cached features.

Both kinds give the same clips of the same videos in the same order, so that a stage takes either.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import pyarrow as pa

from pipelines.data.clip_order import ClipOrder
from s5.batch import ClipBatch


class ClipSource(Protocol):
    """The clips of one worker."""

    def training(self, videos: pa.Table, order: ClipOrder, seed: int, start_step: int = 0) -> Generator[ClipBatch]:
        """Yield this worker's batch of every step from `start_step` to the end of the order.

        The clips of a video depend on (seed, epoch, video_id) alone.

        Args:
            videos: rows of the manifest that the order's indices mean.
            order: which videos each step takes.
            seed: seed of the clips.
            start_step: first step to yield.

        Raises:
            VideoError: a video and all its spares fail.
        """

    def evaluation(self, videos: pa.Table, clips_per_video: int, batch_size: int) -> Generator[ClipBatch]:
        """Yield the clips of a protocol of this worker's videos (rows rank, rank + world_size, ...), in their order.

        The clips of a video follow each other, perhaps across batches. What fails is listed in `failures` and has no
        clips. Batches may be smaller than `batch_size`, and workers may have different numbers of them.
        """
