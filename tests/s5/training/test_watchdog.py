"""Processes that hang in Python, in native code that holds Python's lock, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from s5.training.watchdog import EXIT_STATUS, leftover_stacks

PROCESS = """
import ctypes, json, sys, threading, time
from pathlib import Path
from s5.training.watchdog import Watchdog

folder, how = Path(sys.argv[1]), sys.argv[2]
ticks = []

def on_hang(hang):
    (folder / "hang.json").write_text(json.dumps([hang.phase, hang.seconds, hang.stacks, hang.waits]))
    if how == "silent":
        time.sleep(1000)

def main():
    watchdog = Watchdog(0 if how == "off" else 3.0, on_hang, ticks.append, "test", grace_s=1.0)
    watchdog.start()
    for step in range(12):
        watchdog.beat(f"step {step}: training")
        time.sleep(0.3)
    hanging(watchdog)
    watchdog.stop()
    assert any(phase.endswith("training") for phase in ticks)
    print("done")

def hanging(watchdog):
    if how in ("python", "silent"):
        time.sleep(1000)
    elif how == "native":
        # Unlike CDLL, it keeps Python's lock.
        ctypes.PyDLL(None).sleep(1000)
    elif how == "off":
        time.sleep(4)

# Not the main thread: training runs in another one.
thread = threading.Thread(target=main)
thread.start()
thread.join()
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process and its children a folder of their own for temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def run(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), how]
    return subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["beating", "off"])
def test_a_process_that_makes_progress_is_left_alone(tmp_path: Path, how: str) -> None:
    done = run(tmp_path, how)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert not (tmp_path / "hang.json").exists()
    assert not list(tmp_path.glob("s5_stacks_*"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["python", "silent"])
def test_a_hang_is_reported_with_its_stacks_and_ends_the_process(tmp_path: Path, how: str) -> None:
    done = run(tmp_path, how)
    assert done.returncode == (EXIT_STATUS if how == "python" else 1), done.stderr
    phase, seconds, stacks, waits = json.loads((tmp_path / "hang.json").read_text())
    assert phase == "step 11: training"
    assert seconds > 3
    assert not waits
    assert "in hanging" in stacks
    assert "_watch" not in stacks


@pytest.mark.slow
def test_a_hang_with_pythons_lock_leaves_its_stacks_in_the_folder(tmp_path: Path) -> None:
    done = run(tmp_path, "native")
    assert done.returncode == 1
    assert not (tmp_path / "hang.json").exists()
    (text,) = leftover_stacks("test")
    assert "in hanging" in text
    assert leftover_stacks("test") == []


def test_stacks_of_processes_that_run_and_of_other_runs_are_left(tmp_path: Path) -> None:
    for name in ("s5_stacks_test_1.txt", "s5_stacks_other_999999999.txt"):
        (tmp_path / name).write_text("of another process")
    assert leftover_stacks("test") == []
    assert len(list(tmp_path.iterdir())) == 2
