"""Saving while training continues: saves that are interrupted, fail, or have to wait."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from s5.checkpoints import checkpoint
from s5.checkpoints.backend import LocalBackend
from s5.checkpoints.checkpoint import META, MODEL, OPTIMIZER, Meta
from s5.checkpoints.history import INTERRUPTED
from s5.checkpoints.writer import CheckpointWriter
from s5.errors import SaveError
from s5.training.context import SoloContext
from tests.s5.checkpoints.samples import FILES, Gate, meta, resumed, save_all, small, steps
from tests.s5.toys import STEPS, lsmcl_loop, saved, stopping

ROOT = Path(__file__).parents[3]


class Failing(LocalBackend):
    """A backend whose next `left` files of that name cannot be written completely."""

    def __init__(self, folder: Path, left: int, file: str = OPTIMIZER, code: int = errno.EIO) -> None:
        super().__init__(folder)
        self.left, self.file, self.code = left, file, code
        self.failed = threading.Event()

    def put(self, name: str, file: str, blocks: Iterable[memoryview]) -> None:
        def broken() -> Generator[memoryview]:
            yield from blocks
            self.failed.set()
            raise OSError(self.code, "no luck")

        fails = file == self.file and self.left > 0
        self.left -= fails
        super().put(name, file, broken() if fails else blocks)


# --- a process that is killed ---------------------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
from s5.training.context import SoloContext
from s5.checkpoints.writer import CheckpointWriter
from s5.checkpoints.backend import LocalBackend
from tests.s5.checkpoints.samples import meta, small

folder, file, blocks_before = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

class Slow(LocalBackend):
    def put(self, name, wanted, blocks):
        def slowly():
            for number, block in enumerate(blocks):
                if (name, wanted, number) == ("step_00000002", file, blocks_before):
                    print("here", flush=True)
                    time.sleep(600)
                yield block
        super().put(name, wanted, slowly())

class Context(SoloContext):
    def saved(self, step):
        if step == 2:
            print("here", flush=True)
            time.sleep(600)

context = Context(folder)
context.checkpoints.backend = Slow(folder)
with CheckpointWriter(context.checkpoints, context) as writer:
    for step in (1, 2):
        writer.save(*small(), meta(step, score=step))
"""


@pytest.mark.parametrize(
    ("file", "blocks", "step"), [(MODEL, 1, 1), (OPTIMIZER, 0, 1), (OPTIMIZER, 1, 1), (META, 0, 1), ("none", 0, 2)]
)
def test_a_process_killed_in_mid_save_or_just_after_it(tmp_path: Path, file: str, blocks: int, step: int) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path), file, str(blocks)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "here\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    context = SoloContext(tmp_path)
    assert steps(tmp_path) == [1, 2]
    assert resumed(tmp_path, context) == step
    assert (INTERRUPTED in context.messages[0]) == (step == 1)
    save_all(context, meta(3))
    assert steps(tmp_path) == [step, 3]
    assert all({path.name for path in folder.iterdir()} == set(FILES) for folder in saved(tmp_path))


FULL = """
import resource, sys, time
from pathlib import Path
from s5.training.context import SoloContext
from s5.checkpoints.writer import CheckpointWriter, SaveError
from tests.s5.toys import STEPS, batches, lsmcl_loop

context, last = SoloContext(Path(sys.argv[1])), sys.argv[2] == "last"
CheckpointWriter.retry_seconds = (0.0, 0.0)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)

def wait_for(ready):
    end = time.monotonic() + 60
    while not ready() and time.monotonic() < end:
        time.sleep(0.01)

def source(start):
    for item in batches(start):
        if item.step + 1 == 6:
            wait_for(lambda: last or any("train/save_seconds" in row for _, row in context.rows))
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
        if item.step + 1 == 7 and not last:
            wait_for(lambda: context.messages)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        yield item

try:
    lsmcl_loop(context, source, checkpoint_every=STEPS if last else 3).run()
except SaveError as error:
    print(error)
for line in context.messages:
    print(line)
print([row["train/save_failures"] for _, row in context.rows if "train/save_failures" in row])
"""


def full(folder: Path, when: str) -> list[str]:
    """Train in a process that may write only small files for a while, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(folder), when], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_training_continues_where_the_disk_is_full(tmp_path: Path) -> None:
    message, failures = full(tmp_path, "meanwhile")
    assert message.startswith(
        f"WARNING: step 6 could not be written to {str(tmp_path)!r} (File too large), the checkpoint"
    )
    assert re.search(
        r"of step 3 remains: free \d+ MB there, or lower loop.keep_checkpoints; training continues", message
    )
    assert failures == "[0.0, 1.0, 1.0]"
    assert steps(tmp_path) == [3, STEPS]
    assert resumed(tmp_path) == STEPS


def test_where_the_disk_is_full_for_the_last_checkpoint_the_run_fails_and_can_be_resumed(tmp_path: Path) -> None:
    context = SoloContext(tmp_path)
    lsmcl_loop(context, stopping(context, 3)).run()
    error, resuming, message, failures = full(tmp_path, "last")
    assert resuming == "resuming from the checkpoint of step 3"
    assert error.startswith(f"the last checkpoint is not saved: step {STEPS} could not be written to {str(tmp_path)!r}")
    assert "the checkpoint of step 3 remains: free" in error
    assert error.endswith("then run the same command again")
    assert message.startswith("WARNING")
    assert failures == "[1.0]"
    assert resumed(tmp_path) == 3


# --- saving ---------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointWriter, "retry_seconds", (0.0, 0.0))
    context = SoloContext(tmp_path)
    assert context.checkpoints is not None
    context.checkpoints.backend = Failing(tmp_path, left=2)
    save_all(context, meta(1))
    assert (context.messages, resumed(tmp_path)) == ([], 1)
    context.checkpoints.backend = Failing(tmp_path, left=3, file=META)
    with pytest.raises(
        SaveError, match=r"step 2 could not be written to .* \(no luck\), .* check that the storage can be"
    ):
        save_all(context, meta(2))
    assert len(context.messages) == 1
    assert steps(tmp_path) == [1]
    assert [row["train/save_failures"] for _, row in context.rows] == [0, 1]
    # An error of the training itself is raised, not that of the save after it.
    context.checkpoints.backend = Failing(tmp_path, left=9)

    def fail() -> None:
        assert context.checkpoints is not None
        with CheckpointWriter(context.checkpoints, context) as writer:
            writer.save(*small(), meta(3))
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_an_error_other_than_of_the_backend_ends_the_run(tmp_path: Path) -> None:
    context = SoloContext(tmp_path)
    assert context.checkpoints is not None
    writer = CheckpointWriter(context.checkpoints, context)
    task, optimizer = small()
    with pytest.raises(TypeError), writer:
        writer.save(task, optimizer, Meta(kind="class", step=1, model={"not JSON": object()}))
    assert steps(tmp_path) == [1]
    assert resumed(tmp_path) == 0


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path) -> None:
    LocalBackend(tmp_path).check_free_space(1)
    with pytest.raises(OSError, match=r"No space left on device: .* MB are free, .* MB needed") as raised:
        LocalBackend(tmp_path).check_free_space(1 << 60)
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize(("evaluated", "expected"), [(False, [1, 3]), (True, [1, 2, 3])])
def test_the_newest_replaces_a_pending_one_that_was_not_evaluated(
    tmp_path: Path, evaluated: bool, expected: list[int]
) -> None:
    context = SoloContext(tmp_path, retain=9)
    assert context.checkpoints is not None
    gate = context.checkpoints.backend = Gate(tmp_path)
    with CheckpointWriter(context.checkpoints, context) as writer:
        writer.save(*small(), meta(1))
        assert gate.reached.wait(60)
        writer.save(*small(), meta(2, score=1.0) if evaluated else meta(2))
        if evaluated:
            # The third one waits until the first is written.
            threading.Timer(0.2, gate.open.set).start()
        task, optimizer = small()
        writer.save(task, optimizer, meta(3))
        assert gate.open.is_set() == evaluated
        gate.open.set()
    assert steps(tmp_path) == expected
    assert writer.replaced == len(context.messages) == (0 if evaluated else 1)
    assert all(checkpoint.verify(folder) for folder in saved(tmp_path))
    weights = load_file(saved(tmp_path)[-1] / MODEL)
    assert torch.equal(weights["weight"], task.state_dict()["weight"])


def test_a_newer_checkpoint_ends_the_attempts_at_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointWriter, "retry_seconds", (600.0,))
    context = SoloContext(tmp_path)
    assert context.checkpoints is not None
    backend = context.checkpoints.backend = Failing(tmp_path, left=1)
    with CheckpointWriter(context.checkpoints, context) as writer:
        writer.save(*small(), meta(1))
        assert backend.failed.wait(60)
        writer.save(*small(), meta(2))
    assert steps(tmp_path) == [2]


def test_extra_state_and_metrics_are_restored(tmp_path: Path) -> None:
    extra = {"scale": 65536.0, "_growth_tracker": 3}
    given = Meta(kind="class", step=7, model={"a": [1, 2]}, metrics={"x": 0.1}, evaluated={"s": 0.3}, extra=extra)
    save_all(SoloContext(tmp_path), given)
    found = checkpoint.read_meta(saved(tmp_path)[0])
    assert (found.extra, found.metrics, found.evaluated) == (extra, {"x": 0.1}, {"s": 0.3})
    assert set(found.files) == {MODEL, OPTIMIZER}


def test_what_a_save_took_is_logged(tmp_path: Path) -> None:
    context = SoloContext(tmp_path)
    result = lsmcl_loop(context).run()
    rows = [(step, row) for step, row in context.rows if "train/save_seconds" in row]
    assert [step for step, _ in rows] == [STEPS // 2, STEPS]
    for _, row in rows:
        assert row["train/save_write_seconds"] > 0
        assert row["train/save_seconds"] > 0
        assert row["train/save_failures"] == 0
    assert rows[-1][1].items() <= result.metrics.items()
