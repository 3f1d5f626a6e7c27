"""s5 is to work without decoders where frames come from elsewhere: its other tests run without them too."""

from __future__ import annotations

from importlib.util import find_spec

MISSING = [name for name in ("av", "decord") if find_spec(name) is None]
collect_ignore = ["test_readers.py", "test_video.py"] if MISSING else []


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [f"no {' and no '.join(MISSING)}: left out are {', '.join(collect_ignore)}"] if MISSING else []
