"""Settings of `narrate`: narration and written steps to soft labels."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.config.shared import EncoderName, ManifestPath, OutFolder, ScaleConfig, TextPath, TrackingConfig
from s5.config import require


@dataclass(frozen=True, kw_only=True)
class NarrateConfig:
    """Compare what is said in videos with written steps: soft step labels of narrated segments (distant supervision).

    The defaults are those of the public code of arXiv 2201.10990, the encoder apart.
    """

    out: OutFolder = "out/narrate"
    """Folder for manifest.parquet (the segments), labels.parquet and rejects.parquet; the same one resumes."""
    manifest: ManifestPath = "out/index/manifest.parquet"
    """Manifest of the videos: a file, or the folder that `index` wrote."""
    narration: TextPath = ""
    """What is said: a .jsonl of captions (`video`, `start`, `end`, `text`), or HowTo100M's .json."""
    steps: TextPath = ""
    """Written steps: a .csv (`task`, `text`), or a .json as wikiHow's."""
    encoder: EncoderName = "tfidf"
    """What compares sentences: `tfidf` (scikit-learn's, fitted to the steps: words in common), or the name or folder of
    a model of sentence-transformers (extra `narration`), such as paraphrase-mpnet-base-v2."""
    top_k: int = 3
    """Steps of a label."""
    temperature: float = 0.05
    """Temperature of the softmax over cosine similarities: the lower, the more the likeliest step counts."""
    shortest_s: float = 9.0
    """Seconds to which shorter segments are widened around their middle; 0 to take them as they are."""
    chunk_segments: int = 1024
    """Segments that are compared at once."""
    shard_segments: int = 100_000
    """Captions of a shard: what a run that was ended has to compare again."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Workers: copies of the encoder."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is logged."""

    def __post_init__(self) -> None:
        self.scale.require_workers()
        for name in ("top_k", "chunk_segments", "shard_segments"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "give a positive number")
        require(0 <= self.shortest_s < float("inf"), "shortest_s", self.shortest_s, "give 0 or more seconds")
        require(bool(self.encoder), "encoder", self.encoder, "give tfidf, or a model of sentence-transformers")
