"""The start of a stage: what takes seconds each, and waits for different things, happens at once."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines import tracking
from pipelines.config import PredictConfig, StageConfig
from pipelines.running.resources import ensure_ray
from pipelines.running.run_folder import RESULT
from pipelines.running.stage import in_thread

IMPORTS = ("torch", "timm")
"""What takes longest to import, and imports nothing of Ray, which is being started in another thread."""
WITHOUT_RAY, WITHOUT_TORCH = ("report",), ("report", "sample")


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import without looking for garbage, of which imports leave none: they take a tenth longer with it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def start_ray_and_import(stage: str, config: StageConfig) -> None:
    """Start or join Ray; meanwhile a thread imports what the stage needs and creates a new tracking database.

    What goes wrong in the thread is met again, and reported, where the stage itself does the same.

    Raises:
        UserError: there is no cluster at $RAY_ADDRESS.
    """

    def prepare() -> None:
        for name in IMPORTS if stage not in WITHOUT_TORCH else ():
            importlib.import_module(name)
        tracking.create_database(config.tracking, config.out)

    if stage in WITHOUT_RAY or (isinstance(config, PredictConfig) and not config.scale.num_workers):
        return
    # A finished run only says so.
    if os.path.exists(os.path.join(config.out, RESULT)):
        return
    in_thread(prepare)
    ensure_ray()
