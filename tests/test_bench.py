"""What the benchmarks count and write; not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import torch

from s5.config import AttentionConfig, DecoderConfig, SSMConfig
from tests.bench import record
from tests.bench.model import Shape, saved_bytes
from tests.bench.processes import cpu_seconds, cpu_seconds_since, resident_bytes
from tests.bench.record import Row, alternate, ratio, write

SHAPE = Shape("small", 8, 128, 16)
TOKENS = 8 * 128 * 64 * 4
MIB = 2**20


def test_rows_say_whether_the_target_is_met() -> None:
    assert Row("speed", 2.0, 1.5).met is True
    assert Row("speed", 1.0, 1.5).met is False
    assert Row("bytes", 0.4, 0.5, "lower").met is True
    assert Row("bytes", 0.6, 0.5, "lower").met is False
    assert Row("speed", None, 1.5).met is None
    assert Row("speed", 1.0).met is None


def test_record_is_written_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "FOLDER", tmp_path / "bench")
    write("toy", torch.device("cpu"), [Row("speed of light", 3.0, 2.0)], {"seconds": [1.0]})
    written = json.loads((tmp_path / "bench" / "toy.json").read_text())
    assert set(written) == {"machine", "versions", "commit", "date", "rows", "raw"}
    assert written["rows"] == [
        {"figure": "speed of light", "value": 3.0, "target": 2.0, "better": "higher", "met": True}
    ]
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "| speed of light | 3     | >= 2   | yes |" in capsys.readouterr().out


def test_cases_alternate() -> None:
    order: list[str] = []
    cases = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = alternate(cases, 2, torch.device("cpu"), warm=1)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert ratio([4.0, 9.0, 2.0], [2.0, 3.0, 2.0]) == 2.0


def test_fake_tensors_count_as_real_ones() -> None:
    def step_bytes(implementation: Literal["plain", "fused"], fake: bool) -> int:
        attention = AttentionConfig(heads=4, implementation=implementation)
        return saved_bytes(DecoderConfig(name="lst", blocks=1, attention=attention), SHAPE, 64, fake)["step"]

    assert step_bytes("plain", fake=True) == pytest.approx(step_bytes("plain", fake=False), rel=0.01)
    matrices = 8 * 4 * 128 * 128 * 4
    assert step_bytes("plain", fake=False) - step_bytes("fused", fake=False) > 0.9 * matrices


def test_what_a_pyramid_of_state_spaces_keeps() -> None:
    """Of its tokens a block keeps the state space's output, half of it pooled and a quarter narrowed; and its input."""
    ssm = SSMConfig(state=2)
    found = saved_bytes(DecoderConfig(name="vis4mer", blocks=1, ssm=ssm), SHAPE, 64)
    kernel = 64 * 132 * 4  # 11 x 12 steps
    assert found["input"] == TOKENS
    assert TOKENS * 1.75 <= found["step"] - kernel <= TOKENS * 1.85
    half = saved_bytes(DecoderConfig(name="s5", blocks=1, ssm=ssm), SHAPE, 64)
    assert half["input"] == TOKENS
    assert TOKENS * 0.875 <= half["step"] - kernel / 2 <= TOKENS * 0.975


@contextmanager
def _parent_and_child(before: str = "", after: str = "") -> Iterator[int]:
    """Give the id of a process that runs `before`, then splits in two, and both run `after` and wait."""
    script = (
        f"import os, sys, time\n{before}\nchild = os.fork() == 0\n{after}\nos.write(1, b'ready\\n')\nsys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
        yield parent.pid


def test_memory_of_a_child_counts() -> None:
    with _parent_and_child() as without, _parent_and_child(after=f"held = child and b'x' * {200 * MIB}") as held:
        assert resident_bytes(held) - resident_bytes(without) == pytest.approx(200 * MIB, rel=0.05)
        # Both are below this process, which is what is counted where no process is named.
        assert resident_bytes() > resident_bytes(held) + resident_bytes(without)


def test_memory_that_a_child_shares_counts_once() -> None:
    with _parent_and_child() as without, _parent_and_child(before=f"held = b'x' * {200 * MIB}") as shared:
        assert resident_bytes(shared) - resident_bytes(without) == pytest.approx(200 * MIB, rel=0.05)


def test_cpu_time_of_a_child_counts() -> None:
    busy = "while child and time.process_time() < 1: pass"
    begin = cpu_seconds()
    with _parent_and_child(after=busy) as parent:
        used = cpu_seconds(parent)
        assert len(used) == 2
        assert 0.9 <= sum(used.values()) <= 1.5
        assert cpu_seconds_since(begin) >= 0.9
        # Both wait: what they have used before does not count again.
        assert cpu_seconds_since(used, parent) <= 0.2
    assert cpu_seconds(parent) == {}
