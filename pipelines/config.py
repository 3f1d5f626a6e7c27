"""Settings of every stage; how they are changed is in `dotted.py`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from pipelines.dotted import UserError as UserError
from pipelines.dotted import flatten as flatten
from pipelines.dotted import override as override
from pipelines.dotted import unknown as unknown
from s5.config import ClipConfig, LoopConfig, LSMCLConfig, ModelConfig, OptimConfig, require, require_range

ProtocolChoice = Literal["auto", "uniform", "windows", "whole", "multi-clip"]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are logged (MLflow)."""

    uri: str = ""
    """Tracking URI; empty for $MLFLOW_TRACKING_URI or else a database file `mlflow.db` beside --out; `off` for none."""
    experiment: str = "s5"
    """Name of the MLflow experiment."""
    run_name: str = ""
    """Name of the run; empty for the stage's name."""


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Workers and what each of them holds (Ray Train)."""

    num_workers: int = 1
    """Data-parallel training workers."""
    cpus_per_worker: float = 1.0
    """CPUs that a training worker holds for its whole life."""
    gpus_per_worker: float = 0.0
    """GPUs of a training worker; more than 0 trains on CUDA with NCCL."""
    max_failures: int = 3
    """How often lost workers are replaced, from the last checkpoint, before the run fails."""
    start_timeout_s: float = 600.0
    """Seconds that the workers may take to start."""

    def __post_init__(self) -> None:
        require(self.num_workers >= 1, "scale.num_workers", self.num_workers, "give at least 1")
        require(self.cpus_per_worker > 0, "scale.cpus_per_worker", self.cpus_per_worker, "give more than 0")
        require(self.gpus_per_worker >= 0, "scale.gpus_per_worker", self.gpus_per_worker, "give 0 or more")
        require(self.max_failures >= 0, "scale.max_failures", self.max_failures, "give 0 or more")


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


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Render the sample data set: long-form H.264 videos of ten activities made of shared steps, with annotations."""

    out: str = "out/sample"
    """Folder for the videos and annotations."""
    videos: int = 480
    """Number of videos, all splits together."""
    classes: Literal["all", "order-only"] = "all"
    """`all`: ten activities; `order-only`: six of the same steps each, told apart by their order alone."""
    difficulty: Literal["easy", "hard"] = "easy"
    """`easy`: plain backgrounds and one colour a step; `hard`: photographs behind and free colours."""
    seconds: float = 64.0
    """Mean length of a video."""
    fps: int = 8
    """Frames a second."""
    size: int = 64
    """Height and width of a frame in pixels."""
    val_share: float = 0.15
    """Share of the videos in the validation split."""
    test_share: float = 0.25
    """Share of the videos in the test split."""
    seed: int = 0
    """Seed of everything that is drawn."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged."""

    def __post_init__(self) -> None:
        require(self.videos >= 1, "videos", self.videos, "give at least 1")
        require(self.fps >= 1, "fps", self.fps, "give at least 1")
        require(self.seconds >= 10, "seconds", self.seconds, "give at least 10")
        require(self.size >= 32 and self.size % 2 == 0, "size", self.size, "give an even number of at least 32")
        require(0 <= self.val_share < 1, "val_share", self.val_share, "give a value in [0, 1)")
        require(0 <= self.test_share < 1 - self.val_share, "test_share", self.test_share, "leave room for training")


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Probe videos, of a folder, a csv or a benchmark, into manifest.parquet and rejects.parquet."""

    out: str = "out/index"
    """Folder for manifest.parquet and rejects.parquet."""
    source: Literal["auto", "folder", "csv", "lvu", "breakfast", "coin", "kinetics"] = "auto"
    """What lists the videos; `auto`: a `csv` where annotations are given, else the `folder`."""
    videos: str = "out/sample"
    """Folder of videos, of a benchmark ID.ENDING at any depth; `folder`: [{train,val,test}/][CLASS/]name.ENDING."""
    annotations: str = ""
    """A csv with `video` (path below the folder) and any of `label`, `target`, `split`, `start_s`, `end_s`; or the
    folder of an LVU task, that of the csv files of Breakfast or Kinetics, COIN.json."""
    dataset: str = ""
    """Name of the data set in the manifest; empty for the benchmark's or the folder's name."""
    val_share: float | None = None
    """Share of the training videos held out, by class and seed, for validation where there is no such split; where it
    is not given, 0.1 of a benchmark and none of own data."""
    test_share: float = 0.0
    """Share of the training videos held out, by class and seed, for testing where there is no such split."""
    seed: int = 0
    """Seed of the hold-out."""
    data: DecodeConfig = field(default_factory=DecodeConfig)
    """Decoding."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged."""

    def __post_init__(self) -> None:
        require(bool(self.videos), "videos", self.videos, "give a folder of videos")
        if self.source == "folder":
            require(not self.annotations, "annotations", self.annotations, "source folder takes none; give its source")
        elif self.source != "auto":
            require(bool(self.annotations), "annotations", self.annotations, f"give those of source {self.source}")
        require(0 <= (self.val_share or 0) < 1, "val_share", self.val_share, "give a value in [0, 1)")
        room = 1 - (self.val_share or 0)
        require(0 <= self.test_share < room, "test_share", self.test_share, "leave room for training")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain with LSMCL: long and short clips of unlabelled videos, momentum encoder, symmetric InfoNCE."""

    out: str = "out/pretrain"
    """Folder for checkpoints and result.json; a second start with the same folder resumes."""
    manifest: str = "out/index/manifest.parquet"
    """Manifest of the videos: a file, or the folder that `index` wrote."""
    clips: ClipConfig = field(default_factory=ClipConfig)
    """Long and short clips."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder."""
    lsmcl: LSMCLConfig = field(default_factory=LSMCLConfig)
    """Contrastive task."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length and rhythm."""
    probe_videos: int = 512
    """Labelled training videos that a kNN probe compares with; 0 for no probe."""
    data: DataConfig = field(default_factory=DataConfig)
    """Decoding."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Workers."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged."""

    def __post_init__(self) -> None:
        require_divisible(self.loop.batch_size, self.scale.num_workers)
        # Fails unless tubelets divide the clip.
        self.model.backbone.steps(self.clips.frames)
        require(self.loop.batch_size != 1, "loop.batch_size", self.loop.batch_size, "contrast needs at least 2 videos")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune a video model on labels, from a pretrained checkpoint or from scratch."""

    out: str = "out/finetune"
    """Folder for checkpoints and result.json; a second start with the same folder resumes."""
    manifest: str = "out/index/manifest.parquet"
    """Manifest of the videos: a file, or the folder that `index` wrote."""
    checkpoint: str = ""
    """Pretrained checkpoint to start from: its folder or the --out of `pretrain`; empty to start from scratch."""
    task: Literal["class", "regression"] = "class"
    """What is learnt: the manifest's `label` (cross-entropy) or its `target` (squared error)."""
    clips: ClipConfig = field(default_factory=ClipConfig)
    """Clips; only the long stride is used."""
    protocol: ProtocolChoice = "auto"
    """Which clips are learnt from and validated on, see `evaluate`; `auto`: those of the manifest's benchmark."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Video model."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, weight_decay=0.05))
    """Optimiser."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length and rhythm."""
    data: DataConfig = field(default_factory=DataConfig)
    """Decoding."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Workers."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged."""

    def __post_init__(self) -> None:
        require_divisible(self.loop.batch_size, self.scale.num_workers)
        # Fails unless tubelets divide the clip.
        self.model.backbone.steps(self.clips.frames)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a checkpoint: accuracy or error of a fine-tuned model; kNN and nearest clips of a pretrained one."""

    out: str = "out/evaluate"
    """Folder for metrics.json, predictions.parquet, figures and result.json."""
    checkpoint: str = "out/finetune"
    """Checkpoint: its folder or the --out of `pretrain` or `finetune`."""
    manifest: str = "out/index/manifest.parquet"
    """Manifest of the videos: a file, or the folder that `index` wrote."""
    split: str = "test"
    """Split to evaluate on."""
    protocol: ProtocolChoice = "auto"
    """Clips whose predictions are averaged: `windows` of T long strides at every second (LVU), `whole`: clips over the
    whole video (Breakfast, COIN), `multi-clip` (Kinetics) and `uniform`: long clips evenly spread; `auto`: those that
    fine-tuning was set to, else the manifest's benchmark's; for a pretrained encoder `uniform`."""
    clips_per_video: int = 0
    """Clips of each video; 0 for 10 in protocol multi-clip and else 1. `windows` takes all."""
    batch_size: int = 16
    """Clips that the model sees at once."""
    neighbours: int = 5
    """Nearest clips shown for each query clip (pretrained checkpoints)."""
    data: DataConfig = field(default_factory=DataConfig)
    """Decoding."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Workers: replicas of the model."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged."""

    def __post_init__(self) -> None:
        require(self.clips_per_video >= 0, "clips_per_video", self.clips_per_video, "give 0 or more")
        for name in ("batch_size", "neighbours"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Sweep settings of pretraining and fine-tuning with Ray Tune, one trial a combination."""

    out: str = "out/sweep"
    """Folder for the trials and result.json; a second start with the same folder resumes."""
    space: tuple[str, ...] = ("lsmcl.mask_ratio=0.25,0.5,0.75", "clips.frames=8,16")
    """What varies: `key=value,value,...` (every combination) or `key=uniform(a,b)`, `key=loguniform(a,b)` (drawn
    `samples` times). A key of both stages, such as clips.frames, is set in both; `pretrain.KEY` in one."""
    stages: Literal["pretrain", "finetune", "pretrain+finetune"] = "pretrain+finetune"
    """What a trial runs."""
    metric: str = ""
    """Metric to compare; empty for `val/accuracy` (`val/mse` in regression) or, after pretraining alone, `knn/top1`."""
    samples: int = 1
    """Draws from the random parts of the space."""
    concurrent_trials: int = 0
    """Trials that run at once; 0 for as many as the cluster holds."""
    early_stopping: bool = False
    """Stop poor trials early (ASHA on the last stage's epochs)."""
    seed: int = 0
    """Seed of the drawn values."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Settings of every trial's pretraining."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Settings of every trial's fine-tuning."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the sweep and its trials are logged."""

    def __post_init__(self) -> None:
        require(len(self.space) > 0, "space", self.space, "give at least one key=value,value")
        require(self.samples >= 1, "samples", self.samples, "give at least 1")
        require(self.concurrent_trials >= 0, "concurrent_trials", self.concurrent_trials, "give 0 or more")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Tables and figures of what MLflow holds: results by stage, learning curves, sweep maps."""

    out: str = "out/report"
    """Folder for report.md, the figures and result.json."""
    runs: str = ""
    """Only runs whose --out lies below this folder; empty for the whole experiment."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the runs are logged."""


def require_divisible(batch_size: int, num_workers: int) -> None:
    """Raise `ValueError` unless the global batch can be shared evenly."""
    remedy = f"give a multiple of scale.num_workers, {num_workers}"
    require(batch_size % num_workers == 0, "loop.batch_size", batch_size, remedy)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One value for every stage: what a preset is. `python -m pipelines STAGE` uses the field of that name."""

    sample: SampleConfig = field(default_factory=SampleConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


StageConfig = SampleConfig | IndexConfig | PretrainConfig | FinetuneConfig | EvaluateConfig | SweepConfig | ReportConfig
STAGES: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(RunConfig))
