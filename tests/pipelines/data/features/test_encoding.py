"""Stage `features` reads, encodes and stores at the same time: shown by a model that waits for the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from torch import Tensor, nn

from pipelines.config import FeaturesConfig, override
from pipelines.data.features.cache import ShardWriter
from pipelines.stages.features import COLUMNS, Encoder, meta_of
from s5.models.backbone import Backbone
from s5.video.reading import FrameArray
from tests.tiny import TINY

CHUNK, CHUNKS, DEADLOCK_S = 4, 5, 10.0
BACKBONE = {key: value for key, value in TINY.items() if key.startswith("model.backbone.")}


class Overlapping(Encoder):
    """An encoder whose frames are made up, and which notes when a chunk has been read."""

    read: list[Event]

    def _read(self, video: dict[str, Any], times_T: Any) -> FrameArray:
        number = round(float(times_T[0])) // CHUNK
        self.read[number].set()
        return np.full((len(times_T), 32, 32, 3), number, np.uint8)


def test_a_model_that_waits_for_reading_and_storing_gets_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a chunk the next one is read, and the one before it is stored, which waits for that moment."""
    changes = BACKBONE | {"out": str(tmp_path), "chunk_frames": CHUNK, "frames_per_second": 1.0}
    config = override(FeaturesConfig(), changes)
    backbone = Backbone(config.model.backbone)
    encoder = Overlapping(config, str(tmp_path), meta_of(config, backbone, ""), backbone, decoders=1)
    encoder.pool = ThreadPoolExecutor(1)
    encoder.read, begun, stored = ([Event() for _ in range(CHUNKS)] for _ in range(3))
    add, missed = ShardWriter.add, []

    def wait(*events: Event) -> None:
        missed.extend(event for event in events if not event.wait(DEADLOCK_S))

    def adding(writer: ShardWriter, times_T: Any, tokens_TND: Any) -> None:
        number = round(float(times_T[0])) // CHUNK
        wait(*begun[number + 1 : number + 2])
        add(writer, times_T, tokens_TND)
        stored[number].set()

    def waiting(_: nn.Module, inputs: tuple[Tensor]) -> None:
        number = int(inputs[0].flatten()[0])
        begun[number].set()
        wait(*encoder.read[number + 1 : number + 2], *stored[max(0, number - 1) : number])

    monkeypatch.setattr(ShardWriter, "add", adding)
    backbone.register_forward_pre_hook(waiting)
    row = {"video_id": "v", "uri": "v.mp4", "start_s": 0.0, "end_s": float(CHUNK * CHUNKS), "decoder": ""}
    videos = pa.Table.from_pylist([row | {"width": 32, "height": 32, "shard": 0}]).select([*COLUMNS, "shard"])
    index = encoder(videos)
    assert missed == []
    assert index["frames"].to_pylist() == [CHUNK * CHUNKS]
    assert all(event.is_set() for event in stored)
