"""Stage `narrate`: what is said in videos, compared with written steps (distant supervision, arXiv 2201.10990).

OUT/manifest.parquet    a row a narrated segment: a stretch of its video, as a manifest for later stages
OUT/labels.parquet      the soft step label of each segment (see `data.narration.labels`)
OUT/rejects.parquet     video_id, place in the file and reason of each caption or step that is not used
OUT/shards/             the labels found so far, from which a run that was ended resumes
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.exceptions

from pipelines import storage
from pipelines.config import NarrateConfig
from pipelines.data.clip_batches import in_chunks, limit
from pipelines.data.manifest import MANIFEST, Description, classes, description, digest, metadata, read_manifest
from pipelines.data.narration import steps as written
from pipelines.data.narration.captions import check_captions, read_captions
from pipelines.data.narration.encoders import StepIndex, check_encoder, index_or_error
from pipelines.data.narration.labels import LABELS, LABELS_FILE, MADE_BY, STEPS, Labeller, LabelMeta
from pipelines.data.narration.segments import Segments
from pipelines.data.narration.steps import Step
from pipelines.errors import StageError, UserError, last_line
from pipelines.running.resources import check_cluster
from pipelines.running.run_folder import REJECTS, SHARDS
from pipelines.running.stage import FIRST_REASONS, REJECTS_SCHEMA, SHOWN_REJECTS, Stage, finished, stage_run
from s5.errors import Failure

UNLIKE = "what is said is like no step"
NUMBER = re.compile(r"-?\d[\d.]*(e[+-]?\d+)?|'.*'")
"""What differs among reasons of the same kind: numbers and names."""
HASHED = 1 << 20
"""Bytes of the narration that are hashed at a time."""


def run(config: NarrateConfig) -> dict[str, Any]:
    """Label all narrated segments and return the stage's result; the same --out resumes.

    Returns:
        The stage's result; counts of `captions`, `segments`, `rejects`, those `clipped`, `widened` and `overlapping`,
        of `short_labels`, with fewer than `top_k` steps, of `steps`, `steps_without_text` and `steps_without_vector`.

    Raises:
        UserError: manifest, narration, steps and encoder do not fit together, or no caption can be used.
        StageError: comparing failed.
    """
    manifest, steps = read_manifest(config.manifest), read_inputs(config)
    check_cluster(config.scale, None)
    index = indexed(config, [step.text for step in steps if step.text])
    meta = LabelMeta(
        manifest=digest(manifest),
        narration=file_digest(config.narration),
        steps=written.digest(steps),
        encoder=index.digest,
        top_k=config.top_k,
        temperature=config.temperature,
        shortest_s=config.shortest_s,
    )
    inputs = {name: getattr(meta, name) for name in ("manifest", "narration", "steps", "encoder")}
    if (result := finished("narrate", config, inputs, redo="compare again")) is not None:
        return result
    with stage_run("narrate", config, inputs=inputs) as stage:
        ids = written.text_ids(steps)
        stage.counts["steps_without_vector"] = index.blank
        stage.info(
            f"{len(manifest)} videos; {len(ids)} of {len(steps)} steps have a text, {index.blank} no telling word"
        )
        stage.info(f"encoder {index.digest}")
        segments = Segments(manifest, config.shortest_s)
        shards = label_all(config, stage, segments, (index, np.array(ids), config.top_k, config.temperature))
        rejected = join_rejects(stage, shards, steps)
        if rejected.total() - (len(steps) - len(ids)) == stage.counts["captions"]:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in rejected.most_common(FIRST_REASONS))
            raise UserError(
                f"narration is {config.narration!r}: none of its {stage.counts['captions']} captions can be used "
                f"({reasons}); see {stage.path(REJECTS)}"
            )
        found = join_labels(stage, shards, manifest, steps, meta)
        summarise(stage, found, rejected, segments.counts, steps)
        storage.remove_folder(stage.path(SHARDS))
    return stage.result


def read_inputs(config: NarrateConfig) -> list[Step]:
    """Return the steps, after checking all of the inputs that can be checked before any work.

    Raises:
        UserError: one is missing, or wrong.
    """
    for name in ("narration", "steps"):
        if not getattr(config, name):
            raise UserError(f"{name} is '': give the file of the {name}")
    check_encoder(config.encoder)
    steps = written.read_steps(config.steps)
    written.check_count(steps, config.top_k)
    check_captions(config.narration)
    return steps


def indexed(config: NarrateConfig, texts: list[str]) -> StepIndex:
    """Return the vectors of the steps, made by a task that has what a worker has.

    Raises:
        UserError: the encoder cannot be loaded, or does not fit the steps.
    """
    gpus = config.scale.gpus_per_worker
    task: Any = ray.remote(num_cpus=config.scale.cpus_per_worker, num_gpus=gpus)(index_or_error)
    index: StepIndex | UserError = ray.get(task.remote(config.encoder, texts, "cuda" if gpus else "cpu"))
    if isinstance(index, UserError):
        raise index
    return index


def file_digest(path: str) -> str:
    """Return a digest of a file's bytes."""
    sink = hashlib.blake2b(digest_size=12)
    system, inner = storage.filesystem(storage.absolute(path))
    with system.open_input_stream(inner) as stream:
        while block := stream.read(HASHED):
            sink.update(block)
    return sink.hexdigest()


# --- labels, shard by shard -----------------------------------------------------------------------------------------


def shard_path(stage: Stage, shard: int, name: str) -> str:
    """Return the name of one of a shard's two files; that of the rejects is written last."""
    return stage.path(SHARDS, f"{shard:05d}.{name}")


def label_all(config: NarrateConfig, stage: Stage, segments: Segments, labeller: tuple[Any, ...]) -> int:
    """Label the captions of all shards that are not there yet, and return the number of shards.

    Args:
        config: the settings.
        stage: the running stage.
        segments: places captions in videos.
        labeller: arguments of `Labeller`.

    Raises:
        StageError: comparing failed.
    """
    shards = captions = 0
    for part in segments.parts(read_captions(config.narration), config.shard_segments):
        done = storage.exists(shard_path(stage, shards, REJECTS))
        if not done:
            started = time.monotonic()
            labels, unlike = labelled(config, part.segments, labeller)
            storage.write_table(shard_path(stage, shards, LABELS_FILE), labels)
            rows = [asdict(failure) for failure in part.rejects + unlike]
            storage.write_table(shard_path(stage, shards, REJECTS), pa.Table.from_pylist(rows, REJECTS_SCHEMA))
        captions += len(part.segments) + len(part.rejects)
        how = "done by an earlier run" if done else f"{len(labels) / (time.monotonic() - started):.0f} labels a second"
        stage.info(f"{captions} captions compared; shard {shards}: {how}")
        shards += 1
    stage.counts["captions"] = captions
    return shards


def labelled(config: NarrateConfig, segments: pa.Table, labeller: tuple[Any, ...]) -> tuple[pa.Table, list[Failure]]:
    """Return the labels of segments with their rows in the manifest, and those that are like no step.

    One Ray Data execution.
    """
    if len(segments) == 0:
        return pa.Table.from_pylist([], pa.schema([*LABELS, pa.field("row", pa.int64())])), []
    dataset = in_chunks(segments, config.chunk_segments)
    workers = min(config.scale.num_workers, -(-len(segments) // config.chunk_segments))
    limit(dataset, workers * config.scale.cpus_per_worker)
    made = dataset.map_batches(
        Labeller,
        fn_constructor_args=labeller,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=config.scale.cpus_per_worker,
        num_gpus=config.scale.gpus_per_worker or None,
    )
    batches: Any = made.iter_batches(batch_size=None, batch_format="pyarrow")
    try:
        found = pa.concat_tables(list(batches))
    except ray.exceptions.RayError as error:
        reason = last_line(str(error))
        raise StageError(f"comparing failed: {reason}; finished shards are kept, the same command resumes") from error
    alike = pc.is_valid(found["steps"])
    unlike = found.filter(pc.invert(alike)).select(["video", "location"]).to_pylist()
    failures = [Failure(row["video"], row["location"], UNLIKE) for row in unlike]
    return found.filter(alike).select([*LABELS.names, "row"]), failures


# --- what is written ------------------------------------------------------------------------------------------------


def join_rejects(stage: Stage, shards: int, steps: list[Step]) -> Counter[str]:
    """Write all rejects, shard by shard, and return their numbers by reason; print the first ones."""
    counts: Counter[str] = Counter()
    tables = (storage.read_table(shard_path(stage, shard, REJECTS)) for shard in range(shards))
    with storage.table_writer(stage.path(REJECTS), REJECTS_SCHEMA) as writer:
        for rejects in chain([_without_text(steps)], tables):
            for row in rejects.to_pylist():
                if counts.total() < SHOWN_REJECTS:
                    stage.info(f"cannot use {row['uri']}: {row['reason']}")
                counts[NUMBER.sub("...", row["reason"])] += 1
            writer.write_table(rejects)
    return counts


def join_labels(stage: Stage, shards: int, manifest: pa.Table, steps: list[Step], meta: LabelMeta) -> dict[str, int]:
    """Write all labels and the manifest of their segments, shard by shard; return the segments of each split."""
    about = {MADE_BY: json.dumps(asdict(meta)).encode(), STEPS: json.dumps([step.name for step in steps]).encode()}
    # A clip of a segment covers it from its start to its end, however short it is.
    segmented = Description(dataset=description(manifest).dataset, protocol="whole")
    schema = manifest.schema.with_metadata(metadata(classes(manifest), segmented))
    found: Counter[str] = Counter()
    stage.counts["short_labels"] = 0
    with (
        storage.table_writer(stage.path(LABELS_FILE), LABELS.with_metadata(about)) as to_labels,
        storage.table_writer(stage.path(MANIFEST), schema) as to_manifest,
    ):
        for shard in range(shards):
            labels = storage.read_table(shard_path(stage, shard, LABELS_FILE))
            videos = manifest.take(labels["row"])
            last = pc.list_element(labels["probabilities"], meta.top_k - 1)
            stage.counts["short_labels"] += pc.sum(pc.equal(last, 0)).as_py() or 0
            for name in ("video_id", "start_s", "end_s"):
                videos = videos.set_column(schema.get_field_index(name), schema.field(name), labels[name])
            found.update(videos["split"].to_pylist())
            to_manifest.write_table(videos.cast(schema))
            to_labels.write_table(labels.select(LABELS.names).cast(to_labels.schema))
    return dict(found)


def _without_text(steps: list[Step]) -> pa.Table:
    """Return the rejects of steps without text; they belong to no video."""
    rows = [
        {"video_id": "", "uri": step.location, "reason": f"step {number} has no text"}
        for number, step in enumerate(steps)
        if not step.text
    ]
    return pa.Table.from_pylist(rows, REJECTS_SCHEMA)


def summarise(
    stage: Stage, found: dict[str, int], rejected: Counter[str], counts: Counter[str], steps: list[Step]
) -> None:
    """Set the counts of the result, and print them with the commonest reasons."""
    total = sum(found.values())
    stage.counts |= {"segments": total, "rejects": sum(rejected.values())} | found
    stage.counts |= {name: counts[name] for name in ("clipped", "widened", "overlapping")}
    stage.counts |= {"steps": len(steps), "steps_without_text": sum(not step.text for step in steps)}
    stage.metrics["narrate/segments"] = float(total)
    stage.details["reasons"] = dict(rejected.most_common())
    for reason, count in rejected.most_common(SHOWN_REJECTS):
        stage.info(f"{count} rejected: {reason}")
    stage.info(
        f"{total} segments of {stage.counts['captions']} captions ({', '.join(f'{k} {v}' for k, v in found.items())}); "
        f"{counts['clipped']} cut at an end of the video, {counts['widened']} widened, {counts['overlapping']} begin "
        f"while another is said; {stage.counts['short_labels']} labels have fewer than top_k steps; "
        f"{sum(rejected.values())} rejects -> {stage.out}"
    )
