"""Copies of a model that evaluate their shares of the videos, here or anywhere in a cluster through Ray.

OUT/shards/NAME-000001.pt    outputs found so far, from which an evaluation that was ended resumes
"""

from __future__ import annotations

import io
import queue
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.exceptions
import torch

from pipelines import storage
from pipelines.config import EvaluateConfig, ScaleConfig
from pipelines.data.clip_batches import DecodedClips
from pipelines.data.clip_source import ClipSource
from pipelines.data.features.batches import CachedClips
from pipelines.errors import StageError, last_line
from pipelines.running.progress import ProgressBar
from pipelines.running.resources import decode_tasks, own_device
from pipelines.running.run_folder import SHARDS
from pipelines.running.stage import Stage, in_thread
from s5.batch import ClipBatch
from s5.checkpoints.checkpoint import read_meta, read_model
from s5.config import BackboneConfig, ClipConfig, EvaluationProtocol
from s5.config import from_json as config_from_json
from s5.errors import Failure
from s5.evaluation import inference
from s5.evaluation.inference import ClipOutputs

# Seconds between two questions to the replicas, how far they are.
POLL_S = 0.5


def outputs(
    stage: Stage,
    config: EvaluateConfig,
    folder: Path,
    clips: ClipConfig,
    videos: pa.Table,
    *,
    name: str,
    protocol: EvaluationProtocol,
    per_video: int,
    pictured: frozenset[str] = frozenset(),
) -> ClipOutputs:
    """Return the model's outputs for the clips of some videos, from all replicas, with frames of those pictured.

    Those that an earlier start has stored under the same name are taken from there; what it could not read is read
    again.

    Raises:
        StageError: more videos than data.max_failure_share could not be read.
    """
    names = (path for path in storage.files_below(stage.path(SHARDS)) if path.rpartition("/")[2].startswith(name))
    found = [_stored(path) for path in names]
    done = pa.array({video for part in found for video in part.video_ids}, pa.string())
    left = videos.filter(pc.invert(pc.is_in(videos["video_id"], done)))
    if len(done):
        stage.info(f"{len(done)} of {len(videos)} videos are done already")
    failures: list[Failure] = []
    with stage.progress_bar("evaluated", len(left), "videos") as bar:
        for part in _found(config, folder, clips, left, bar, protocol, per_video, pictured):
            failures += part.failures
            # Without videos of which a part has failed; what has failed is read again by the next start.
            found.append(inference.merge([replace(part, failures=failures)]))
            _store(stage.path(SHARDS, f"{name}-{len(found):06}.pt"), found[-1])
    merged = inference.merge([*found, ClipOutputs.none(failures)])
    if not merged.video_ids or len(merged.failures) > config.data.max_failure_share * len(videos):
        first = merged.failures[0]
        raise StageError(
            f"{len(merged.failures)} of {len(videos)} videos cannot be read, more than data.max_failure_share, "
            f"{config.data.max_failure_share:g}, allows, as {first.video_id!r}: {first.reason}"
        )
    return merged


def _store(path: str, part: ClipOutputs) -> None:
    content = io.BytesIO()
    torch.save({key: value for key, value in vars(part).items() if key != "failures"}, content)
    storage.write_bytes(path, content.getvalue())


def _stored(path: str) -> ClipOutputs:
    return ClipOutputs(**torch.load(io.BytesIO(storage.read_bytes(path)), weights_only=True), failures=[])


def _found(
    config: EvaluateConfig,
    folder: Path,
    clips: ClipConfig,
    videos: pa.Table,
    bar: ProgressBar,
    protocol: EvaluationProtocol,
    per_video: int,
    pictured: frozenset[str],
) -> Iterator[ClipOutputs]:
    """Yield the outputs for some videos in parts, from all replicas."""
    world = min(config.scale.world_size, len(videos))
    if not world:
        return
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "optimizer.safetensors"}
    frame_size = config_from_json(BackboneConfig, read_meta(folder).model["backbone"]).frame_size
    source: CachedClips | DecodedClips
    if config.features:
        source = CachedClips(
            features=config.features, clips=clips, frame_size=frame_size, data=config.data, protocol=protocol
        )
    else:
        tasks = max(1, decode_tasks(config.scale, config.data) // world)
        source = DecodedClips(
            clips=clips, frame_size=frame_size, data=config.data, decode_tasks=tasks, protocol=protocol
        )
    arguments = [
        (
            videos,
            replace(source, rank=rank, world_size=world),
            per_video,
            config.batch_size,
            config.shard_videos,
            pictured,
        )
        for rank in range(world)
    ]
    if config.scale.num_workers:
        yield from _by_replicas(config.scale, files, arguments, bar)
    else:
        yield from _here(files, own_device(config.scale), arguments[0], bar)


def _by_replicas(
    scale: ScaleConfig, files: dict[str, bytes], arguments: Sequence[tuple[Any, ...]], bar: ProgressBar
) -> Iterator[ClipOutputs]:
    """Yield what each replica gives for its arguments, as it comes; they are actors anywhere in the cluster.

    In place of one that is lost, Ray starts another, which does its share again.

    Raises:
        StageError: a replica failed, or was lost too often.
    """
    # One call evaluates while another asks how far it is.
    replica: Any = ray.remote(Replica).options(
        num_cpus=scale.cpus_per_worker,
        num_gpus=scale.gpus_per_worker,
        max_concurrency=2,
        max_restarts=scale.max_failures,
        max_task_retries=scale.max_failures,
    )
    content = ray.put(files)
    device = "cuda" if scale.gpus_per_worker else "cpu"
    replicas = [replica.remote() for _ in arguments]
    streams: list[Any] = [
        actor.run.options(num_returns="streaming").remote(content, device, *each)
        for actor, each in zip(replicas, arguments, strict=True)
    ]
    while streams:
        ready: list[Any] = ray.wait(streams, timeout=POLL_S)[0]
        if bar.visible and not ready:
            bar.move_to(sum(ray.get([actor.videos_seen.remote() for actor in replicas])))
        for stream in ready:
            part = next(stream, None)
            if part is None:
                streams.remove(stream)
                continue
            try:
                found = ray.get(part)
            except ray.exceptions.RayError as error:
                reason = last_line(str(error))
                raise StageError(
                    f"evaluating failed: {reason}; what is found is kept, the same command resumes"
                ) from error
            yield found


def _here(files: dict[str, bytes], device: str, arguments: tuple[Any, ...], bar: ProgressBar) -> Iterator[ClipOutputs]:
    """Yield what the only replica gives, which works in a thread of this process."""
    replica = Replica()
    found: queue.SimpleQueue[ClipOutputs | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for part in replica.run(files, device, *arguments):
                found.put(part)
        finally:
            found.put(None)

    done = in_thread(work)
    while True:
        try:
            part = found.get(timeout=POLL_S)
        except queue.Empty:
            bar.move_to(replica.videos_seen())
            continue
        if part is None:
            break
        yield part
    done.result()


class Replica:
    """One copy of the model: a Ray actor, or in the process of the stage.

    The checkpoint comes with the work: with what an actor that Ray may start again is made of, Ray prints an error.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def videos_seen(self) -> int:
        """Return how many videos this replica has read, or failed to read."""
        return len(self._seen)

    def run(
        self,
        files: dict[str, bytes],
        device: str,
        videos: pa.Table,
        source: ClipSource,
        clips_per_video: int,
        batch_size: int,
        part_videos: int,
        pictured: frozenset[str],
    ) -> Iterator[ClipOutputs]:
        """Yield the model's outputs for this replica's clips of the videos, in parts of so many videos."""
        with tempfile.TemporaryDirectory(prefix="checkpoint_") as name:
            for file, content in files.items():
                (Path(name) / file).write_bytes(content)
            model, meta = read_model(Path(name))
        model.to(place := torch.device(device))
        output = inference.features(model) if meta.pretrained else inference.scores(model, meta.kind)
        batches = self._counted(source.evaluation(videos, clips_per_video, batch_size))
        # Ray streams what a generator function yields.
        yield from inference.run_in_parts(output, batches, place, part_videos, pictured)

    def _counted(self, batches: Iterable[ClipBatch]) -> Iterator[ClipBatch]:
        for batch in batches:
            yield batch
            self._seen |= {*batch.video_ids, *(failure.video_id for failure in batch.failures)}
