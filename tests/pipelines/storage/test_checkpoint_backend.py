"""Checkpoints on a local disk and on an S3 service on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pyarrow import fs
from safetensors.torch import load

from pipelines import storage
from pipelines.errors import UserError
from pipelines.storage.checkpoint_backend import ObjectStore, store_of
from pipelines.storage.checkpoints import local_checkpoint
from s5.checkpoints import checkpoint
from s5.checkpoints.backend import LocalStore
from s5.checkpoints.checkpoint import META, MODEL, OPTIMIZER
from s5.checkpoints.retention import CUT, Checkpoints, name_of
from s5.checkpoints.writer import Saver
from s5.errors import CheckpointError, SaveError
from s5.training.context import SoloContext
from tests.s5.checkpoints.samples import meta, save_all
from tests.s5.toys import STEPS, lsmcl_fit, stopping


def context_on(uri: str, keep: int = 2) -> SoloContext:
    """Return a context whose checkpoints lie in an object store."""
    context = SoloContext(keep=keep)
    context.checkpoints = Checkpoints(store_of(uri), keep)
    return context


def listing(uri: str) -> dict[str, set[str]]:
    return store_of(uri).listing()


def spoil(uri: str, name: str, file: str) -> None:
    path = storage.join(uri, name, file)
    content = bytearray(storage.read_bytes(path))
    content[-1] ^= 1
    storage.write_bytes(path, bytes(content))


def test_a_store_is_chosen_by_the_name(tmp_path: Path) -> None:
    assert isinstance(store_of(str(tmp_path)), LocalStore)
    assert isinstance(store_of(f"file://{tmp_path}"), LocalStore)
    with pytest.raises(UserError, match="holds credentials"):
        store_of("s3://user:hush@bucket/out")


def test_a_run_goes_on_from_an_object_store(bucket: str) -> None:
    uri = storage.join(bucket, "out dir", "checkpoints")
    assert listing(uri) == {}
    straight = lsmcl_fit(SoloContext())
    straight.run()
    context = context_on(uri)
    lsmcl_fit(context, stopping(context, 3)).run()
    assert listing(uri) == {name_of(3): {META, MODEL, OPTIMIZER}}
    fit = lsmcl_fit(context_on(uri))
    result = fit.run()
    assert (result.started_at, result.step) == (3, STEPS)
    weights = load(storage.read_bytes(storage.join(uri, name_of(STEPS), MODEL)))
    assert all(torch.equal(weights[name], value) for name, value in straight.task.state_dict().items())
    with local_checkpoint(storage.join(uri, name_of(STEPS))) as folder:
        assert checkpoint.verify(folder).step == STEPS


def test_damage_in_an_object_store_is_passed_over(bucket: str) -> None:
    uri = storage.join(bucket, "checkpoints")
    save_all(context_on(uri, keep=4), meta(1), meta(2), meta(3), meta(4))
    storage.remove(storage.join(uri, name_of(4), META))
    spoil(uri, name_of(3), OPTIMIZER)
    context = context_on(uri)
    assert context.checkpoints is not None
    with context.checkpoints.resumed(0, context.tell) as folder:
        assert folder is not None
        assert checkpoint.read_meta(folder).step == 2
    assert not folder.exists()
    assert context.told == [
        f"checkpoint {name_of(4)} is passed over: {CUT}; checkpoint {name_of(3)} is passed over: {OPTIMIZER} is not "
        "what was saved (digests differ); going on from the checkpoint of step 2"
    ]
    save_all(context, meta(5))
    assert listing(uri) == {name_of(step): {META, MODEL, OPTIMIZER} for step in (2, 5)}
    for step in (2, 5):
        spoil(uri, name_of(step), MODEL)
    with (
        pytest.raises(CheckpointError, match=r"no checkpoint in 's3://.*' is sound"),
        context.checkpoints.resumed(0, print),
    ):
        pass


def test_a_store_that_does_not_answer_loses_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saver, "retry_seconds", (0.0,))
    gone = fs.FileSystem.from_uri(f"{bucket}-gone?allow_bucket_creation=true&allow_bucket_deletion=true")[0]
    name = f"{bucket}-gone".removeprefix("s3://")
    gone.create_dir(name)
    lost = context_on(storage.join(f"{bucket}-gone", "checkpoints"))
    assert lost.checkpoints is not None
    gone.delete_dir(name)
    with pytest.raises(
        SaveError, match=r"step 2 could not be written to 's3://.*-gone/checkpoints' .* see that the sto"
    ):
        save_all(lost, meta(2))
    assert lost.checkpoints.store.listing() == {}
    # The bucket is there again: the same run saves on.
    gone.create_dir(name)
    save_all(lost, meta(3))
    assert list(lost.checkpoints.store.listing()) == [name_of(3)]


def test_nothing_is_left_of_a_checkpoint_that_is_removed(bucket: str) -> None:
    uri = storage.join(bucket, "checkpoints")
    save_all(context_on(uri), meta(1))
    store = store_of(uri)
    assert isinstance(store, ObjectStore)
    assert store.read(name_of(1), META) == storage.read_bytes(storage.join(uri, name_of(1), META))
    store.remove(name_of(1))
    store.remove(name_of(1))
    system, inner = storage.filesystem(uri)
    found = system.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
    assert [info.path for info in found if name_of(1) in info.path] == []
