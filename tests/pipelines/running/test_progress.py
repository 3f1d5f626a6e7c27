"""Progress: a bar on a terminal that no line breaks, lines and nothing else in a pipe."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COUNTED = """
import time
from pipelines.running.progress import ProgressBar, info
with ProgressBar("index", "probed", 3, "videos") as bar:
    for done in range(3):
        time.sleep(0.15)
        bar.advance(f"{done} rejects")
        info("index", f"line {done}")
"""
TRAINED = """
import time
from pipelines.running.progress import ProgressBar, info
with ProgressBar("pretrain", "trained", 100, "steps") as bar:
    for step in (60, 70, 80, 65, 75):
        time.sleep(0.15)
        bar.move_to(step, f"loss {step / 100:.4f}")
    info("pretrain", "an evaluation")
"""


def in_terminal(code: str) -> str:
    """Return all that a program writes to a terminal of 100 columns."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (30, 100))
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    written = b""
    try:
        while part := os.read(leader, 4096):
            written += part
    except OSError:
        # Linux reports so that the last process has closed the terminal.
        pass
    finally:
        os.close(leader)
    assert program.wait() == 0, written
    return written.decode()


def in_pipe(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )


def screen(written: str) -> list[str]:
    """Return the lines that stay on a terminal: a carriage return starts the line again, and a line may be erased."""
    lines = []
    for line in written.split("\n"):
        shown = ""
        for part in line.rstrip("\r").split("\r"):
            part = part.replace("\x1b[A", "")
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return [line for line in lines if line]


def test_a_terminal_shows_a_bar_and_whole_lines() -> None:
    written = in_terminal(COUNTED)
    assert re.search(r"\[index\] probed: +\d+%\|.*\| [12]/3 \[.*, .*videos.*, \d rejects\]", written), written
    lines = screen(written)
    assert [line for line in lines if "line" in line] == [f"[index] line {number}" for number in range(3)]
    assert any(re.fullmatch(r"\[index\] probed 3 of 3 videos, \d+\.\d a second, 2 rejects", line) for line in lines)
    assert not any("|" in line for line in lines), lines


def test_a_bar_of_training_shows_loss_rate_and_remaining_time() -> None:
    written = in_terminal(TRAINED)
    assert re.search(r"70/100 \[00:\d\d<00:\d\d, +\d+\.\d+ steps/s, loss 0\.7000\]", written), written
    assert re.search(r"75/100 .*loss 0\.7500", written), written
    assert screen(written) == ["[pretrain] an evaluation"]


@pytest.mark.parametrize(
    ("code", "first"), [(COUNTED, r"\[index\] (line 0|probed)"), (TRAINED, r"\[pretrain\] an evaluation\n$")]
)
def test_a_pipe_gets_lines_only(code: str, first: str) -> None:
    done = in_pipe(code)
    assert done.stderr == ""
    assert "\r" not in done.stdout
    assert "|" not in done.stdout
    assert re.match(first, done.stdout), done.stdout
