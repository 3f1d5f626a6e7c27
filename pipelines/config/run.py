"""One value for the settings of all stages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from pipelines.config.narration import NarrateConfig
from pipelines.config.predict import PredictConfig
from pipelines.config.recipes import RecipeConfig
from pipelines.config.stages import (
    EvaluateConfig,
    FeaturesConfig,
    FinetuneConfig,
    IndexConfig,
    PretrainConfig,
    ReportConfig,
    SampleConfig,
    TranscodeConfig,
)
from pipelines.config.sweeps import SweepConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One value for every stage: what a preset is. `python -m pipelines STAGE` uses the field of that name."""

    sample: SampleConfig = field(default_factory=SampleConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    transcode: TranscodeConfig = field(default_factory=TranscodeConfig)
    narrate: NarrateConfig = field(default_factory=NarrateConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


StageConfig = (
    SampleConfig
    | IndexConfig
    | TranscodeConfig
    | NarrateConfig
    | PretrainConfig
    | FeaturesConfig
    | FinetuneConfig
    | EvaluateConfig
    | SweepConfig
    | PredictConfig
    | RecipeConfig
    | ReportConfig
)
STAGES: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(RunConfig))
