"""A video that hangs its decoder is known to all processes of a job: it costs seconds once, and then less."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from pipelines.data.decoding import decode_tasks, known_timeouts
from pipelines.data.decoding.decode_tasks import ClipSpec
from pipelines.data.decoding.video_process import STALLED, TIMED_OUT, VideoProcess
from pipelines.data.decoding.video_requests import ClipRequest
from s5.errors import Failure
from tests.pipelines.data.decoding.test_decode_tasks import SPEC, _candidate, _rows
from tests.pipelines.data.decoding.test_decode_tasks import fake_decord as fake_decord
from tests.s5.videos import write_video


class Decoder:
    """A process that decodes, as a Ray worker does, and notes the time limit of each video."""

    def decode(self, fake_decord: str, rows: pa.Table, spec: ClipSpec) -> tuple[list[float], list[str], list[str]]:
        sys.path.insert(0, fake_decord)
        limits: list[float] = []
        process = VideoProcess()
        real = process.read

        def read(uri: str, clips: ClipRequest, timeout_s: float, *stalled: Any) -> Any:
            limits.append(timeout_s)
            return real(uri, clips, timeout_s, *stalled)

        process.read = read  # type: ignore[method-assign]
        decode_tasks._process = process
        known_timeouts.REPLY_S = 60.0  # This machine may be busy.
        columns = decode_tasks.decode_chunk(rows, spec)
        process.close()
        return limits, columns["video_id"].tolist(), columns["failures"].tolist()


def _known(folder: Path) -> list[str]:
    """Return the videos of a folder that the actor knows, once it has started: decode tasks do not wait for that."""
    known: dict[str, str] = ray.get(ray.get_actor(known_timeouts.ACTOR).known.remote())
    return [uri for uri in known if uri.startswith(str(folder))]


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_local")
def test_a_video_that_hangs_is_known_to_all_processes(tmp_path: Path, fake_decord: str) -> None:
    hangs, spare = write_video(tmp_path / "hangs.mp4", 40), write_video(tmp_path / "spare.mp4", 40)
    rows = _rows([_candidate(hangs), _candidate(spare)])
    spec = replace(SPEC, timeout_s=60.0)
    first, second = (ray.remote(Decoder).options(num_cpus=0).remote() for _ in range(2))
    limits, video_ids, failures = ray.get(first.decode.remote(fake_decord, rows, spec))
    assert (limits, video_ids) == ([60.0], ["spare"])
    assert STALLED in failures[0]
    # As a training worker does with each batch.
    known_timeouts.tell([Failure(**failure) for failure in json.loads(failures[0])])
    assert _known(tmp_path) == [hangs]
    limits, video_ids, again = ray.get(second.decode.remote(fake_decord, rows, spec))
    assert (limits, video_ids) == ([6.0], ["spare"])
    assert again == failures
    # Once it can be read, all processes give it its whole time again.
    Path(hangs).rename(tmp_path / "h.mp4")
    known_timeouts.tell([Failure("h", str(tmp_path / "h.mp4"), f"{TIMED_OUT}, 10 s")])
    assert len(_known(tmp_path)) == 2
    readable = _rows([_candidate(str(tmp_path / "h.mp4"))])
    assert ray.get(second.decode.remote(fake_decord, readable, replace(spec, timeout_s=1e3)))[:2] == ([100.0], ["h"])
    assert _known(tmp_path) == [hangs]
    # The actor ends with the worker that started it: nothing is known then, and nothing fails.
    ray.kill(ray.get_actor(known_timeouts.ACTOR))
    assert known_timeouts.known() == {}
