"""While a video makes no progress, its spare is read beside it: what hangs costs seconds, what is slow counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data.decoding import decode_tasks
from pipelines.data.decoding.decode_tasks import decode_chunk
from pipelines.data.decoding.video_process import VideoProcess
from tests.pipelines.data.decoding.test_decode_tasks import SPEC, _candidate, _rows
from tests.pipelines.data.decoding.test_decode_tasks import fake_decord as fake_decord
from tests.s5.videos import write_video


@pytest.fixture
def fresh_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start children that find the decord of this test."""
    processes = VideoProcess(), VideoProcess()
    for name, process in zip(("_process", "_spare_process"), processes, strict=True):
        monkeypatch.setattr(decode_tasks, name, process)
    monkeypatch.setattr(decode_tasks, "_timed_out", {})
    monkeypatch.setattr(decode_tasks, "STALLED_S", 0.5)
    yield
    for process in processes:
        process.close()


@pytest.mark.usefixtures("fake_decord", "fresh_processes")
def test_a_spare_is_read_beside_a_video_that_hangs(tmp_path: Path) -> None:
    hangs, spare = write_video(tmp_path / "hangs.mp4", 40), write_video(tmp_path / "spare.mp4", 40)
    broken = str(tmp_path / "gone.mp4")
    rows = _rows([_candidate(path) for path in (hangs, broken, spare)], [_candidate(spare)])
    # It ends long before the time limit, and the spare's own failures are listed.
    columns = decode_chunk(rows, replace(SPEC, timeout_s=600.0))
    assert columns["video_id"].tolist() == ["spare", "spare"]
    np.testing.assert_array_equal(columns["long"][0], columns["long"][1])
    assert "its decoder makes no progress for 0.5 s" in columns["failures"][0]
    assert '"gone"' in columns["failures"][0]
    assert decode_tasks._spare_process._child is None


@pytest.mark.usefixtures("fake_decord", "fresh_processes")
def test_a_video_that_hangs_and_has_no_spare_takes_its_time(tmp_path: Path) -> None:
    hangs, gone = write_video(tmp_path / "hangs.mp4", 40), str(tmp_path / "gone.mp4")
    for candidates in ([hangs], [hangs, gone]):
        decode_tasks._timed_out.clear()
        columns = decode_chunk(_rows([_candidate(path) for path in candidates]), SPEC)
        assert columns["video_id"].tolist() == [""]
        assert "not read within data.decode_timeout_s, 2 s" in columns["failures"][0]


@pytest.mark.usefixtures("fresh_processes")
def test_a_video_that_is_read_after_a_pause_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a store that stalls: whichever is read first, the video itself counts if it goes on."""
    path, spare = write_video(tmp_path / "a.mp4", 40), write_video(tmp_path / "spare.mp4", 40)
    before = decode_chunk(_rows([_candidate(path)]), replace(SPEC, timeout_s=30.0))
    child = decode_tasks._process._child
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)
    read = decode_tasks._spare_process.read

    def goes_on(*arguments: Any) -> Any:
        clips = read(*arguments)
        os.kill(child.pid, signal.SIGCONT)
        assert decode_tasks._process._connection is not None
        assert decode_tasks._process._connection.poll(60)
        return clips

    monkeypatch.setattr(decode_tasks._spare_process, "read", goes_on)
    columns = decode_chunk(_rows([_candidate(path), _candidate(spare)]), replace(SPEC, timeout_s=60.0))
    assert columns["video_id"].tolist() == ["a"]
    assert columns["failures"].tolist() == ["[]"]
    np.testing.assert_array_equal(columns["long"], before["long"])
