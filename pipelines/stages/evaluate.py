"""Evaluate stage: the clips of a split through a model; what its outputs say is in `finetuned` and `pretrained`.

The protocol says which clips of a video are read (`clip_times`); a video's result is their mean. Replicas of the model
read their shares of the videos through Ray Data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from pipelines import storage
from pipelines.config import EvaluateConfig, ScaleConfig, unknown
from pipelines.data.clip_batches import DecodedClips
from pipelines.data.clip_source import ClipSource
from pipelines.data.features.batches import CachedClips, check_features
from pipelines.data.manifest import check_clips, classes, drop_too_short, read_manifest, split_of
from pipelines.data.manifest import digest as manifest_digest
from pipelines.data.protocols import checked_clips, clips_in_words, clips_per_video, coverage, listed_count, protocol_of
from pipelines.data.tracked import data_set
from pipelines.errors import StageError, UserError
from pipelines.running import registered
from pipelines.running.progress import ProgressBar
from pipelines.running.resources import check_cluster, decode_tasks, own_device
from pipelines.running.stage import Stage, in_thread, stage_run
from pipelines.stages.evaluating import finetuned, pretrained
from pipelines.storage.weights import local_checkpoint, of_backbone
from s5.batch import ClipBatch
from s5.checkpoints.checkpoint import Meta, digest, encoder_weights, read_meta, read_model
from s5.config import BackboneConfig, ClipConfig, EvaluationProtocol
from s5.config import from_json as config_from_json
from s5.errors import CheckpointError
from s5.evaluation import inference
from s5.evaluation.inference import ClipOutputs

# Seconds between two questions to the replicas, how far they are.
POLL_S = 0.5


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate and return the stage's result.

    Raises:
        UserError: checkpoint, manifest and settings do not fit together; before any work.
        StageError: too many videos could not be read.
    """
    manifest = read_manifest(config.manifest)
    with local_checkpoint(config.checkpoint) as folder:
        try:
            meta = read_meta(folder)
            weights = encoder_weights(folder)
        except CheckpointError as error:
            raise UserError(str(error)) from None
        clips, protocol = clips_of(meta), chosen_protocol(manifest, config, meta)
        rows = chosen(manifest, config, meta)
        checked = checked_clips(clips, protocol)
        check_clips(rows, checked)
        videos = drop_too_short(rows, checked)
        learned = pretrained.training_videos(manifest, config, meta, videos, checked)
        inputs = {"checkpoint": digest(folder)}
        registered.check(config, meta)
        backbone = config_from_json(BackboneConfig, meta.model["backbone"])
        if backbone.tokens and not config.features:
            raise UserError(
                f"features is '': the checkpoint has no frame encoder, it reads imported features of "
                f"{backbone.name!r}; give --features"
            )
        if config.features:
            # Replicas may have another folder.
            config = replace(config, features=storage.absolute(config.features))
            inputs["features"] = check_features(
                config.features, manifest, clips, protocol, backbone, of_backbone(weights)
            )
        if known := pretrained.narrated_steps(config, meta, videos):
            inputs["labels"] = known.digest
        check_cluster(config.scale, None if config.features else config.data)
        per_video = clips_per_video(protocol, config.clips_per_video)
        read_videos = data_set(rows, config.manifest, manifest_digest(manifest), config.split)
        with stage_run("evaluate", config, inputs=inputs, datasets=[read_videos]) as stage:
            stage.info(
                f"{meta.kind} checkpoint of step {meta.step}, {len(videos)} videos of split {config.split!r}, protocol "
                f"{protocol}: {clips_in_words(protocol, clips, per_video)}"
            )
            pictured = pretrained.pictured_videos(config, meta, videos, per_video)
            read = partial(outputs, stage, config, folder, clips, protocol=protocol)
            found = read(videos, per_video=per_video, pictured=pictured)
            used, all_listed = len(videos) - len(found.failures), listed_count(manifest, config.split)
            stage.details["protocol"] = protocol
            stage.metrics |= {f"{config.split}/videos": used, f"{config.split}/listed": all_listed}
            stage.metrics |= {f"{config.split}/clips": len(found.video_ids)}
            if meta.pretrained:
                reference = read(learned, per_video=1) if len(learned) else None
                pretrained.report(stage, config, found, reference)
                if known and (head := read_model(folder)[0].head):
                    pretrained.steps(stage, config.split, head, found, known)
            else:
                finetuned.report(stage, config, meta, inference.by_video(found), Counter(found.video_ids))
            stage.info(f"all this {coverage(config.split, used, len(found.failures), len(rows), all_listed)}")
            stage.counts |= {"listed": all_listed, "videos": len(videos), "unreadable": len(found.failures)}
            stage.replace_rejects(found.failures)
            stage.folder.write_json("metrics.json", stage.metrics)
            if config.register:
                registered.register(stage, config, folder, manifest_digest(manifest), meta)
    return stage.result


def clips_of(meta: Meta) -> ClipConfig:
    """Return the clips that a checkpoint was trained on."""
    return config_from_json(ClipConfig, meta.settings["clips"])


def chosen_protocol(manifest: pa.Table, config: EvaluateConfig, meta: Meta) -> EvaluationProtocol:
    """Return which clips are read.

    Raises:
        UserError: all windows are asked for of a pretrained encoder, whose clips are compared with each other.
    """
    if not meta.pretrained:
        return protocol_of(manifest, config.protocol, meta.settings.get("protocol", "auto"))
    if config.protocol == "windows":
        raise UserError(
            "protocol is 'windows': a pretrained encoder's clips are compared with each other, and windows a second "
            "apart find their own neighbours; give uniform or whole"
        )
    return "uniform" if config.protocol == "auto" else config.protocol


def chosen(manifest: pa.Table, config: EvaluateConfig, meta: Meta) -> pa.Table:
    """Return the videos to evaluate: those of the split, with labels where the model gives any."""
    videos = split_of(manifest, config.split)
    if len(videos) == 0:
        splits = tuple(sorted(set(manifest["split"].to_pylist())))
        raise UserError(f"{unknown('split', config.split, splits)} (manifest {config.manifest!r})")
    column = {"class": "label", "regression": "target"}.get(meta.kind)
    if column and videos[column].null_count:
        raise UserError(f"split is {config.split!r}: {videos[column].null_count} of its videos have no {column}")
    if meta.kind == "class" and classes(manifest) != meta.classes:
        raise UserError(
            f"manifest {config.manifest!r} has the classes {', '.join(classes(manifest))}, the checkpoint "
            f"{', '.join(meta.classes)}: evaluate on a manifest of the same classes"
        )
    return videos


def outputs(
    stage: Stage,
    config: EvaluateConfig,
    folder: Path,
    clips: ClipConfig,
    videos: pa.Table,
    *,
    protocol: EvaluationProtocol,
    per_video: int,
    pictured: frozenset[str] = frozenset(),
) -> ClipOutputs:
    """Return the model's outputs for the clips of some videos, from all replicas, with frames of those pictured.

    Raises:
        StageError: more videos than data.max_failure_share could not be read.
    """
    world = min(config.scale.world_size, len(videos))
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
        (videos, replace(source, rank=rank, world_size=world), per_video, config.batch_size, pictured)
        for rank in range(world)
    ]
    with stage.progress_bar("evaluated", len(videos), "videos") as bar:
        if config.scale.num_workers:
            found = inference.merge(_by_replicas(config.scale, files, arguments, bar))
        else:
            found = _here(files, own_device(config.scale), arguments[0], bar)
    if not found.video_ids or len(found.failures) > config.data.max_failure_share * len(videos):
        first = found.failures[0]
        raise StageError(
            f"{len(found.failures)} of {len(videos)} videos cannot be read, more than data.max_failure_share, "
            f"{config.data.max_failure_share:g}, allows, as {first.video_id!r}: {first.reason}"
        )
    return found


def _by_replicas(
    scale: ScaleConfig, files: dict[str, bytes], arguments: Sequence[tuple[Any, ...]], bar: ProgressBar
) -> list[ClipOutputs]:
    """Return what each replica gives for its arguments; they are actors anywhere in the cluster.

    In place of one that is lost, Ray starts another, which does its share again.
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
    replicas = [replica.remote(content, device) for _ in arguments]
    parts = [actor.run.remote(*each) for actor, each in zip(replicas, arguments, strict=True)]
    while len(ray.wait(parts, num_returns=len(parts), timeout=POLL_S)[0]) < len(parts) and bar.visible:
        bar.move_to(sum(ray.get([actor.videos_seen.remote() for actor in replicas])))
    return list(ray.get(parts))


def _here(files: dict[str, bytes], device: str, arguments: tuple[Any, ...], bar: ProgressBar) -> ClipOutputs:
    """Return what the only replica gives, in this process."""
    replica = Replica(files, device)
    part = in_thread(partial(replica.run, *arguments))
    while not part.done():
        wait([part], POLL_S)
        bar.move_to(replica.videos_seen())
    return part.result()


class Replica:
    """One copy of the model: a Ray actor, or in the process of the stage."""

    def __init__(self, files: dict[str, bytes], device: str) -> None:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="checkpoint_") as name:
            for file, content in files.items():
                (Path(name) / file).write_bytes(content)
            self.model, self.meta = read_model(Path(name))
        self.device = torch.device(device)
        self.model.to(self.device)
        self._seen: set[str] = set()

    def videos_seen(self) -> int:
        """Return how many videos this replica has read, or failed to read."""
        return len(self._seen)

    def run(
        self, videos: pa.Table, source: ClipSource, clips_per_video: int, batch_size: int, pictured: frozenset[str]
    ) -> ClipOutputs:
        """Return the model's outputs for this replica's clips of the videos."""
        kind = self.meta.kind
        output = inference.features(self.model) if self.meta.pretrained else inference.scores(self.model, kind)
        batches = self._counted(source.evaluation(videos, clips_per_video, batch_size))
        return inference.run(output, batches, self.device, pictured)

    def _counted(self, batches: Iterable[ClipBatch]) -> Iterator[ClipBatch]:
        for batch in batches:
            yield batch
            self._seen |= {*batch.video_ids, *(failure.video_id for failure in batch.failures)}
