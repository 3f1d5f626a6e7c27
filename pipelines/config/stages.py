"""Settings of the stages that train, evaluate and report; how they are changed is in `dotted.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from pipelines.config.dotted import flatten as flatten
from pipelines.config.dotted import override as override
from pipelines.config.dotted import unknown as unknown
from pipelines.config.shared import (
    CheckpointPath,
    FeaturesFiles,
    FeaturesPath,
    LabelsPath,
    ManifestPath,
    OutFolder,
    RunsFolder,
)
from pipelines.config.shared import DataConfig as DataConfig
from pipelines.config.shared import DecodeConfig as DecodeConfig
from pipelines.config.shared import ScaleConfig as ScaleConfig
from pipelines.config.shared import TrackingConfig as TrackingConfig
from pipelines.config.videos import IndexConfig as IndexConfig
from pipelines.config.videos import SampleConfig as SampleConfig
from pipelines.config.videos import TranscodeConfig as TranscodeConfig
from s5.config import (
    SEGMENTS,
    BackboneConfig,
    ClipConfig,
    LoopConfig,
    LSMCLConfig,
    ModelConfig,
    OptimConfig,
    ViewsConfig,
    require,
)

IMPORT_NEEDS = "name what made the features of --import, as in model.backbone.name of training; else leave it out"
ProtocolSetting = Literal["auto", "uniform", "windows", "whole", "multi-clip"]
ProbeSetting = Literal["knn", "linear", "both"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain with LSMCL: long and short clips of unlabelled videos, momentum encoder, symmetric InfoNCE."""

    out: OutFolder = "out/pretrain"
    """Folder for checkpoints and result.json; a second start with the same folder resumes."""
    manifest: ManifestPath = "out/index/manifest.parquet"
    """Manifest of the videos: a file, or the folder that `index` wrote."""
    features: FeaturesPath = ""
    """Cached features to read in place of videos: the --out of `features`. The backbone has to be frozen, and tokens
    masked."""
    clips: ClipConfig = field(default_factory=ClipConfig)
    """Long and short clips."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder."""
    views: ViewsConfig = field(default_factory=lambda: ViewsConfig(jitter=0.4))
    """Random views of clips."""
    lsmcl: LSMCLConfig = field(default_factory=LSMCLConfig)
    """Contrastive task."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length and rhythm."""
    probe: ProbeSetting = "knn"
    """What the classes of labelled videos of split val are found with from the encoder's features, at each evaluation:
    see `evaluate`. A linear probe of wide features takes many seconds."""
    probe_videos: int = 512
    """Labelled training videos that the probe learns from; 0 for no probe."""
    data: DataConfig = field(default_factory=DataConfig)
    """Decoding."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Workers."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged."""

    def __post_init__(self) -> None:
        require_shared(self.loop.batch_size, self.scale.world_size)
        require_features(self.model.backbone, self.features)
        # Fails unless tubelets divide the clip.
        self.model.backbone.steps(self.clips.frames)
        require(self.loop.batch_size != 1, "loop.batch_size", self.loop.batch_size, "contrast needs at least 2 videos")
        require(self.probe_videos >= 0, "probe_videos", self.probe_videos, "give 0 or more")
        remedy = f"probe {self.probe} learns from labelled videos; give at least 2, or leave the probe out"
        require(self.probe == "knn" or self.probe_videos >= 2, "probe_videos", self.probe_videos, remedy)
        if self.features:
            frozen = self.model.backbone.frozen
            require(frozen, "model.backbone.frozen", frozen, "cached features are of a frozen backbone; give True")
            masked = self.lsmcl.mask_on
            require(masked == "tokens", "lsmcl.mask_on", masked, "cached features are of whole frames; give tokens")
            require_no_views(self.views)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The part of a video model that features come from."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Frame encoder."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Encode the frames of a manifest's videos once, by a backbone that stays as it is; or import such features."""

    out: OutFolder = "out/features"
    """Folder for the shards, index.parquet and features.json; a second start with the same folder resumes."""
    manifest: ManifestPath = "out/index/manifest.parquet"
    """Manifest of the videos: a file, or the folder that `index` wrote."""
    checkpoint: CheckpointPath = ""
    """Checkpoint that the backbone's weights are taken from: its folder or the --out of `pretrain` or `finetune`; empty
    for model.backbone.weights."""
    import_: FeaturesFiles = ""
    """Folder of features that another program made, a file (T, N, D) or (T, D) per video, named by the video's id or
    its file; empty to encode frames. On the command line: --import."""
    format: Literal["auto", "npy", "npz", "pt", "safetensors", "h5"] = "auto"
    """Format of these files; `auto`: what their endings say."""
    backbone: str = ""
    """Name of what made these features; training has to give the same as model.backbone.name."""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    """What encodes the frames."""
    frames_per_second: float = 1.0
    """Frames encoded of a second of video; of imported features their frame rate."""
    segment_s: float = 0.0
    """Seconds of each of the segments that videos are cut into, of which the checkpoint's whole video model makes one
    embedding each (for `model.backbone.name segments`), in place of tokens of single frames; 0 for frames."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: autocast. What is stored is fp16."""
    chunk_frames: int = 64
    """Frames that are read, encoded and stored together."""
    shard_videos: int = 8
    """Videos of a shard: what a run that was ended has to recompute."""
    shard_gigabytes: float = 1.0
    """Size of a shard of imported features, whose videos are not counted; a larger video has one of its own."""
    data: DecodeConfig = field(default_factory=DecodeConfig)
    """Decoding, shared out among the workers; the time limit is for one chunk."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Workers: copies of the backbone; an import has none."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged."""

    def __post_init__(self) -> None:
        self.scale.require_workers()
        require(self.frames_per_second > 0, "frames_per_second", self.frames_per_second, "give more than 0")
        require(0 <= self.segment_s < float("inf"), "segment_s", self.segment_s, "give 0 or more seconds")
        remedy = "embeddings of segments are made by a whole video model; give its checkpoint"
        require(bool(self.checkpoint) or not self.segment_s, "checkpoint", self.checkpoint, remedy)
        for name in ("chunk_frames", "shard_videos"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        require(self.shard_gigabytes > 0, "shard_gigabytes", self.shard_gigabytes, "give more than 0")
        require(bool(self.import_) == bool(self.backbone), "backbone", self.backbone, IMPORT_NEEDS)
        require(not (self.import_ and self.segment_s), "segment_s", self.segment_s, "imported features take none")
        require(bool(self.import_) or self.format == "auto", "format", self.format, "it is that of --import; give both")
        require(not (self.import_ and self.checkpoint), "checkpoint", self.checkpoint, "imported features take none")
        tokens = self.model.backbone.tokens
        require(tokens == 0, "model.backbone.tokens", tokens, "imported files say it themselves; leave it out")
        self._require_effects()
        tubelet = self.model.backbone.tubelet
        require(tubelet == 1, "model.backbone.tubelet", tubelet, "features are of single frames; give 1")
        weights = self.model.backbone.weights
        if self.checkpoint:
            require(not weights, "model.backbone.weights", weights, "the checkpoint has weights; leave one of them out")

    def _require_effects(self) -> None:
        """Raise `ValueError` where a setting is given that says nothing of what is done.

        With an import, those of the encoder may stay where they are of the one that --backbone names: a recipe has it.
        """
        encoded = "the checkpoint's video model embeds segments, not frames; leave it out"
        idle = {"shard_gigabytes": "it is of imported features; leave it out, or give --import"}
        if self.import_:
            encoded = "nothing is encoded with --import; leave it out"
            idle = {"precision": encoded, "shard_videos": encoded}
        elif self.segment_s:
            idle["frames_per_second"] = encoded
        for name, remedy in idle.items():
            value = getattr(self, name)
            require(value == getattr(FeaturesConfig, name), name, value, remedy)
        if self.segment_s or (self.import_ and self.model.backbone.name != self.backbone):
            for setting in fields(BackboneConfig):
                value = getattr(self.model.backbone, setting.name)
                require(value == setting.default, f"model.backbone.{setting.name}", value, encoded)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune a video model on labels, from a pretrained checkpoint or from scratch."""

    out: OutFolder = "out/finetune"
    """Folder for checkpoints and result.json; a second start with the same folder resumes."""
    manifest: ManifestPath = "out/index/manifest.parquet"
    """Manifest of the videos: a file, or the folder that `index` wrote."""
    checkpoint: CheckpointPath = ""
    """Pretrained checkpoint to start from: its folder or the --out of `pretrain`; empty to start from scratch."""
    features: FeaturesPath = ""
    """Cached features to read in place of videos: the --out of `features`. The backbone has to be frozen."""
    task: Literal["class", "regression", "distant"] = "class"
    """What is learned: the manifest's `label` (cross-entropy), its `target` (squared error), or the written steps of
    narrated segments (distant supervision: divergence from their soft labels)."""
    labels: LabelsPath = ""
    """Soft labels of the manifest's segments, for task distant: the --out of `narrate`."""
    clips: ClipConfig = field(default_factory=ClipConfig)
    """Clips; only the long stride is used."""
    protocol: ProtocolSetting = "auto"
    """Which clips are learned from and validated on, see `evaluate`; `auto`: those of the manifest's benchmark."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Random views of training clips."""
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
        require_shared(self.loop.batch_size, self.scale.world_size)
        if self.model.decoder.name == "s5":
            self.model.decoder.selection.require_used()
        require_features(self.model.backbone, self.features)
        # Fails unless tubelets divide the clip.
        self.model.backbone.steps(self.clips.frames)
        remedy = "task distant learns them; give the --out of `narrate`, or another task"
        require(bool(self.labels) or self.task != "distant", "labels", self.labels, remedy)
        remedy = f"task {self.task} has none; leave it out, or give --task distant"
        require(not self.labels or self.task == "distant", "labels", self.labels, remedy)
        if self.features:
            frozen = self.model.backbone.frozen
            require(frozen, "model.backbone.frozen", frozen, "cached features are of a frozen backbone; give True")
            require_no_views(self.views)
        for name in ("blur", "solarise"):
            shares = getattr(self.views, name)
            remedy = f"fine-tuning has no short clips, whose share the second is; give it {shares[0]:g} 0"
            require(shares[1] == 0, f"views.{name}", shares, remedy)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a checkpoint: accuracy or error of a fine-tuned model; probes and nearest clips of a pretrained one."""

    out: OutFolder = "out/evaluate"
    """Folder for metrics.json, predictions.parquet, figures and result.json; a second start with the same folder
    resumes."""
    checkpoint: CheckpointPath = "out/finetune"
    """Checkpoint: its folder or the --out of `pretrain` or `finetune`."""
    manifest: ManifestPath = "out/index/manifest.parquet"
    """Manifest of the videos: a file, or the folder that `index` wrote."""
    split: str = "test"
    """Split to evaluate on."""
    protocol: ProtocolSetting = "auto"
    """Clips whose predictions are averaged: `windows` of T long strides at every second (LVU), `whole`: clips over the
    whole video (Breakfast, COIN), `multi-clip` (Kinetics) and `uniform`: long clips evenly spread; `auto`: those that
    fine-tuning was set to, else the manifest's benchmark's; for a pretrained encoder `uniform`."""
    clips_per_video: int = 0
    """Clips of each video; 0 for 10 in protocol multi-clip and else 1. `windows` takes all."""
    features: FeaturesPath = ""
    """Cached features to read in place of videos, of the checkpoint's own backbone: the --out of `features`. There is
    no picture of nearest clips then."""
    batch_size: int = 16
    """Clips that the model sees at once."""
    shard_videos: int = 32
    """Videos that a worker stores together: what a run that was ended has to evaluate again."""
    labels: LabelsPath = ""
    """Soft labels to compare predicted steps with, for a checkpoint of task distant: the --out of `narrate`; without it
    those beside the manifest, if any."""
    probe: ProbeSetting = "knn"
    """What the labels are found with from a pretrained encoder's features: nearest neighbours (where there are labels),
    or a linear classifier on standardised features, whose regularisation is chosen by cross-validation in train."""
    train_videos: int = 2048
    """Labelled training videos that the probe learns from, spread evenly over the manifest; 0 for all."""
    neighbours: int = 5
    """Nearest clips shown for each query clip (pretrained checkpoints)."""
    register: str = ""
    """Name under which a fine-tuned model is registered in MLflow, with the alias `champion` where it beats the one
    that has it on the same videos; empty not to register it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Decoding."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Workers: replicas of the model."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged."""

    def __post_init__(self) -> None:
        for name in ("clips_per_video", "train_videos"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        for name in ("batch_size", "shard_videos", "neighbours"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Tables and figures of what MLflow holds: results by stage and sweep, learning curves, means over seeds, gains,
    costs, and published results."""

    out: OutFolder = "out/report"
    """Folder for report.html, report.md, the figures and result.json."""
    runs: tuple[RunsFolder, ...] = ()
    """Only runs and sweeps whose --out is, or lies below, one of these folders; empty for the whole experiment."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the runs are logged."""


def require_shared(batch_size: int, num_workers: int) -> None:
    """Raise `ValueError` unless every worker gets a video of each global batch."""
    remedy = f"give at least scale.num_workers, {num_workers}, or 0"
    require(batch_size == 0 or batch_size >= num_workers, "loop.batch_size", batch_size, remedy)


def require_features(backbone: BackboneConfig, features: str) -> None:
    """Raise `ValueError` where imported features are to stand for the frame encoder and none are given."""
    remedy = "imported features stand in for the frame encoder then; give features, or leave it out"
    require(bool(features) or not backbone.tokens, "model.backbone.tokens", backbone.tokens, remedy)
    remedy = "embeddings of segments are read from cached features; give them"
    require(bool(features) or backbone.name != SEGMENTS, "features", features, remedy)


def require_no_views(views: ViewsConfig) -> None:
    """Raise `ValueError`, which names all that is set, unless views leave frames as they are."""
    if changing := views.changing():
        given = " and ".join(f"{key} is {value!r}" for key, (value, _) in changing.items())
        off = " ".join(f"--{key.replace('_', '-')} {value}".strip() for key, (_, value) in changing.items())
        raise ValueError(f"{given}: cached features have no pixels to change; give {off}")
