"""Settings of the stages, dotted keys and presets."""

from pipelines.config.dotted import INPUTS as INPUTS
from pipelines.config.dotted import flatten as flatten
from pipelines.config.dotted import leaves_of as leaves_of
from pipelines.config.dotted import override as override
from pipelines.config.dotted import paths as paths
from pipelines.config.dotted import to_json as to_json
from pipelines.config.dotted import unknown as unknown
from pipelines.config.narration import NarrateConfig as NarrateConfig
from pipelines.config.shared import DataConfig as DataConfig
from pipelines.config.shared import DecodeConfig as DecodeConfig
from pipelines.config.shared import ScaleConfig as ScaleConfig
from pipelines.config.shared import TrackingConfig as TrackingConfig
from pipelines.config.stages import STAGES as STAGES
from pipelines.config.stages import EncoderConfig as EncoderConfig
from pipelines.config.stages import EvaluateConfig as EvaluateConfig
from pipelines.config.stages import FeaturesConfig as FeaturesConfig
from pipelines.config.stages import FinetuneConfig as FinetuneConfig
from pipelines.config.stages import IndexConfig as IndexConfig
from pipelines.config.stages import PretrainConfig as PretrainConfig
from pipelines.config.stages import ProtocolSetting as ProtocolSetting
from pipelines.config.stages import ReportConfig as ReportConfig
from pipelines.config.stages import RunConfig as RunConfig
from pipelines.config.stages import SampleConfig as SampleConfig
from pipelines.config.stages import StageConfig as StageConfig
from pipelines.config.stages import SweepConfig as SweepConfig
from pipelines.config.stages import TranscodeConfig as TranscodeConfig
