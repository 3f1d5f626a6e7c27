"""Workers of `predict` anywhere in a cluster: actors of Ray Data, each with a model, that store whole shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions

from pipelines import storage
from pipelines.config import PredictConfig
from pipelines.data.clip_batches import in_chunks, limit
from pipelines.data.predicting.rows import PREDICTED
from pipelines.data.predicting.worker import PredictWorker
from pipelines.errors import StageError, last_line
from s5.evaluation.prediction import Predictor


class ShardActor:
    """Predicts the videos of a shard and stores it."""

    def __init__(self, predictor: Any, config: PredictConfig) -> None:
        found: Predictor = ray.get(predictor)
        found.model.to("cuda" if config.scale.gpus_per_worker else "cpu")
        self._worker = PredictWorker(found, config.data.decode_timeout_s)

    def __call__(self, videos: pa.Table) -> pa.Table:
        """Predict the videos of a shard, columns `video` and `path` (that of the shard), and return their rows."""
        table = pa.Table.from_pylist(list(self._worker.rows(videos["video"].to_pylist())), PREDICTED)
        storage.write_table(videos["path"][0].as_py(), table)
        return table


def predicted(config: PredictConfig, predictor: Predictor, shards: list[tuple[str, list[str]]]) -> Iterator[pa.Table]:
    """Yield the rows of each shard, given by its path and videos, in order; one Ray Data execution.

    Raises:
        StageError: predicting failed.
    """
    # A chunk is a shard, and all but the last one have as many videos.
    tables = [pa.table({"video": videos, "path": [path] * len(videos)}) for path, videos in shards]
    dataset = in_chunks(pa.concat_tables(tables), config.shard_videos)
    scale, cpus = config.scale, config.scale.cpus_per_worker + config.data.cpus_per_decode
    workers = min(scale.num_workers, len(shards))
    limit(dataset, workers * cpus)
    made = dataset.map_batches(
        ShardActor,
        fn_constructor_args=(ray.put(predictor), config),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=scale.gpus_per_worker or None,
    )
    batches: Any = made.iter_batches(batch_size=None, batch_format="pyarrow")
    try:
        yield from batches
    except ray.exceptions.RayError as error:
        reason = last_line(str(error))
        raise StageError(f"predicting failed: {reason}; finished shards are kept, the same command resumes") from error
