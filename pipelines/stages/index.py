"""Stage `index`: probe videos into a manifest.

--source folder     VIDEOS/[{train,val,test}/][CLASS/]name.mp4
--source csv        any layout, with a csv: video[,label,target,split,start_s,end_s]
--source lvu ...    a benchmark's own annotation files (see annotations/); its videos by their ids, anywhere in VIDEOS
OUT/manifest.parquet    one row a video that decodes (see manifest.py)
OUT/rejects.parquet     video_id, uri, reason of every other that is listed
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pipelines import storage
from pipelines.config import DecodeConfig, IndexConfig
from pipelines.data.annotations import breakfast, coin, kinetics, lvu, own
from pipelines.data.annotations.shared import AnnotatedVideo, Annotations
from pipelines.data.clip_batches import in_chunks, limit
from pipelines.data.decode_tasks import probe_chunk
from pipelines.data.manifest import MANIFEST, SCHEMA, SPLITS, Description, lone_classes, metadata, splits
from pipelines.errors import UserError
from pipelines.running.resources import ensure_ray, resources
from pipelines.running.stage import Stage, stage_run
from s5.errors import Failure

EXTENSIONS = ("mp4", "avi", "mkv", "mov", "webm", "m4v", "mpg", "mpeg", "ts", "wmv", "flv", "ogv", "3gp")
"""Endings of the files that are taken for videos."""
BENCHMARKS = {"lvu": lvu.read, "breakfast": breakfast.read, "coin": coin.read, "kinetics": kinetics.read}
"""Readers of annotations whose videos are named by ids without endings."""
BENCHMARK_VAL_SHARE = 0.1
"""Share held out for validation of a benchmark that has no such split, where the settings say nothing."""
FIRST_CLASSES = 5
"""Classes named in a warning."""


def run(config: IndexConfig) -> dict[str, Any]:
    """Probe all videos and write the manifest and the rejects.

    Returns:
        The stage's result; counts of `listed` videos, `videos`, `rejects`, `ignored` files and the videos of each
        split, and under `splits` those listed, found and rejected in each.

    Raises:
        UserError: there are no videos, none can be read, or the annotations are wrong.
    """
    annotations, ignored = list_videos(config)
    held = hold_out(annotations.videos, shares(annotations, config), config.seed)
    ensure_ray()
    with stage_run("index", config) as stage:
        found = sum(not video.reason for video in annotations.videos)
        what = " ".join(filter(None, (annotations.dataset, annotations.task, f"{len(annotations.videos)} videos")))
        what += f" in {len(annotations.classes)} classes" if annotations.classes else ""
        stage.info(f"{what}, {found} found below {config.videos}; {ignored} other files")
        rows, rejects = probe_all(annotations.videos, config.data, stage)
        stage.replace_rejects(rejects)
        if not rows:
            stage.folder.remove(MANIFEST)
            raise stage.none_readable()
        keep_learnable(rows, held)
        table = manifest_of(rows, annotations, held, config)
        stage.folder.write_table(MANIFEST, table)
        summarise(stage, table, annotations, held, ignored)
    return stage.result


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


def list_videos(config: IndexConfig) -> tuple[Annotations, int]:
    """Return what the annotations or the folder list, videos by id, and the number of files that are none of them.

    Raises:
        UserError: the folder or annotations are missing or have no videos, or the annotations are wrong.
    """
    source = config.source if config.source != "auto" else "csv" if config.annotations else "folder"
    if source in BENCHMARKS:
        # Before the folder, whose listing may take minutes.
        annotations = BENCHMARKS[source](config.annotations)
        files, ignored = _video_files(config.videos)
        videos = by_id(annotations.videos, files, config.videos)
        if all(video.reason for video in videos):
            raise UserError(
                f"videos is {config.videos!r}: none of the {len(videos)} videos that the annotations list is in it or "
                f"below it, such as {videos[0].name}.mp4; {len(files)} other videos are"
            )
    else:
        files, ignored = _video_files(config.videos)
        annotations = own.from_csv(config.annotations, files) if source == "csv" else own.from_folder(files)
        videos = by_name(annotations.videos, files, config.videos)
    if not videos:
        where = f"annotations is {config.annotations!r}: it lists no videos"
        where = where if config.annotations else f"videos is {config.videos!r}: no videos below it"
        raise UserError(f"{where}; looked for files that end in {', '.join(EXTENSIONS)}")
    ignored += len(files) - len({video.name for video in videos if not video.reason})
    return replace(annotations, videos=sorted(videos, key=lambda video: video.video_id)), ignored


def _video_files(folder: str) -> tuple[list[str], int]:
    """Return the names of a folder's video files and the number of other files; hidden ones are neither."""
    if not storage.is_folder(folder):
        raise UserError(f"videos is {folder!r}: there is no such folder")
    system, inner = storage.filesystem(folder)
    infos = system.get_file_info(fs.FileSelector(inner, recursive=True))
    files = [info.path.removeprefix(inner.rstrip("/") + "/") for info in infos if info.type == fs.FileType.File]
    visible = [name for name in files if not name.startswith(".") and "/." not in name]
    videos = sorted(name for name in visible if name.rpartition(".")[2].lower() in EXTENSIONS)
    return videos, len(visible) - len(videos)


def by_name(videos: list[AnnotatedVideo], files: list[str], folder: str) -> list[AnnotatedVideo]:
    """Return videos with their files, or the reason why they have none; their names are paths below the folder."""
    root, known = storage.absolute(folder).rstrip("/"), set(files)
    return [
        replace(
            video,
            uri=f"{root}/{video.name}",
            reason="" if video.name in known else f"listed in {video.location}, not found as {video.name}",
        )
        for video in videos
    ]


def by_id(videos: list[AnnotatedVideo], files: list[str], folder: str) -> list[AnnotatedVideo]:
    """Return videos with their files; their names are paths without ending, in the folder or in any below it."""
    root = storage.absolute(folder).rstrip("/")
    depth = 1 + videos[0].name.count("/")
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    for file in files:
        ending = "/".join(file.rpartition(".")[0].rsplit("/", depth)[-depth:])
        if first.setdefault(ending, file) != file:
            second[ending] = file

    def located(video: AnnotatedVideo) -> AnnotatedVideo:
        file = first.get(video.name)
        if file is None:
            reason = f"listed in {video.location}, not found as {video.name}.* in the folder or below it"
            return replace(video, uri=f"{root}/{video.name}", reason=video.reason or reason)
        both = f"found as {file} and as {second[video.name]}: leave one" if video.name in second else ""
        return replace(video, name=file, uri=f"{root}/{file}", reason=video.reason or both)

    return [located(video) for video in videos]


# --- probing --------------------------------------------------------------------------------------------------------


def probe_all(
    listed: list[AnnotatedVideo], data: DecodeConfig, stage: Stage
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Return a row for each video that can be read, with its facts and what was listed, and the others.

    Of these, the damaged ones come before those that are listed but not found.
    """
    rows: list[dict[str, Any]] = []
    rejects: list[Failure] = []
    missing = [Failure(video.video_id, video.uri, video.reason) for video in listed if video.reason]
    found = [video for video in listed if not video.reason]
    with stage.progress_bar("probed", len(found), "videos") as bar:
        for video, facts in zip(found, _probed(found, data), strict=True):
            reason = facts["reason"] or _stretch_fault(video, facts["duration_s"])
            if reason:
                rejects.append(Failure(video.video_id, video.uri, reason))
            else:
                rows.append(facts | asdict(video))
            bar.advance(f"{len(rejects)} rejects")
    return rows, rejects + missing


def _stretch_fault(video: AnnotatedVideo, duration_s: float) -> str:
    start_s, end_s = video.start_s or 0.0, duration_s if video.end_s is None else video.end_s
    if start_s >= duration_s:
        return f"start_s {start_s:g} lies beyond the end of the video ({duration_s:.2f} s)"
    return f"end_s {end_s:g} is not after start_s {start_s:g}" if end_s <= start_s else ""


def _probed(videos: list[AnnotatedVideo], data: DecodeConfig) -> Iterator[dict[str, Any]]:
    """Return the facts of each video in order, or the reason why there are none."""
    table = pa.table({"uri": pa.array([video.uri for video in videos], pa.string())})
    return in_tasks(table, partial(probe_chunk, timeout_s=data.decode_timeout_s), data)


def in_tasks(rows: pa.Table, work: Callable[[pa.Table], pa.Table], data: DecodeConfig) -> Iterator[dict[str, Any]]:
    """Yield what `work` makes of chunks of rows, row by row in order; one Ray Data execution.

    Raises:
        UserError: a task asks for more CPUs than there are.
    """
    cpus = resources().get("CPU", 0.0)
    if data.cpus_per_decode > cpus:
        raise UserError(f"data.cpus_per_decode is {data.cpus_per_decode:g}: the cluster has {cpus:g} CPUs; lower it")
    if len(rows) == 0:
        return
    dataset = in_chunks(rows, data.clips_per_task)
    limit(dataset, (data.decode_tasks or int(cpus / data.cpus_per_decode)) * data.cpus_per_decode)
    done = dataset.map_batches(work, batch_size=None, batch_format="pyarrow", num_cpus=data.cpus_per_decode)
    batches: Any = done.iter_batches(batch_size=None, batch_format="pyarrow")
    for batch in batches:
        yield from batch.to_pylist()


# --- splits ---------------------------------------------------------------------------------------------------------


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

    by_class: dict[str | None, list[AnnotatedVideo]] = {}
    for video in videos:
        if video.split in ("", "train"):
            by_class.setdefault(video.class_name, []).append(video)
    held: dict[str, str] = {}
    for members in by_class.values() if any(shares.values()) else ():
        spread = iter(sorted(members, key=place)[:-1])
        for split, share in shares.items():
            held |= {video.video_id: split for video in islice(spread, round(len(members) * share))}
    return held


def keep_learnable(rows: list[dict[str, Any]], held: dict[str, str]) -> None:
    """Give a held-out video back to training where no other video of its class could be read there."""
    learned = {row["class_name"] for row in rows if row["split"] in ("", "train") and row["video_id"] not in held}
    for row in rows:
        if row["video_id"] in held and row["class_name"] not in learned:
            del held[row["video_id"]]
            learned.add(row["class_name"])


def listed_counts(videos: list[AnnotatedVideo], held: dict[str, str]) -> dict[str, int]:
    """Return the number of videos of each split that has any."""
    counts = Counter(held.get(video.video_id) or video.split or "train" for video in videos)
    return {split: counts[split] for split in SPLITS if split in counts}


# --- the manifest ---------------------------------------------------------------------------------------------------


def manifest_of(
    rows: list[dict[str, Any]], annotations: Annotations, held: dict[str, str], config: IndexConfig
) -> pa.Table:
    """Return the manifest's table: stretches cut to the video, videos held out."""
    dataset = config.dataset or annotations.dataset or storage.absolute(config.videos).rstrip("/").rpartition("/")[2]
    for row in rows:
        row |= {"dataset": dataset, "split": held.get(row["video_id"]) or row["split"] or "train"}
        row |= {"start_s": row["start_s"] or 0.0, "end_s": min(row["end_s"] or row["duration_s"], row["duration_s"])}
    about = Description(
        dataset=annotations.dataset,
        task=annotations.task,
        protocol=annotations.protocol,
        listed=listed_counts(annotations.videos, held),
    )
    return pa.Table.from_pylist(rows, SCHEMA.with_metadata(metadata(annotations.classes, about)))
