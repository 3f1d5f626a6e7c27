"""S5 and LSMCL for long-form video in plain PyTorch: state spaces, models, tasks, training loop.

The names below are imported when they are first used, so that a process that only reads videos imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s5.config import BackboneConfig as BackboneConfig
    from s5.config import ClipConfig as ClipConfig
    from s5.config import DecoderConfig as DecoderConfig
    from s5.config import LSMCLConfig as LSMCLConfig
    from s5.config import ModelConfig as ModelConfig
    from s5.config import SelectionConfig as SelectionConfig
    from s5.config import SSMConfig as SSMConfig
    from s5.config import ViewsConfig as ViewsConfig
    from s5.evaluation.prediction import load_model as load_model
    from s5.models.decoders import build_decoder as build_decoder
    from s5.models.video_model import VideoModel as VideoModel
    from s5.ssm.layers import build_ssm as build_ssm
    from s5.tasks.lsmcl import LSMCL as LSMCL
    from s5.tasks.lsmcl import info_nce as info_nce

__version__ = "0.2.0"

_CONFIGS = (
    "BackboneConfig",
    "ClipConfig",
    "DecoderConfig",
    "LSMCLConfig",
    "ModelConfig",
    "SSMConfig",
    "SelectionConfig",
    "ViewsConfig",
)
_HOMES = {
    **dict.fromkeys(_CONFIGS, "s5.config"),
    "LSMCL": "s5.tasks.lsmcl",
    "VideoModel": "s5.models.video_model",
    "build_decoder": "s5.models.decoders",
    "build_ssm": "s5.ssm.layers",
    "info_nce": "s5.tasks.lsmcl",
    "load_model": "s5.evaluation.prediction",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
