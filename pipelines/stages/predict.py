"""Stage `predict`: what videos of any length show, by a fine-tuned model; on the command line `predict VIDEO...`.

OUT/predictions.parquet  a row a video (`data.predicting.rows.PREDICTED`)
OUT/rejects.parquet      video_id, uri, reason of those that cannot be read
OUT/shards/              the rows found so far, from which a run that was ended resumes

A few videos are predicted in the process of the stage, without Ray; with `scale.num_workers` by actors in a cluster.
Predictions go to stdout, and all that is said beside them to stderr.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.config import REGISTERED, PredictConfig
from pipelines.data.indexing import video_files
from pipelines.data.predicting.rows import PREDICTED, reject_of
from pipelines.data.predicting.summary import Printer, Summary
from pipelines.data.predicting.worker import OnPrediction, PredictWorker
from pipelines.errors import UserError
from pipelines.running import progress
from pipelines.running.progress import ProgressBar
from pipelines.running.run_folder import SHARDS
from pipelines.running.stage import Stage, finished, stage_run
from pipelines.storage.weights import local_checkpoint
from s5.checkpoints.checkpoint import digest
from s5.errors import CheckpointError, Failure, VideoError
from s5.evaluation.prediction import Predictor, VideoPrediction, load_model
from s5.video.reading import VideoFacts

PREDICTIONS = "predictions.parquet"
CLASSES = b"classes"
"""Key of the metadata of predictions.parquet: names of the classes, as JSON, in the order of `scores`."""
SHEET_FRAME = 224
"""Height and width of the frames of a contact sheet in pixels."""
PATTERN = "*?["
"""Characters that make a name a pattern, unless a file has it."""


def run(config: PredictConfig) -> dict[str, Any]:
    """Predict all videos and return the stage's result, without --out its counts and metrics; the same --out resumes.

    Raises:
        UserError: there are no videos, the checkpoint predicts nothing of them, or none can be read.
        StageError: predicting failed.
    """
    printer = Printer(sys.stdout)
    with redirect_stdout(sys.stderr):
        videos, faults = listed(config.videos)
        check_pictures(config, videos)
        with checkpoint_folder(config) as folder:
            predictor = predictor_of(config, folder)
            printer.classes = predictor.meta.classes
            summary = Summary()
            for fault in faults:
                printer.show(row := reject_of(fault.uri, fault.reason))
                summary.add(row)
            if config.out:
                return stored(config, predictor, digest(folder), videos, printer, summary)
            with progress_bar(videos) as bar:
                for row in own_rows(config, predictor, videos, bar):
                    printer.show(row)
                    summary.add(row)
            progress.info("predict", summary.in_words())
            return {"stage": "predict", "counts": summary.counts, "metrics": summary.metrics}


def listed(given: tuple[str, ...]) -> tuple[list[str], list[Failure]]:
    """Return the videos that names, folders and patterns stand for, each once, and those that cannot be any.

    Raises:
        UserError: there are none, or a name holds credentials.
    """
    if not given:
        raise UserError("videos is (): give at least one, as in `predict a.mp4`")
    videos: list[str] = []
    faults: list[Failure] = []
    for name in given:
        storage.check_no_credentials(name)
        web = name.startswith(("http://", "https://"))
        if not web and storage.is_folder(name):
            below = video_files.find(name)
            videos += [storage.join(name, video) for video in below.videos]
            faults += [Failure(fault, storage.join(name, fault), reason) for fault, reason in below.faults]
            if not below.videos and not below.faults:
                raise UserError(f"videos is {name!r}: there is no video below that folder")
        elif not storage.is_uri(name) and not os.path.exists(name) and any(c in name for c in PATTERN):
            matching = sorted(glob.glob(os.path.expanduser(name), recursive=True))
            if not matching:
                raise UserError(f"videos is {name!r}: no file has a name like that")
            for found in matching:
                more, wrong = listed((found,)) if os.path.isdir(found) else ([found], [])
                videos += more
                faults += wrong
        else:
            videos.append(name)
    return list(dict.fromkeys(videos)), faults


def check_pictures(config: PredictConfig, videos: list[str]) -> None:
    """Check that an overlay and a contact sheet are of one video, are not that video itself, and can be written.

    Raises:
        UserError: names the setting.
    """
    for name in ("overlay", "contact_sheet"):
        if not (path := getattr(config, name)):
            continue
        said = f"{name} is {path!r}"
        if len(videos) != 1:
            raise UserError(f"{said}: it is of one video, and there are {len(videos)}; give one")
        place = storage.absolute(path)
        if place == storage.absolute(videos[0]) or (os.path.exists(place) and os.path.samefile(place, videos[0])):
            raise UserError(f"{said}: that is the video itself; give another name")
        if not storage.is_uri(place):
            folder = os.path.dirname(place)
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as error:
                raise UserError(f"{said}: its folder cannot be made ({error.strerror})") from None
            if not os.access(folder, os.W_OK) or os.path.isdir(place):
                raise UserError(f"{said}: it cannot be written there; give another name")


@contextmanager
def checkpoint_folder(config: PredictConfig) -> Iterator[Path]:
    """Yield the checkpoint as a local folder.

    Raises:
        UserError: there is none.
    """
    if not config.checkpoint.startswith(REGISTERED):
        with local_checkpoint(config.checkpoint) as folder:
            yield folder
        return
    # MLflow takes seconds to import.
    from pipelines.tracking.registry import registered_checkpoint

    # Without --out, the database is the one beside the default --outs of the other stages.
    with registered_checkpoint(config.checkpoint, config.tracking, config.out or "out/predict") as folder:
        yield folder


def predictor_of(config: PredictConfig, folder: Path) -> Predictor:
    """Return the checkpoint's model as the settings use it, on this process' device where it works there.

    Raises:
        UserError: it predicts nothing of a video, or keeps all tokens though its kept ones are asked for.
    """
    try:
        trained = load_model(folder)
        keeps = bool(config.overlay or config.contact_sheet)
        predictor = Predictor(
            trained, config.protocol, config.clips_per_video, config.every_s, config.batch_size, keeps
        )
    except (CheckpointError, ValueError) as error:
        raise UserError(f"checkpoint is {config.checkpoint!r}: {error}") from None
    if config.scale.gpus_per_worker and not config.scale.num_workers:
        # It imports Ray, which nothing else needs here.
        from pipelines.running.resources import own_device

        trained.model.to(own_device(config.scale))
    return predictor


# --- rows -----------------------------------------------------------------------------------------------------------


def progress_bar(videos: list[str]) -> ProgressBar:
    """Return the bar over the videos."""
    return ProgressBar("predict", "predicted", len(videos), "videos")


def own_rows(
    config: PredictConfig, predictor: Predictor, videos: list[str], bar: ProgressBar
) -> Generator[dict[str, Any]]:
    """Yield the row of each video, predicted in this process, and make the pictures that are asked for."""
    done = 0

    def show(video: str, at_s: float, of_s: float) -> None:
        bar.move_to(done, f"{at_s:.0f} of {of_s:.0f} s of {os.path.basename(video)}")

    with closing(PredictWorker(predictor, config.data.decode_timeout_s, show, pictures(config))) as worker:
        for row in worker.rows(videos):
            done += 1
            yield row
            bar.move_to(done)


def pictures(config: PredictConfig) -> OnPrediction | None:
    """Return what makes the overlay and the contact sheet of a prediction; None where none is asked for."""
    if not (config.overlay or config.contact_sheet):
        return None
    # matplotlib takes a second to import.
    from pipelines.data.predicting import overlay
    from pipelines.plots.contact_sheet import draw_contact_sheet

    def draw(video: str, facts: VideoFacts, found: VideoPrediction) -> None:
        try:
            make(video, facts, found)
        except (OSError, VideoError) as error:
            # What is predicted is not lost with its pictures.
            progress.info("predict", f"no overlay or contact sheet of {video}: {error}")

    def make(video: str, facts: VideoFacts, found: VideoPrediction) -> None:
        assert found.kept is not None
        with storage.open_video(video, whole=True) as source:
            if config.overlay:
                with storage.atomic_write(storage.absolute(config.overlay)) as part:
                    overlay.write_overlay(source, facts, found.kept, part)
                progress.info("predict", f"tokens that are dropped, dimmed -> {config.overlay}")
            if config.contact_sheet:
                places = overlay.most_kept(found.kept)
                frames = overlay.dimmed_frames(source, facts, found.kept, places, SHEET_FRAME)
                storage.write_bytes(
                    storage.absolute(config.contact_sheet),
                    draw_contact_sheet(os.path.basename(video), found, places, frames),
                )
                progress.info("predict", f"frames with most tokens kept -> {config.contact_sheet}")

    return draw


def stored(
    config: PredictConfig,
    predictor: Predictor,
    checkpoint: str,
    videos: list[str],
    printer: Printer,
    summary: Summary,
) -> dict[str, Any]:
    """Predict the videos that --out does not hold yet, shard by shard, and return the stage's result."""
    names = hashlib.blake2b("\n".join(videos).encode(), digest_size=12).hexdigest()
    inputs = {"checkpoint": checkpoint, "list of videos": names}
    if (result := finished("predict", config, inputs, redo="predict again")) is not None:
        return result
    if config.scale.num_workers:
        from pipelines.running.resources import check_cluster

        check_cluster(config.scale, config.data)
    with stage_run("predict", config, inputs=inputs) as stage:
        size = config.shard_videos
        shards = [
            (stage.path(SHARDS, f"{first // size:06}.parquet"), videos[first : first + size])
            for first in range(0, len(videos), size)
        ]
        left = [shard for shard in shards if not storage.exists(shard[0])]
        if len(left) < len(shards):
            stage.info(f"{len(shards) - len(left)} of {len(shards)} shards are there already")
        with progress_bar([video for _, part in left for video in part]) as bar:
            for table in predicted(config, predictor, left, bar):
                for row in table.to_pylist():
                    printer.show(row)
        join(stage, [path for path, _ in shards], predictor.meta.classes, summary)
        stage.info(summary.in_words())
        stage.metrics |= summary.metrics
        stage.counts |= summary.counts
        storage.remove_folder(stage.path(SHARDS))
        stage.info(f"{summary.videos} predictions -> {stage.path(PREDICTIONS)}")
    return stage.result


def predicted(
    config: PredictConfig, predictor: Predictor, shards: list[tuple[str, list[str]]], bar: ProgressBar
) -> Iterator[pa.Table]:
    """Yield the rows of each shard, which is stored then."""
    if config.scale.num_workers and shards:
        from pipelines.data.predicting import cluster

        done = 0
        for table in cluster.predicted(config, predictor, shards):
            done += len(table)
            bar.move_to(done)
            yield table
        return
    rows = own_rows(config, predictor, [video for _, part in shards for video in part], bar)
    with closing(rows):
        for path, part in shards:
            table = pa.Table.from_pylist([next(rows) for _ in part], PREDICTED)
            storage.write_table(path, table)
            yield table


def join(stage: Stage, paths: list[str], classes: list[str], summary: Summary) -> None:
    """Write predictions.parquet and rejects.parquet from the shards, and add their rows to the summary."""
    kept = PREDICTED.remove(PREDICTED.get_field_index("reason")).with_metadata({CLASSES: json.dumps(classes).encode()})
    with storage.table_writer(stage.path(PREDICTIONS), kept) as writer:
        for path in paths:
            table = storage.read_table(path)
            for row in table.to_pylist():
                summary.add(row)
            writer.write_table(table.filter(table["reason"].is_null()).select(kept.names).cast(kept))
    stage.replace_rejects(summary.rejects)
