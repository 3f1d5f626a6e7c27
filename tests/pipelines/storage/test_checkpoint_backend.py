"""Checkpoints on a local disk and on an S3 service on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pyarrow import fs
from safetensors.torch import load

from pipelines import storage
from pipelines.errors import UserError
from pipelines.storage.checkpoint_backend import ObjectStoreBackend, checkpoint_backend
from pipelines.storage.weights import local_checkpoint
from s5.checkpoints import checkpoint
from s5.checkpoints.backend import LocalBackend
from s5.checkpoints.checkpoint import META, MODEL, OPTIMIZER
from s5.checkpoints.history import INTERRUPTED, CheckpointHistory, checkpoint_name
from s5.checkpoints.writer import CheckpointWriter
from s5.errors import CheckpointError, SaveError
from s5.training.context import SoloContext
from tests.s5.checkpoints.samples import meta, save_all
from tests.s5.toys import STEPS, lsmcl_loop, stopping


def context_on(uri: str, retain: int = 2) -> SoloContext:
    """Return a context whose checkpoints are in an object store."""
    context = SoloContext(retain=retain)
    context.checkpoints = CheckpointHistory(checkpoint_backend(uri), retain)
    return context


def listing(uri: str) -> dict[str, set[str]]:
    return checkpoint_backend(uri).listing()


def spoil(uri: str, name: str, file: str) -> None:
    path = storage.join(uri, name, file)
    content = bytearray(storage.read_bytes(path))
    content[-1] ^= 1
    storage.write_bytes(path, bytes(content))


def test_the_backend_is_chosen_by_the_path(tmp_path: Path) -> None:
    assert isinstance(checkpoint_backend(str(tmp_path)), LocalBackend)
    assert isinstance(checkpoint_backend(f"file://{tmp_path}"), LocalBackend)
    with pytest.raises(UserError, match="holds credentials"):
        checkpoint_backend("s3://user:hush@bucket/out")


def test_a_run_resumes_from_an_object_store(bucket: str) -> None:
    uri = storage.join(bucket, "out dir", "checkpoints")
    assert listing(uri) == {}
    straight = lsmcl_loop(SoloContext())
    straight.run()
    context = context_on(uri)
    lsmcl_loop(context, stopping(context, 3)).run()
    assert listing(uri) == {checkpoint_name(3): {META, MODEL, OPTIMIZER}}
    loop = lsmcl_loop(context_on(uri))
    result = loop.run()
    assert (result.started_at, result.step) == (3, STEPS)
    weights = load(storage.read_bytes(storage.join(uri, checkpoint_name(STEPS), MODEL)))
    assert all(torch.equal(weights[name], value) for name, value in straight.task.state_dict().items())
    with local_checkpoint(storage.join(uri, checkpoint_name(STEPS))) as folder:
        assert checkpoint.verify(folder).step == STEPS


def test_damage_in_an_object_store_is_skipped(bucket: str) -> None:
    uri = storage.join(bucket, "checkpoints")
    save_all(context_on(uri, retain=4), meta(1), meta(2), meta(3), meta(4))
    storage.remove(storage.join(uri, checkpoint_name(4), META))
    spoil(uri, checkpoint_name(3), OPTIMIZER)
    context = context_on(uri)
    assert context.checkpoints is not None
    with context.checkpoints.resume_folder(0, context.notify) as folder:
        assert folder is not None
        assert checkpoint.read_meta(folder).step == 2
    assert not folder.exists()
    assert context.messages == [
        f"checkpoint {checkpoint_name(4)} is skipped: {INTERRUPTED}; checkpoint {checkpoint_name(3)} is skipped: "
        f"{OPTIMIZER} is not what was saved (digests differ); resuming from the checkpoint of step 2"
    ]
    save_all(context, meta(5))
    assert listing(uri) == {checkpoint_name(step): {META, MODEL, OPTIMIZER} for step in (2, 5)}
    for step in (2, 5):
        spoil(uri, checkpoint_name(step), MODEL)
    with (
        pytest.raises(CheckpointError, match=r"no checkpoint in 's3://.*' is sound"),
        context.checkpoints.resume_folder(0, print),
    ):
        pass


def test_a_store_that_does_not_answer_loses_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointWriter, "retry_seconds", (0.0,))
    gone = fs.FileSystem.from_uri(f"{bucket}-gone?allow_bucket_creation=true&allow_bucket_deletion=true")[0]
    name = f"{bucket}-gone".removeprefix("s3://")
    gone.create_dir(name)
    lost = context_on(storage.join(f"{bucket}-gone", "checkpoints"))
    assert lost.checkpoints is not None
    gone.delete_dir(name)
    with pytest.raises(
        SaveError, match=r"step 2 could not be written to 's3://.*-gone/checkpoints' .* check that the sto"
    ):
        save_all(lost, meta(2))
    assert lost.checkpoints.backend.listing() == {}
    # Once the bucket is back, the same run saves again.
    gone.create_dir(name)
    save_all(lost, meta(3))
    assert list(lost.checkpoints.backend.listing()) == [checkpoint_name(3)]


def test_nothing_remains_of_a_checkpoint_that_is_removed(bucket: str) -> None:
    uri = storage.join(bucket, "checkpoints")
    save_all(context_on(uri), meta(1))
    backend = checkpoint_backend(uri)
    assert isinstance(backend, ObjectStoreBackend)
    assert backend.read(checkpoint_name(1), META) == storage.read_bytes(storage.join(uri, checkpoint_name(1), META))
    backend.remove(checkpoint_name(1))
    backend.remove(checkpoint_name(1))
    system, inner = storage.filesystem(uri)
    found = system.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
    assert [info.path for info in found if checkpoint_name(1) in info.path] == []
