"""Which checkpoint a run resumes from, which damage is found, and which checkpoints are retained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load, load_file, save_file
from torch import nn

from s5.checkpoints import checkpoint
from s5.checkpoints.backend import LocalBackend
from s5.checkpoints.checkpoint import FORMAT, META, MODEL, OPTIMIZER
from s5.checkpoints.history import INTERRUPTED, CheckpointHistory, checkpoint_name
from s5.checkpoints.host_buffer import FileBuffer
from s5.checkpoints.writer import CheckpointWriter
from s5.errors import CheckpointError, DamagedError
from s5.training.context import SoloContext
from s5.training.loop import TrainingLoop
from tests.s5.checkpoints.samples import FILES, Gate, cut, flip, meta, resumed, save_all, small, steps
from tests.s5.toys import STEPS, finetune_loop, lsmcl_loop, saved, stopping

ROOT = Path(__file__).parents[3]


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_file_buffer_is_what_safetensors_reads_and_is_reused() -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8)
    tensors = {str(dtype): torch.arange(35).view(5, 7).to(dtype) for dtype in dtypes}
    tensors |= {"bool": torch.tensor([True, False, True]), "scalar": torch.tensor(3.0), "none": torch.zeros(0, 3)}
    tensors["turned"] = torch.arange(12.0).view(3, 4).t()
    buffer = FileBuffer()
    places = set()
    for shift in (0, 1):
        tensors = {name: value if value.dtype == torch.bool else value + shift for name, value in tensors.items()}
        buffer.copy_from(tensors)
        places.add(buffer._buffer.data_ptr())
        content = b"".join(buffer.blocks())
        found = load(content)
        assert buffer.size == len(content)
        assert found.keys() == tensors.keys()
        assert all(
            found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in tensors.items()
        )
    assert len(places) == 1
    buffer.copy_from({})
    assert load(b"".join(buffer.blocks())) == {}
    with pytest.raises(ValueError, match=r"^odd cannot be saved in a checkpoint: .*complex128"):
        buffer.copy_from({"odd": torch.zeros(1, dtype=torch.complex128)})


def test_training_after_a_save_does_not_change_it(tmp_path: Path) -> None:
    task, optimizer = small()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    gate = Gate(tmp_path)
    with CheckpointWriter(CheckpointHistory(gate), SoloContext()) as writer:
        writer.save(task, optimizer, meta(1))
        for parameter in task.parameters():
            parameter.data.zero_()
        gate.open.set()
    found = load_file(saved(tmp_path)[0] / MODEL)
    assert all(torch.equal(found[name], value) for name, value in before.items())


def _parses(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, name: str) -> None:
    save_all(SoloContext(tmp_path), meta(1))
    folder = saved(tmp_path)[0]
    sound, whole = checkpoint.verify(folder), (folder / name).read_bytes()
    offsets = range(len(whole)) if name == META else [0, 7, 8, 20, len(whole) // 2, len(whole) - 1]
    for offset in offsets:
        flip(folder / name, offset, offset % 8)
        # White space between what JSON says may be any other.
        if whole[offset : offset + 1].isspace() and _parses(folder / META):
            assert checkpoint.verify(folder) == sound
        else:
            with pytest.raises(DamagedError, match=name):
                checkpoint.verify(folder)
        (folder / name).write_bytes(whole)
    assert checkpoint.verify(folder) == sound


def test_a_format_of_another_version_is_an_error_and_not_skipped(tmp_path: Path) -> None:
    save_all(SoloContext(tmp_path), meta(1), meta(2))
    path = saved(tmp_path)[-1] / META
    values = json.loads(path.read_text())
    del values["digest"]
    path.write_text(json.dumps(values | {"format": FORMAT - 1, "commit": "abc"}))
    with pytest.raises(CheckpointError, match=rf"has format 1, and this version reads {FORMAT}: use .*commit abc"):
        resumed(tmp_path)
    other = tmp_path / "former"
    (other / "checkpoint_2026-11-01").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="checkpoint_2026-11-01' is a checkpoint of an earlier version"):
        resumed(other)


# --- resuming -------------------------------------------------------------------------------------------------------


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (lambda folder: flip(folder / MODEL, 100), "model.safetensors is not what was saved"),
    "truncated": (lambda folder: cut(folder / OPTIMIZER), "optimizer.safetensors is not what was saved"),
    "empty": (lambda folder: (folder / MODEL).write_bytes(b""), "model.safetensors is not what was saved"),
    "missing": (lambda folder: (folder / OPTIMIZER).unlink(), "optimizer.safetensors is missing"),
    "uncommitted": (lambda folder: (folder / META).unlink(), "its save was interrupted"),
    "meta": (lambda folder: cut(folder / META), "meta.json"),
    "gone": (lambda folder: [file.unlink() for file in folder.iterdir()] and None, "its save was interrupted"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path: Path, damage: str) -> None:
    save_all(SoloContext(tmp_path, retain=3), meta(1), meta(2), meta(3))
    spoil, reason = DAMAGES[damage]
    spoil(saved(tmp_path)[-1])
    context = SoloContext(tmp_path)
    assert resumed(tmp_path, context) == 2
    assert len(context.messages) == 1
    assert f"checkpoint step_00000003 is skipped: {reason}" in context.messages[0]
    assert context.messages[0].endswith("; resuming from the checkpoint of step 2")
    # The next save deletes it.
    save_all(context, meta(4))
    assert steps(tmp_path) == [2, 4]


def test_where_none_is_sound_nothing_starts_from_zero(tmp_path: Path) -> None:
    save_all(SoloContext(tmp_path), meta(1), meta(2))
    for folder in saved(tmp_path):
        flip(folder / MODEL, -1)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is sound \(step_00000002: .*; step_00000001: .*--out"
    ):
        resumed(tmp_path)
    assert steps(tmp_path) == [1, 2]


def test_only_an_interrupted_first_save_starts_from_zero(tmp_path: Path) -> None:
    save_all(SoloContext(tmp_path), meta(1), meta(2))
    first, second = saved(tmp_path)
    (first / META).unlink()
    (second / META).unlink()
    with pytest.raises(CheckpointError, match="is sound"):
        resumed(tmp_path)
    (second / MODEL).unlink()
    (second / OPTIMIZER).unlink()
    second.rmdir()
    context = SoloContext(tmp_path)
    assert resumed(tmp_path, context) == 0
    assert context.messages == [f"checkpoint step_00000001 is skipped: {INTERRUPTED}; starting from step 0"]


@pytest.mark.usefixtures("saves_in_turn")
@pytest.mark.parametrize("make", [lsmcl_loop, finetune_loop])
def test_a_run_that_resumes_from_the_checkpoint_before_ends_the_same(
    tmp_path: Path, make: Callable[..., TrainingLoop]
) -> None:
    straight = make(SoloContext())
    straight.run()
    make(SoloContext(tmp_path), checkpoint_every=2).run()
    assert steps(tmp_path) == [STEPS - 2, STEPS]
    flip(saved(tmp_path)[-1] / OPTIMIZER, -5)
    again = make(SoloContext(tmp_path), checkpoint_every=2)
    result = again.run()
    assert (result.started_at, result.step) == (STEPS - 2, STEPS)
    weights = again.task.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in straight.task.state_dict().items())
    assert checkpoint.verify(saved(tmp_path)[-1]).step == STEPS


def write_format_2(folder: Path, task: nn.Module, optimizer: torch.optim.Optimizer, values: dict[str, object]) -> None:
    """Write a checkpoint as its format is documented, with safetensors' own writer and none of the code under test."""
    folder.mkdir(parents=True)
    state = optimizer.state_dict()["state"]
    save_file(dict(task.state_dict()), folder / "model.safetensors")
    moments = {f"{index}.{name}": value for index, each in state.items() for name, value in each.items()}
    save_file(moments, folder / "optimizer.safetensors")
    names = ("model.safetensors", "optimizer.safetensors")
    values = values | {name: {} for name in ("settings", "evaluated")} | {"commit": "unknown", "format": 2}
    values["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(values | {"digest": digest}))


@pytest.mark.usefixtures("saves_in_turn")
@pytest.mark.parametrize("make", [lsmcl_loop, finetune_loop])
def test_a_checkpoint_of_the_documented_format_is_resumed(tmp_path: Path, make: Callable[..., TrainingLoop]) -> None:
    """Such as one that an earlier version wrote."""
    straight = make(SoloContext())
    straight.run()
    context = SoloContext()
    half = make(context, stopping(context, 5))
    half.run()
    meta = half.inputs.meta(5, half.state.metrics)
    del meta.model["decoder"]["selection"]["noise"]
    values = {"kind": meta.kind, "step": 5, "model": meta.model, "classes": meta.classes, "metrics": meta.metrics}
    write_format_2(tmp_path / "step_00000005", half.task, half.optimizer, values | {"extra": {}})
    again = make(SoloContext(tmp_path))
    assert again.run().started_at == 5
    torch.testing.assert_close(again.task.state_dict(), straight.task.state_dict(), rtol=0, atol=0)
    for name, noise in (("step_00000005", "training"), (f"step_{STEPS:08d}", "always")):
        model, found = checkpoint.read_model(tmp_path / name)
        assert (found.kind, model.config.decoder.selection.noise) == (meta.kind, noise)


def _resume_together(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/processes", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found: list[object] = []
    for name in ("shared", "apart"):
        place = f"{folder}/{name}" if name == "shared" else f"{folder}/{name}{rank}"
        messages: list[str] = []
        try:
            with CheckpointHistory(LocalBackend(Path(place))).resume_folder(rank, messages.append) as path:
                found.append([str(path), len(messages)])
        except CheckpointError as error:
            found.append(str(error))
    Path(folder, f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_workers_resume_from_the_same_checkpoint(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    save_all(SoloContext(shared), meta(1), meta(2))
    flip(saved(shared)[-1] / MODEL, -1)
    for rank in (0, 1):
        # Of one step on both machines, but not the same.
        torch.manual_seed(rank)
        save_all(SoloContext(tmp_path / f"apart{rank}"), meta(1))
    mp.start_processes(_resume_together, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in (0, 1))
    assert first[0] == [str(shared / checkpoint_name(1)), 1]
    assert second[0] == [str(shared / checkpoint_name(1)), 0]
    assert first[1] == [str(tmp_path / "apart0" / checkpoint_name(1)), 1]
    assert "worker 1 on " in second[1]
    assert "(its content differs): --out has to be a folder that all machines share" in second[1]


# --- retention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("best", "retained"), [(None, [5, 6]), (("score", "max"), [2, 5, 6]), (("score", "min"), [3, 5, 6])]
)
def test_the_last_and_the_best_are_retained(tmp_path: Path, best: tuple[str, str] | None, retained: list[int]) -> None:
    context = SoloContext(tmp_path, retain=2, best=best)
    (tmp_path / "other").mkdir()
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.9, 5: float("nan")}
    save_all(context, *(meta(step, score=score) for step, score in scores.items()), meta(6))
    assert steps(tmp_path) == retained
    assert (tmp_path / "other").is_dir()
    assert context.checkpoints is not None
    metas = context.checkpoints.metas()
    assert list(metas) == [checkpoint_name(step) for step in retained]
    if best is not None:
        assert context.checkpoints.best_of(metas) == (checkpoint_name(retained[0]), scores[retained[0]])


def test_a_damaged_checkpoint_does_not_count_as_retained(tmp_path: Path) -> None:
    context = SoloContext(tmp_path, retain=2)
    save_all(context, meta(1), meta(2), meta(3))
    assert steps(tmp_path) == [2, 3]
    cut(saved(tmp_path)[-1] / META)
    save_all(SoloContext(tmp_path, retain=2), meta(4))
    assert steps(tmp_path) == [2, 4]
