"""Stage `index`: probe videos into a manifest.

--source folder     VIDEOS/[{train,val,test}/][CLASS/]name.mp4
--source csv        any layout, with a csv: video[,label,target,split,start_s,end_s]
--source lvu ...    a benchmark's own annotation files (see annotations/); its videos by their ids, anywhere in VIDEOS
OUT/manifest.parquet    one row a video that decodes (see manifest.py)
OUT/rejects.parquet     video_id, uri, reason of every other that is listed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import attrgetter, itemgetter
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.config import IndexConfig
from pipelines.data.annotations import benchmarks, own
from pipelines.data.annotations.shared import AnnotatedVideo, Annotations
from pipelines.data.indexing.holding_out import hold_out, keep_learnable, listed_counts, shares
from pipelines.data.indexing.locating import Names, by_id, by_name
from pipelines.data.indexing.probing import FACT_NAMES, Facts, Stamp, probe_files, remove_parts
from pipelines.data.indexing.video_files import EXTENSIONS, VideoFiles, find
from pipelines.data.manifest import MANIFEST, SCHEMA, Description, lone_classes, metadata, splits
from pipelines.errors import UserError
from pipelines.running.resources import ensure_ray
from pipelines.running.stage import Stage, stage_run
from s5.errors import Failure

FIRST_CLASSES = 5
"""Classes named in a warning."""
NOT_LISTED = "videos that are not listed"


def run(config: IndexConfig) -> dict[str, Any]:
    """Probe all videos and write the manifest and the rejects; the same --out resumes a run that was ended.

    Returns:
        The stage's result; counts of `listed` videos, `videos`, `rejects`, `ignored` files and the videos of each
        split, and under `splits` those listed, found and rejected in each.

    Raises:
        UserError: there are no videos, none can be read, or the annotations are wrong.
    """
    annotations, files = list_videos(config)
    held = hold_out(annotations.videos, shares(annotations, config), config.seed)
    ensure_ray()
    with stage_run("index", config) as stage:
        say_what_is_there(stage, annotations, files, config)
        found = dict.fromkeys(video.uri for video in annotations.videos if not video.reason)
        facts = probe_files(list(found), stamps_of(annotations.videos, files), config.data, stage)
        videos, rejects = readable(annotations.videos, facts)
        stage.replace_rejects(rejects)
        if not videos:
            stage.folder.remove(MANIFEST)
            raise stage.none_readable()
        keep_learnable(videos, held)
        table = manifest_of(videos, facts, annotations, held, config)
        stage.folder.write_table(MANIFEST, table)
        remove_parts(stage)
        summarise(stage, table, annotations, held, files.others.total())
    return stage.result


def say_what_is_there(stage: Stage, annotations: Annotations, files: VideoFiles, config: IndexConfig) -> None:
    """Print what is listed and found, what other files there are, and the annotations' warnings."""
    found = sum(not video.reason for video in annotations.videos)
    what = " ".join(filter(None, (annotations.dataset, annotations.task, f"{len(annotations.videos)} videos")))
    what += f" in {len(annotations.classes)} classes" if annotations.classes else ""
    stage.info(f"{what}, {found} found below {config.videos}; {files.described()}")
    for warning in annotations.warnings:
        stage.info(f"warning: {warning}")
    stage.details |= {"others": dict(files.others.most_common()), "warnings": annotations.warnings}


def summarise(stage: Stage, table: pa.Table, annotations: Annotations, held: dict[str, str], ignored: int) -> None:
    """Set the counts of the result, and print them with warnings of classes that cannot be learned."""
    found = [video for video in annotations.videos if not video.reason]
    readable, listed, found_counts = splits(table), listed_counts(annotations.videos, held), listed_counts(found, held)
    total, rejects = len(annotations.videos), len(annotations.videos) - len(table)
    hours = sum(table["duration_s"].to_pylist()) / 3600
    stage.counts |= {"listed": total, "videos": len(table), "rejects": rejects, "ignored": ignored, **readable}
    stage.metrics |= {"index/videos": float(len(table)), "index/rejects": float(rejects), "index/hours": hours}
    stage.details["splits"] = {
        split: {"listed": count, "found": found_counts.get(split, 0), "rejected": count - readable.get(split, 0)}
        for split, count in listed.items()
    }
    for split, numbers in stage.details["splits"].items():
        stage.info(f"{split}: " + ", ".join(f"{number} {what}" for what, number in numbers.items()))
    single, unlearnable = lone_classes(table)
    _warn(stage, single, "a single video, which cannot be both learned and tested")
    _warn(stage, unlearnable, "no video in split train to learn from")
    outcome = ", ".join(f"{split} {count}" for split, count in readable.items())
    stage.info(
        f"{len(table)} of {total} videos ({outcome}), {hours:.2f} hours, {rejects} rejects -> {stage.path(MANIFEST)}"
    )


def _warn(stage: Stage, names: list[str], fault: str) -> None:
    if names:
        named = ", ".join(repr(name) for name in names[:FIRST_CLASSES]) + (
            ", ..." if len(names) > FIRST_CLASSES else ""
        )
        stage.info(f"warning: {len(names)} of the classes have {fault}: {named}")


# --- listing --------------------------------------------------------------------------------------------------------


def list_videos(config: IndexConfig) -> tuple[Annotations, VideoFiles]:
    """Return what the annotations or the folder list, videos by id, and what else is below the folder.

    Raises:
        UserError: the folder or annotations are missing or have no videos, or the annotations are wrong.
    """
    source = config.source if config.source != "auto" else "csv" if config.annotations else "folder"
    if source in benchmarks.READERS:
        # Before the folder, whose listing may take minutes.
        annotations = benchmarks.READERS[source](config.annotations)
        files = find(config.videos)
        videos = by_id(annotations.videos, files, config.videos)
        if all(video.reason for video in videos):
            raise UserError(
                f"videos is {config.videos!r}: none of the {len(videos)} videos that the annotations list is in it or "
                f"below it, such as {videos[0].name}.mp4; {len(files.videos)} other videos are"
            )
    else:
        files = find(config.videos)
        names = Names(config.videos, files)
        if source == "csv":
            annotations = own.from_csv(config.annotations, files.videos, names.name_of)
        else:
            annotations = own.from_folder(files.videos, files.faults)
        videos = by_name(annotations.videos, names)
    if not videos:
        where = f"annotations is {config.annotations!r}: it lists no videos"
        where = where if config.annotations else f"videos is {config.videos!r}: no videos below it"
        raise UserError(f"{where}; looked for files that end in {', '.join(EXTENSIONS)}, among {files.described()}")
    used = {video.name for video in videos}
    unlisted = [name for name in (*files.videos, *(name for name, _ in files.faults)) if name not in used]
    if unlisted:
        files.others[NOT_LISTED] = len(unlisted)
    return replace(annotations, videos=sorted(videos, key=lambda video: video.video_id)), files


# --- what can be read -----------------------------------------------------------------------------------------------


def stamps_of(videos: Iterable[AnnotatedVideo], files: VideoFiles) -> dict[str, Stamp]:
    """Return the size and time of change of each file, by its URI, as far as a listing has stated them."""
    return {video.uri: files.stamps[video.name] for video in videos if video.name in files.stamps}


def readable(
    listed: Iterable[AnnotatedVideo], facts: Mapping[str, Facts]
) -> tuple[list[AnnotatedVideo], list[Failure]]:
    """Return the videos that can be read, and the others with their reasons.

    Of these, the damaged ones come before those that are listed but not found.
    """
    videos: list[AnnotatedVideo] = []
    damaged: list[Failure] = []
    missing: list[Failure] = []
    for video in listed:
        if video.reason:
            missing.append(Failure(video.video_id, video.uri, video.reason))
        elif reason := facts[video.uri]["reason"] or _stretch_fault(video, facts[video.uri]["duration_s"]):
            damaged.append(Failure(video.video_id, video.uri, reason))
        else:
            videos.append(video)
    return videos, damaged + missing


def _stretch_fault(video: AnnotatedVideo, duration_s: float) -> str:
    start_s, end_s = video.start_s or 0.0, duration_s if video.end_s is None else video.end_s
    if start_s >= duration_s:
        return f"start_s {start_s:g} lies beyond the end of the video ({duration_s:.2f} s)"
    return f"end_s {end_s:g} is not after start_s {start_s:g}" if end_s <= start_s else ""


# --- the manifest ---------------------------------------------------------------------------------------------------


def manifest_of(
    videos: list[AnnotatedVideo],
    facts: Mapping[str, Facts],
    annotations: Annotations,
    held: dict[str, str],
    config: IndexConfig,
) -> pa.Table:
    """Return the manifest's table: stretches cut to the video, videos held out."""
    dataset = config.dataset or annotations.dataset or storage.absolute(config.videos).rstrip("/").rpartition("/")[2]
    # Column by column: a million rows as dicts would take gigabytes.
    columns: dict[str, Iterable[Any]] = {
        "dataset": (dataset for _ in videos),
        "split": (held.get(video.video_id) or video.split or "train" for video in videos),
        "start_s": (video.start_s or 0.0 for video in videos),
        "end_s": (_end_s(video, facts[video.uri]["duration_s"]) for video in videos),
    }
    columns |= {name: map(attrgetter(name), videos) for name in ("video_id", "uri", "label", "class_name", "target")}
    columns |= {name: map(itemgetter(name), (facts[video.uri] for video in videos)) for name in FACT_NAMES}
    about = Description(
        dataset=annotations.dataset,
        task=annotations.task,
        protocol=annotations.protocol,
        listed=listed_counts(annotations.videos, held),
    )
    arrays = [pa.array(columns[field.name], field.type, size=len(videos)) for field in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(metadata(annotations.classes, about)))


def _end_s(video: AnnotatedVideo, duration_s: float) -> float:
    return duration_s if video.end_s is None else min(video.end_s, duration_s)
