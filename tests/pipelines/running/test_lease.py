"""One run at a time writes to an --out: others are refused while it lives, and one takes over once it is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines import preflight, storage
from pipelines.config import SampleConfig, TrackingConfig
from pipelines.errors import StageError, UserError
from pipelines.running import lease
from pipelines.running.stage import stage_run

ROOT = Path(__file__).parents[3]
# The second argument is the machine that the process takes itself to be on; empty for this one.
HOLDER = """
import sys, time
from pipelines.config import SampleConfig, TrackingConfig
from pipelines.errors import StageError
from pipelines.running import lease
from pipelines.running.stage import stage_run

lease.BEAT_S, machine = 2.0, sys.argv[2]
if machine:
    lease._machine = lambda: machine
try:
    with stage_run("sample", SampleConfig(out=sys.argv[1], tracking=TrackingConfig(uri="off"))):
        print("held", flush=True)
        time.sleep(120)
except StageError as error:
    print(error, flush=True)
"""


@pytest.fixture(params=["disk", "bucket"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An --out on a disk, and one in an object store; one that was silent for a second counts as dead."""
    for name, seconds in (("SILENT_S", 1.0), ("SETTLE_S", 0.3), ("LOOK_S", 0.2)):
        monkeypatch.setattr(lease, name, seconds)
    if request.param == "disk":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('bucket')}/out"


@contextmanager
def holder(out: str, machine: str = "") -> Iterator[subprocess.Popen[str]]:
    """Run another process that holds the lease on --out."""
    command = [sys.executable, "-c", HOLDER, out, machine]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def sampling(out: str) -> SampleConfig:
    return SampleConfig(out=out, tracking=TrackingConfig(uri="off"))


def run(out: str) -> None:
    with stage_run("sample", sampling(out)):
        assert storage.exists(storage.join(out, lease.LEASE))


def test_a_second_run_is_refused_until_the_first_one_ends(out: str) -> None:
    with stage_run("sample", sampling(out)):
        with pytest.raises(
            UserError, match=rf"is in use by sample \(process {os.getpid()} on .*\) since 2.*: wait for"
        ):
            run(out)
        assert not storage.exists(storage.join(out, "result.json"))
    assert storage.entries(out) == ["result.json", "run.json"]
    with pytest.raises(StageError, match="no disk"), stage_run("sample", sampling(out)):
        raise StageError("no disk")
    run(out)


def test_a_holder_that_was_killed_is_followed_at_once(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(out) as first:
        if not storage.is_uri(out):
            with pytest.raises(UserError, match=rf"in use by sample \(process {first.pid} "):
                preflight.check("sample", sampling(out))
        first.kill()
        # It stays a zombie.
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        preflight.check("sample", sampling(out))
        run(out)
    said = capsys.readouterr().out
    assert "has ended without giving --out up: taking over" in said
    assert "waiting" not in said


def test_a_holder_elsewhere_is_judged_by_its_signs_of_life(
    out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = storage.join(out, lease.LEASE)
    with holder(out, "another machine") as first:
        monkeypatch.setattr(lease, "SILENT_S", 60.0)
        with pytest.raises(UserError, match=rf"in use by sample \(process {first.pid} "):
            run(out)
        # Just after a sign of life: one stopped while it writes would have the last word.
        seen = storage.read_bytes(path)
        while storage.read_bytes(path) == seen:
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(lease, "SILENT_S", 1.0)
        capsys.readouterr()
        with stage_run("sample", sampling(out)) as stage:
            said = capsys.readouterr().out
            assert "waiting up to 1 s for a sign of life" in said
            assert "no sign of life for 1 s: taking over" in said
            first.send_signal(signal.SIGCONT)
            told, _ = first.communicate(timeout=60)
            assert f"was taken over by sample (process {os.getpid()} on " in told
            assert not storage.exists(stage.path("result.json"))
        assert storage.exists(stage.path("result.json"))


@pytest.mark.parametrize("dead", [False, True], ids=["free", "dead"])
def test_of_many_at_the_same_moment_one_gets_it(out: str, dead: bool) -> None:
    if dead:
        with holder(out) as first:
            first.kill()
            first.wait()
    else:
        storage.check_writable(out)
    barrier, outcomes = threading.Barrier(4), list[str]()

    def take() -> None:
        barrier.wait()
        try:
            lease.Lease(out, "sample").acquire()
            outcomes.append("held")
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]


def test_a_lease_that_says_nothing_delays_no_longer_than_a_silent_holder(out: str) -> None:
    storage.write_bytes(storage.join(out, lease.LEASE), b"")
    run(out)
    assert not storage.exists(storage.join(out, lease.LEASE))
