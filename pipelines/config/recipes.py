"""Settings of stage `recipe`, which runs the other stages one after another; the paper's are in `paper.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from pipelines.config.shared import (
    AnnotationsPath,
    FeaturesPath,
    ManifestPath,
    OutFolder,
    TrackingConfig,
    VideoFolder,
)
from pipelines.config.stages import (
    EvaluateConfig,
    FeaturesConfig,
    FinetuneConfig,
    IndexConfig,
    PretrainConfig,
    ReportConfig,
)
from s5.config import require

StageName = Literal["index", "features", "pretrain", "finetune", "evaluate", "report"]
NodeName = Literal["cpu-2", "h200"]

STAGE_ORDER: tuple[StageName, ...] = get_args(StageName)
GROUPS: dict[str, str] = {stage: "encode" if stage == "features" else stage for stage in STAGE_ORDER}
"""Group of a recipe's settings that holds those of a stage."""
IN_WORKERS_ONLY = ("encode.scale.num_workers",)
"""Settings that a 0 for all stages leaves as they are: the work of these stages is not done in their own process."""
LINKS = {
    "index": ("out", "source", "videos", "annotations"),
    "features": ("out", "manifest"),
    "pretrain": ("out", "manifest", "features"),
    "finetune": ("out", "manifest", "features"),
    "evaluate": ("out", "manifest", "features", "checkpoint"),
    "report": ("out", "runs"),
}
"""Settings of each stage that a recipe gives itself, beside `tracking`: they connect the stages."""


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Run a recipe, `recipe NAME`: all stages from annotations and videos to a row of the paper's tables.

    `--STAGE.KEY` is a setting of one stage, `encode` for stage `features`; `--GROUP.KEY`, such as
    `--loop.precision bf16`, one of all stages that have it."""

    out: OutFolder = "out/recipe"
    """Folder with one of each stage, and row.json; a second start with the same folder goes on where it stood."""
    name: str = ""
    """Name of the recipe, which `recipe NAME` gives together with all of its settings."""
    videos: VideoFolder = ""
    """Folder of the benchmark's videos, ID.ENDING at any depth."""
    annotations: AnnotationsPath = ""
    """Its annotations: of LVU the folder lvu_1.0 or that of the task; the folder of the csv files of Breakfast or
    Kinetics; COIN.json."""
    manifest: ManifestPath = ""
    """Manifest to start from in place of videos and annotations: a file, or the --out of `index`."""
    features: FeaturesPath = ""
    """Ready features to start from, in place of stage `features`: the --out of `features`."""
    stages: tuple[StageName, ...] = STAGE_ORDER
    """Stages that run, in this order. Without `pretrain`, fine-tuning starts from scratch or from
    `finetune.checkpoint`; without `features`, the other stages read videos."""
    seeds: int = 5
    """Fine-tunings, of loop.seed 0, 1, ..., that the row's mean and interval are of."""
    dry_run: bool = False
    """Print what each stage would read, train and write, and how long it would take, and stop; annotations suffice."""
    node: NodeName = "cpu-2"
    """Node whose measured rates a dry run reckons with: 2 CPU cores, or one H200 with 16."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """Settings of `index`."""
    encode: FeaturesConfig = field(default_factory=FeaturesConfig)
    """Settings of `features`."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Settings of `pretrain`."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Settings of each `finetune`, but for its seed."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Settings of each `evaluate`."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """Settings of `report`."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the recipe and its stages are logged."""

    def __post_init__(self) -> None:
        require(self.seeds >= 1, "seeds", self.seeds, "give at least 1")
        in_order = self.stages == tuple(stage for stage in STAGE_ORDER if stage in self.stages)
        require(in_order and bool(self.stages), "stages", self.stages, f"give some of {', '.join(STAGE_ORDER)}, so")
        together = ("finetune" in self.stages) == ("evaluate" in self.stages)
        require(together, "stages", self.stages, "give finetune and evaluate together, or neither")
        pretrained = "pretrain" in self.stages and "finetune" in self.stages
        checkpoint = self.finetune.checkpoint
        remedy = "the recipe pretrains one of its own; leave pretrain out of stages"
        require(not (pretrained and checkpoint), "finetune.checkpoint", checkpoint, remedy)
        for stage, names in LINKS.items():
            self._check_links(stage, names)

    @property
    def benchmark(self) -> str:
        """Benchmark whose annotations are read: of `paper-lvu-genre` lvu."""
        return self.name.removeprefix("paper-").partition("-")[0]

    @property
    def task(self) -> str:
        """Task of a benchmark that has several: of `paper-lvu-genre` genre."""
        return self.name.removeprefix("paper-").partition("-")[2]

    def _check_links(self, stage: str, names: tuple[str, ...]) -> None:
        settings = getattr(self, GROUPS[stage])
        defaults = type(settings)()
        for name in (*names, "tracking"):
            value = getattr(settings, name)
            remedy = f"the recipe sets it for stage {stage}; leave it out"
            require(value == getattr(defaults, name), f"{GROUPS[stage]}.{name}", value, remedy)
        task = self.finetune.task
        require(task != "distant", "finetune.task", task, "a table's row is of labels; give class or regression")
        seed = self.finetune.loop.seed
        require(seed == 0, "finetune.loop.seed", seed, "a recipe fine-tunes with each of its seeds; give --seeds")
