"""s5 is to work without decoders where frames come from elsewhere: its other tests run without them too."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from s5.checkpoints.writer import CheckpointWriter

MISSING = [name for name in ("av", "decord") if find_spec(name) is None]
collect_ignore = ["test_readers.py", "test_video.py"] if MISSING else []


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [f"no {' and no '.join(MISSING)}: left out are {', '.join(collect_ignore)}"] if MISSING else []


@pytest.fixture
def saves_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each checkpoint written before training continues: which are left out would depend on the disk."""
    save = CheckpointWriter.save

    def save_and_wait(writer: CheckpointWriter, *arguments: Any) -> None:
        save(writer, *arguments)
        with writer._changed:
            writer._wait(writer._is_idle)

    monkeypatch.setattr(CheckpointWriter, "save", save_and_wait)
