"""Settings of the model, the clips, LSMCL, the optimiser and the loop, as frozen dataclasses.

Every value is checked where it is made: a bad one raises `ValueError` with its name, its value and the remedy.
"""

from s5.config.checks import PathRole as PathRole
from s5.config.checks import from_json as from_json
from s5.config.checks import require as require
from s5.config.checks import require_range as require_range
from s5.config.models import SEGMENTS as SEGMENTS
from s5.config.models import AttentionConfig as AttentionConfig
from s5.config.models import BackboneConfig as BackboneConfig
from s5.config.models import DecoderConfig as DecoderConfig
from s5.config.models import DecoderName as DecoderName
from s5.config.models import ModelConfig as ModelConfig
from s5.config.models import SelectionConfig as SelectionConfig
from s5.config.models import SSMConfig as SSMConfig
from s5.config.training import ClipConfig as ClipConfig
from s5.config.training import EvaluationProtocol as EvaluationProtocol
from s5.config.training import LoopConfig as LoopConfig
from s5.config.training import LSMCLConfig as LSMCLConfig
from s5.config.training import OptimConfig as OptimConfig
from s5.config.training import ViewsConfig as ViewsConfig
