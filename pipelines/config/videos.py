"""Settings of the stages that make videos and manifests: sample, index and transcode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.shared import (
    AnnotationsPath,
    DecodeConfig,
    ManifestPath,
    OutFolder,
    TrackingConfig,
    VideoFolder,
)
from s5.config import ClipConfig, require


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Render the sample data set: long-form H.264 videos of ten activities made of shared steps, with annotations."""

    out: OutFolder = "out/sample"
    """Folder for the videos and annotations."""
    videos: int = 480
    """Number of videos, all splits together."""
    classes: Literal["all", "order-only"] = "all"
    """`all`: ten activities; `order-only`: six of the same steps each, told apart by their order alone."""
    difficulty: Literal["easy", "hard"] = "easy"
    """`easy`: plain backgrounds and one colour a step; `hard`: photographs behind and free colours."""
    seconds: float = 64.0
    """Mean length of a video."""
    empty_share: float = 0.3
    """Mean share of a video that shows no step but distractors; that of each video is up to 0.1 more or less, and where
    it has few frames nearer to a half, since each stretch has one at least."""
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
        remedy = "give a value in [0.1, 0.9]"
        require(0.1 <= self.empty_share <= 0.9, "empty_share", self.empty_share, remedy)
        require(self.size >= 32 and self.size % 2 == 0, "size", self.size, "give an even number of at least 32")
        require(0 <= self.val_share < 1, "val_share", self.val_share, "give a value in [0, 1)")
        require(0 <= self.test_share < 1 - self.val_share, "test_share", self.test_share, "leave room for training")


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Probe videos, of a folder, a csv or a benchmark, into manifest.parquet and rejects.parquet."""

    out: OutFolder = "out/index"
    """Folder for manifest.parquet and rejects.parquet."""
    source: Literal["auto", "folder", "csv", "lvu", "breakfast", "coin", "kinetics"] = "auto"
    """What lists the videos; `auto`: a `csv` where annotations are given, else the `folder`."""
    videos: VideoFolder = "out/sample"
    """Folder of videos, of a benchmark ID.ENDING at any depth; `folder`: [{train,val,test}/][CLASS/]name.ENDING."""
    annotations: AnnotationsPath = ""
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
class TranscodeConfig:
    """Re-encode the videos of a manifest to a small size and short groups of pictures, which are cheap to read."""

    out: OutFolder = "out/transcode"
    """Folder for the videos, manifest.parquet and rejects.parquet; a second start with the same folder resumes."""
    manifest: ManifestPath = "out/index/manifest.parquet"
    """Manifest of the videos: a file, or the folder that `index` wrote."""
    short_side: int = 224
    """Short side of the new videos in pixels; smaller ones keep their size."""
    gop_s: float = 0.0
    """Seconds between two key frames; 0 for the short stride of the clips, at least 0.25."""
    quality: int = 20
    """Constant rate factor of libx264, 1 (best) to 51."""
    speed: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower"] = "veryfast"
    """Preset of libx264: slower ones make smaller files."""
    clips: ClipConfig = field(default_factory=ClipConfig)
    """Long and short clips that the videos are for."""
    measured_videos: int = 8
    """Videos whose clip pairs are read before and after, to say what is gained; 0 to measure nothing."""
    data: DecodeConfig = field(default_factory=lambda: DecodeConfig(clips_per_task=1, decode_timeout_s=3600.0))
    """Tasks that transcode; the time limit is for one video."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged."""

    def __post_init__(self) -> None:
        even = self.short_side >= 32 and self.short_side % 2 == 0
        require(even, "short_side", self.short_side, "give an even number of at least 32")
        require(self.gop_s >= 0, "gop_s", self.gop_s, "give 0 or more")
        require(1 <= self.quality <= 51, "quality", self.quality, "give 1 (best) to 51")
        require(self.measured_videos >= 0, "measured_videos", self.measured_videos, "give 0 or more")
