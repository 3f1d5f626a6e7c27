"""Settings of `predict`: a fine-tuned model and the videos that it is to say something of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pipelines.config.shared import CheckpointPath, DecodeConfig, OutFolder, ScaleConfig, TrackingConfig, VideoNames
from pipelines.config.stages import ProtocolSetting
from s5.config import PathRole, require

PictureFile = Annotated[str, PathRole("output", "file")]
REGISTERED = "models:/"
"""How the name of a model in MLflow's registry begins."""
LEAST_EVERY_S = 0.04


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Predict what videos of any length show, `predict VIDEO...`: JSON lines on stdout, or on a terminal a table.

    Messages and bars go to stderr."""

    videos: tuple[VideoNames, ...] = ()
    """Files, URIs, folders with videos at any depth, or patterns such as 'a/*.mp4'; --videos may be left out."""
    checkpoint: CheckpointPath = "out/finetune"
    """Checkpoint: its folder or the --out of `finetune`, or a registered model of MLflow, `models:/NAME@champion`."""
    out: OutFolder = ""
    """Folder for predictions.parquet, rejects.parquet and result.json; a second start with the same folder resumes.
    Empty to print alone, in which case nothing is logged."""
    protocol: ProtocolSetting = "auto"
    """Clips whose predictions are averaged, see `evaluate`; `auto`: those that the model was trained with."""
    clips_per_video: int = 0
    """Clips of each video; 0 for 10 in protocol multi-clip and else 1. `windows` takes all."""
    every_s: float = 0.0
    """Seconds between two predictions over time; 0 for one window after the other."""
    batch_size: int = 16
    """Clips that the model sees at once."""
    overlay: PictureFile = ""
    """Video (.mp4) to write of the only video given, in which the tokens that S5 drops are dimmed."""
    contact_sheet: PictureFile = ""
    """Picture (.png) to write of the only video given: the frames of which S5 keeps most, over time."""
    shard_videos: int = 32
    """Videos that a worker predicts and stores together: what a run that was ended has to predict again."""
    data: DecodeConfig = field(default_factory=DecodeConfig)
    """Decoding; the time limit is for 64 frames."""
    scale: ScaleConfig = field(default_factory=lambda: ScaleConfig(num_workers=0))
    """Workers: copies of the model, each with a decoder of its own. 0 works in the process of the stage, without
    Ray."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged, and where a registered model is found."""

    def __post_init__(self) -> None:
        require(self.clips_per_video >= 0, "clips_per_video", self.clips_per_video, "give 0 or more")
        # What is predicted over time is held for one video as a whole.
        remedy = f"give 0, or at least {LEAST_EVERY_S} seconds: about a frame"
        require(self.every_s == 0 or LEAST_EVERY_S <= self.every_s < float("inf"), "every_s", self.every_s, remedy)
        for name in ("batch_size", "shard_videos"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        for name, ending in (("overlay", ".mp4"), ("contact_sheet", ".png")):
            value = getattr(self, name)
            require(not value or value.endswith(ending), name, value, f"give a name that ends in {ending}")
        remedy = "what many workers predict is kept there; give a folder, or scale.num_workers 0"
        require(bool(self.out) or not self.scale.num_workers, "out", self.out, remedy)
        remedy = "pictures are made in the process of the stage; give 0, or leave overlay and contact_sheet out"
        pictured = bool(self.overlay or self.contact_sheet)
        require(not pictured or not self.scale.num_workers, "scale.num_workers", self.scale.num_workers, remedy)
