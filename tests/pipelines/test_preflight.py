"""Mistakes in what a stage reads and where it writes are answered before the stage is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import preflight
from pipelines.config import STAGES, FinetuneConfig, RunConfig, SweepConfig, override
from pipelines.config.dotted import hints
from pipelines.config.recipes import GROUPS
from pipelines.data.manifest import SCHEMA
from pipelines.errors import UserError
from s5.config import PathRole

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "mlflow", "timm", "matplotlib", "tyro")
# Runs the command line as `python -m pipelines` does, then lists what it has imported of these.
RUN = f"""
import sys
from pipelines.__main__ import main
status = main()
print(*[name for name in {HEAVY!r} if name in sys.modules])
sys.exit(status)
"""


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    row = {name: "x" if pa.types.is_string(SCHEMA.field(name).type) else 1 for name in SCHEMA.names}
    pq.write_table(pa.Table.from_pylist([row | {"split": "train"}], SCHEMA), tmp_path / "manifest.parquet")
    return str(tmp_path / "manifest.parquet")


def command(*arguments: str, cwd: Path, code: str = RUN) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretian"], "unknown stage 'pretian': did you mean pretrain?"),
        (["pretrain", "--preset", "quikstart"], "unknown preset 'quikstart'"),
        (["pretrain", "--lsmcl.mask-ration", "0.5"], "unknown setting 'lsmcl.mask_ration': did you mean"),
        (["pretrain", "--lsmcl.mask-ratio", "1.5"], "lsmcl.mask_ratio is 1.5: give a value in [0, 1)"),
        (["pretrain", "--manifest", "manifest.parque"], "manifest is 'manifest.parque': there is no such file"),
        (["sweep", "--space", "clip-lenght"], "space is 'clip-lenght': write key=value,value, or give a ready space"),
        (["evaluate", "--manifest", "manifest.parquet"], "checkpoint is 'out/finetune': there is no such folder"),
        (
            ["pretrain", "--preset", "base", "--preset=quickstart"],
            "--preset is given 2 times (base, quickstart)",
        ),
        (["pretrain", "--manifest", "s3://key:secret@bucket/m"], "'s3://***@bucket/m' holds credentials or a query"),
        (
            ["sample", "--tracking.uri", "file:mlruns"],
            "--tracking.uri is 'file:mlruns': MLflow no longer supports",
        ),
        (["sample", "--out", "of_pretrain"], "--out 'of_pretrain' holds a run of stage 'pretrain': give another"),
        (["sample", "--out", "manifest.parquet/out"], "--out is 'manifest.parquet/out': it cannot be written to"),
    ],
)
def test_a_mistake_costs_a_sentence_and_no_heavy_import(
    arguments: list[str], message: str, manifest: str, tmp_path: Path
) -> None:
    (tmp_path / "of_pretrain").mkdir()
    (tmp_path / "of_pretrain" / "run.json").write_text('{"stage": "pretrain"}')
    before = set(tmp_path.iterdir())
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stdout.split() == []
    assert set(tmp_path.iterdir()) == before


SECRET = "hush/K7"


@pytest.mark.parametrize(
    ("arguments", "variable", "message"),
    [
        (["sample", "--tracking.uri", f"http://user:{SECRET}@host"], "", "--tracking.uri holds credentials or a query"),
        (["report", f"--tracking.uri=https://user:{SECRET}@host"], "", "--tracking.uri holds credentials or a query"),
        (
            ["sweep", "--pretrain.tracking.uri", f"http://user:{SECRET}@host"],
            "",
            "--pretrain.tracking.uri holds credentials",
        ),
        (
            ["sample"],
            f"http://user:{SECRET}@host",
            "MLFLOW_TRACKING_URI holds credentials or a query: give http://host",
        ),
        (["index", "--videos", f"s3://key:{SECRET}@bucket/v"], "", "'s3://***@bucket/v' holds credentials"),
        (["index", "--videos", f"https://host/v?sig={SECRET}"], "", "'https://host/v?***' holds credentials"),
        (["sample", "--out", f"s3://key:{SECRET}@bucket/o"], "", "'s3://***@bucket/o' holds credentials"),
        (
            ["sweep", "--finetune.checkpoint", f"s3://key:{SECRET}@bucket/c"],
            "",
            "'s3://***@bucket/c' holds credentials",
        ),
        (["sample", "--config", f"s3://key:{SECRET}@bucket/run.json"], "", "'s3://***@bucket/run.json' holds cred"),
    ],
)
def test_credentials_are_refused_and_found_in_no_file(
    arguments: list[str], variable: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert SECRET not in done.stderr + done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['pydantic'] = None; from pipelines.__main__ import main; sys.exit(main())"
    done = command(cwd=tmp_path, code=blocked)
    assert done.returncode == 2
    assert done.stderr == "error: the package pydantic is missing: run `make setup`, then .venv/bin/python\n"


def test_a_package_that_a_stage_needs_is_named(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['ray'] = None; from pipelines.__main__ import main; sys.exit(main())"
    done = command("sample", "--out", "out", cwd=tmp_path, code=blocked)
    assert done.returncode == 2
    assert done.stderr == "error: the package ray is missing: run `make setup`, then .venv/bin/python\n"


def test_exit_handlers_run_before_the_process_ends(tmp_path: Path) -> None:
    code = "import atexit; from pipelines import __main__ as program; main = program.main; "
    code += "program.main = lambda: (atexit.register(print, 'handled'), main())[1]; program.entry()"
    done = command("pretian", cwd=tmp_path, code=code)
    assert done.returncode == 2
    assert done.stdout == "handled\n"
    assert done.stderr == "error: unknown stage 'pretian': did you mean pretrain?\n"


def test_a_reader_that_has_left(tmp_path: Path) -> None:
    """As `... | head -1`: the status is that of a program that a broken pipe ends."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-m", "pipelines", "--help"]
    done = subprocess.run(arguments, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == "error: the program that read the output has ended: run the same command again to resume\n"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_a_process_without_output(closed: str) -> None:
    # As some job schedulers start programs.
    done = subprocess.run(f"{sys.executable} -m pipelines --help {closed}", cwd=ROOT, shell=True)
    assert done.returncode == 0


has_full = pytest.mark.skipif(
    not os.access("/dev/full", os.W_OK), reason="this system has no device that is always full"
)


@has_full
@pytest.mark.parametrize("asked", ["--help", "index --help"])
def test_an_output_that_is_full(asked: str) -> None:
    command = f"{sys.executable} -m pipelines {asked} >/dev/full"
    done = subprocess.run(command, cwd=ROOT, shell=True, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written, its disk is full: make room and run it again\n"


@has_full
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever is opened to be written is the device that never has room.
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: opened(Path("/dev/full"), mode))
    with pytest.raises(UserError, match=r"--out is .*: its disk is full; make room there or give another folder"):
        preflight.check_out(str(tmp_path / "out"))


def test_what_is_read_is_looked_at(manifest: str, tmp_path: Path) -> None:
    config = override(FinetuneConfig(), {"manifest": manifest, "model.backbone.frozen": True})
    preflight.check_inputs(config)
    preflight.check_inputs(override(config, {"model.backbone.weights": "timm", "checkpoint": "s3://bucket/run"}))
    (tmp_path / "empty").mkdir()
    for key, value, message in (
        ("checkpoint", str(tmp_path / "empty"), "neither a checkpoint nor the --out of a finished stage"),
        ("checkpoint", str(tmp_path / "empyt"), f"did you mean {tmp_path / 'empty'}"),
        ("features", str(tmp_path / "empty"), "there are no finished features"),
        ("features", "nowhere", "features is 'nowhere': there is no such folder"),
        ("manifest", __file__, "not a readable parquet file"),
        ("model.backbone.weights", "no.pt", "model.backbone.weights is 'no.pt': there is no such file"),
    ):
        with pytest.raises(UserError, match=message):
            preflight.check_inputs(override(config, {key: value}))


def test_a_sweep_reads_what_its_stages_read(manifest: str) -> None:
    sweep = override(SweepConfig(), {"pretrain.manifest": manifest, "finetune.checkpoint": "made/by/each/trial"})
    assert set(preflight.used_paths(sweep)) == {"out", "pretrain.manifest", "finetune.manifest"}
    assert set(preflight.used_paths(override(sweep, {"stages": "pretrain"}))) == {"out", "pretrain.manifest"}
    alone = override(sweep, {"stages": "finetune", "space": ("features=a,b", "optim.lr=1e-3,1e-4")})
    named = {"out", "finetune.manifest", "finetune.checkpoint", "space features", "space features[1]"}
    assert set(preflight.used_paths(alone)) == named


WORDS = {
    *("dataset", "backbone", "split", "register", "name", "metric", "space", "model.backbone.made_by"),
    *("model.backbone.name", "tracking.experiment", "tracking.run_name"),
}
"""Settings that are texts and name no file or folder: timm refuses a folder as a model's name."""
OWN_CHECKS = {"tracking.uri"}
"""A database or a server: `tracking.resolve_uri` and `submit.check_tracking` look at it."""


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_that_is_a_text_says_whether_it_names_a_path(stage: str) -> None:
    """A new one has to be given a `PathRole`, by which it is checked before anything is sent, or be listed here."""
    for key, hint in hints(getattr(RunConfig(), stage)).items():
        members = get_args(hint) if isinstance(hint, types.UnionType) or get_origin(hint) is tuple else (hint,)
        if any(member is str for member in members):
            names = {key.removeprefix(f"{group}.") for group in ("", "pretrain", "finetune", *GROUPS.values())}
            assert names & (WORDS | OWN_CHECKS), f"{stage}: {key} is a text without a role"
        elif any(get_origin(member) is Annotated for member in members):
            assert all(isinstance(role, PathRole) for member in members for role in get_args(member)[1:])


def test_paths_in_a_run_json_are_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"stage": "pretrain", "manifest": "nowhere"}))
    done = command("pretrain", "--config", "run.json", cwd=tmp_path)
    assert done.stderr.startswith("error: manifest is 'nowhere': there is no such file")
