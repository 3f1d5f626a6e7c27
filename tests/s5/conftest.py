"""s5 is to work without decoders where frames come from elsewhere: its other tests run without them too."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from s5.checkpoints.writer import Saver

MISSING = [name for name in ("av", "decord") if find_spec(name) is None]
collect_ignore = ["test_readers.py", "test_video.py"] if MISSING else []


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [f"no {' and no '.join(MISSING)}: left out are {', '.join(collect_ignore)}"] if MISSING else []


@pytest.fixture
def saves_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each checkpoint written before training goes on: which are left out would depend on the disk."""
    save = Saver.save

    def save_and_wait(saver: Saver, *arguments: Any) -> None:
        save(saver, *arguments)
        with saver._changed:
            saver._wait(saver._is_idle)

    monkeypatch.setattr(Saver, "save", save_and_wait)
