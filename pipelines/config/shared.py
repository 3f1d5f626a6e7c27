"""Settings that several stages share: where runs are logged, workers, and decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from s5.config import PathRole, require, require_range

OutFolder = Annotated[str, PathRole("output", "folder")]
VideoFolder = Annotated[str, PathRole("input", "folder")]
AnnotationsPath = Annotated[str, PathRole("input", "file or folder")]
ManifestPath = Annotated[str, PathRole("input", "manifest")]
CheckpointPath = Annotated[str, PathRole("input", "checkpoint")]
FeaturesFiles = Annotated[str, PathRole("input", "folder")]
FeaturesPath = Annotated[str, PathRole("input", "features")]
TextPath = Annotated[str, PathRole("input", "file")]
LabelsPath = Annotated[str, PathRole("input", "file or folder")]
EncoderName = Annotated[str, PathRole("input", "folder", ("", "tfidf"), or_name=True)]
VideoNames = Annotated[str, PathRole("scope", "file or folder")]
RunsFolder = Annotated[str, PathRole("scope", "folder")]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are logged (MLflow)."""

    uri: str = ""
    """Tracking URI; empty for $MLFLOW_TRACKING_URI or else a database file `mlflow.db` beside --out; `off` for none."""
    experiment: str = "s5"
    """Name of the MLflow experiment."""
    run_name: str = ""
    """Name of the run; empty for the stage's name."""
    system_s: float = 10.0
    """Seconds between two samples of what the machine of the stage's own process does: CPUs, memory, disk, network and
    GPUs (MLflow's system metrics); 0 for none."""

    def __post_init__(self) -> None:
        require(0 <= self.system_s < float("inf"), "tracking.system_s", self.system_s, "give 0 or more seconds")


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Workers and what each of them holds (Ray Train)."""

    num_workers: int = 1
    """Data-parallel workers. 0 works in the process of the stage itself: it starts many seconds sooner, and if it is
    lost nothing replaces it (the same command resumes)."""
    min_workers: int = 0
    """Workers with which training starts, or resumes, where the cluster has no room for all: it grows to `num_workers`
    once there is room. 0 to wait for all."""
    resize_interval_s: float = 60.0
    """Seconds between two looks for room for more workers; more of them start from the last checkpoint."""
    cpus_per_worker: float = 1.0
    """CPUs that a training worker holds for its whole life."""
    gpus_per_worker: float = 0.0
    """GPUs of a training worker; more than 0 trains on CUDA with NCCL."""
    max_failures: int = 3
    """How often workers that fail or hang are replaced, from the last checkpoint, before the run fails; workers that
    are lost with their node, or told to end, are replaced without counting."""
    start_timeout_s: float = 600.0
    """Seconds that the workers may take to start."""
    hang_timeout_s: float = 1800.0
    """Seconds after which a worker that gets no further counts as hanging: it is ended and replaced. Longer than the
    longest step, evaluation, wait for data or saving of a checkpoint; 0 for never."""

    @property
    def world_size(self) -> int:
        """Processes that do the work, that of the stage included where it is one of them."""
        return self.num_workers or 1

    def require_workers(self) -> None:
        """Raise `ValueError` where there are none, for a stage whose own process does not do their work."""
        remedy = "give at least 1: this stage does not work in its own process"
        require(self.num_workers >= 1, "scale.num_workers", self.num_workers, remedy)

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, "scale.num_workers", self.num_workers, "give 0 or more")
        require(self.cpus_per_worker > 0, "scale.cpus_per_worker", self.cpus_per_worker, "give more than 0")
        require(self.gpus_per_worker >= 0, "scale.gpus_per_worker", self.gpus_per_worker, "give 0 or more")
        fits = 0 <= self.min_workers <= self.num_workers
        require(fits, "scale.min_workers", self.min_workers, f"give 0 to scale.num_workers, {self.num_workers}")
        require(self.resize_interval_s > 0, "scale.resize_interval_s", self.resize_interval_s, "give more than 0")
        require(self.max_failures >= 0, "scale.max_failures", self.max_failures, "give 0 or more")
        hang_fits = self.hang_timeout_s == 0 or self.hang_timeout_s >= 2
        require(hang_fits, "scale.hang_timeout_s", self.hang_timeout_s, "give at least 2, or 0 for never")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How decode tasks are shared out (Ray Data)."""

    cpus_per_decode: float = 1.0
    """CPUs that one decode task holds."""
    decode_tasks: int = 0
    """Decode tasks that run at once for all workers together; 0 for as many as the free CPUs allow."""
    clips_per_task: int = 8
    """Videos that one decode task reads."""
    decode_timeout_s: float = 120.0
    """Seconds that one video may take before its decoder is ended and the video counts as unreadable."""

    def __post_init__(self) -> None:
        require(self.cpus_per_decode > 0, "data.cpus_per_decode", self.cpus_per_decode, "give more than 0")
        require(self.decode_tasks >= 0, "data.decode_tasks", self.decode_tasks, "give 0 or more")
        require(self.clips_per_task >= 1, "data.clips_per_task", self.clips_per_task, "give at least 1")
        require(self.decode_timeout_s > 0, "data.decode_timeout_s", self.decode_timeout_s, "give more than 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig(DecodeConfig):
    """How clips are decoded for a model."""

    prefetch_batches: int = 2
    """Batches that are kept ready for each worker."""
    max_failure_share: float = 0.05
    """Share of videos that may fail to decode before the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prefetch_batches >= 0, "data.prefetch_batches", self.prefetch_batches, "give 0 or more")
        require_range("data.max_failure_share", self.max_failure_share, 0, 1)
