"""Evaluate stage: the clips of a split through a model; what its outputs say is in `finetuned` and `pretrained`.

The protocol says which clips of a video are read (`clip_times`); a video's result is their mean. Replicas of the model
read their shares of the videos (`evaluating.replicas`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.config import EvaluateConfig, unknown
from pipelines.data.features.batches import check_features
from pipelines.data.manifest import check_clips, classes, drop_too_short, read_manifest, split_of
from pipelines.data.manifest import digest as manifest_digest
from pipelines.data.narration.reading import NarratedSteps
from pipelines.data.protocols import checked_clips, clips_in_words, clips_per_video, coverage, listed_count, protocol_of
from pipelines.data.tracked import data_set
from pipelines.errors import UserError
from pipelines.running import registered
from pipelines.running.resources import check_cluster
from pipelines.running.run_folder import SHARDS
from pipelines.running.stage import finished, stage_run
from pipelines.stages.evaluating import finetuned, pretrained
from pipelines.stages.evaluating.replicas import outputs
from pipelines.storage.weights import local_checkpoint, of_backbone
from s5.checkpoints.checkpoint import Meta, digest, encoder_weights, read_meta, read_model
from s5.config import BackboneConfig, ClipConfig, EvaluationProtocol
from s5.config import from_json as config_from_json
from s5.errors import CheckpointError
from s5.evaluation import inference


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate and return the stage's result; the same --out resumes.

    Raises:
        UserError: checkpoint, manifest, settings and --out do not fit together; before any work.
        StageError: too many videos could not be read.
    """
    manifest = read_manifest(config.manifest)
    if config.features:
        # Replicas may have another folder.
        config = replace(config, features=storage.absolute(config.features))
    with local_checkpoint(config.checkpoint) as folder:
        evaluation = checked(config, manifest, folder)
        meta, clips, protocol, inputs = evaluation.meta, evaluation.clips, evaluation.protocol, evaluation.inputs
        rows, videos, learned, known = evaluation.rows, evaluation.videos, evaluation.learned, evaluation.known
        if (result := finished("evaluate", config, inputs, redo="evaluate again")) is not None:
            return result
        check_cluster(config.scale, None if config.features else config.data)
        per_video = clips_per_video(protocol, config.clips_per_video)
        read_videos = data_set(rows, config.manifest, inputs["manifest"], config.split)
        with stage_run("evaluate", config, inputs=inputs, datasets=[read_videos]) as stage:
            stage.info(
                f"{meta.kind} checkpoint of step {meta.step}, {len(videos)} videos of split {config.split!r}, protocol "
                f"{protocol}: {clips_in_words(protocol, clips, per_video)}"
            )
            pictured = pretrained.pictured_videos(config, meta, videos, per_video)
            read = partial(outputs, stage, config, folder, clips, protocol=protocol)
            found = read(videos, name="evaluated", per_video=per_video, pictured=pictured)
            used, all_listed = len(videos) - len(found.failures), listed_count(manifest, config.split)
            stage.details["protocol"] = protocol
            stage.metrics |= {f"{config.split}/videos": used, f"{config.split}/listed": all_listed}
            stage.metrics |= {f"{config.split}/clips": len(found.video_ids)}
            if meta.pretrained:
                reference = read(learned, name="learned", per_video=1) if len(learned) else None
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
                registered.register(stage, config, folder, inputs["manifest"], meta)
            storage.remove_folder(stage.path(SHARDS))
    return stage.result


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated, of a checkpoint, manifest and settings that fit together."""

    meta: Meta
    clips: ClipConfig
    protocol: EvaluationProtocol
    rows: pa.Table
    """Videos of the split."""
    videos: pa.Table
    """Those of them that are long enough."""
    learned: pa.Table
    """Videos that a probe learns from."""
    known: NarratedSteps | None
    """Soft labels that predicted steps are compared with."""
    inputs: dict[str, str]
    """Digests of what is read."""


def checked(config: EvaluateConfig, manifest: pa.Table, folder: Path) -> Evaluation:
    """Return what is evaluated: all that is checked before any work, but for the cluster.

    Raises:
        UserError: checkpoint, manifest and settings do not fit together.
    """
    try:
        meta = read_meta(folder)
        weights = encoder_weights(folder)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    clips, protocol = clips_of(meta), chosen_protocol(manifest, config, meta)
    rows = chosen(manifest, config, meta)
    usable = checked_clips(clips, protocol)
    check_clips(rows, usable)
    videos = drop_too_short(rows, usable)
    learned = pretrained.training_videos(manifest, config, meta, videos, usable)
    inputs = {"checkpoint": digest(folder), "manifest": manifest_digest(manifest)}
    registered.check(config, meta)
    backbone = config_from_json(BackboneConfig, meta.model["backbone"])
    if backbone.tokens and not config.features:
        raise UserError(
            f"features is '': the checkpoint has no frame encoder, it reads imported features of "
            f"{backbone.name!r}; give --features"
        )
    if config.features:
        inputs["features"] = check_features(config.features, manifest, clips, protocol, backbone, of_backbone(weights))
    if known := pretrained.narrated_steps(config, meta, videos):
        inputs["labels"] = known.digest
    return Evaluation(
        meta=meta,
        clips=clips,
        protocol=protocol,
        rows=rows,
        videos=videos,
        learned=learned,
        known=known,
        inputs=inputs,
    )


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
