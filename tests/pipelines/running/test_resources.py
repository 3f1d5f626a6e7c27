"""Whether workers and decoding fit the nodes of a cluster, one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import DataConfig, ScaleConfig
from pipelines.errors import UserError
from pipelines.running import resources


def scale(workers: int, cpus: float = 1.0, **settings: Any) -> ScaleConfig:
    return ScaleConfig(num_workers=workers, cpus_per_worker=cpus, **settings)


def nodes(monkeypatch: pytest.MonkeyPatch, *cpus: float, gpus: float = 0) -> None:
    monkeypatch.setattr(resources, "nodes", lambda: [{"CPU": each, "GPU": gpus} for each in cpus])


@pytest.mark.parametrize(
    ("cpus", "settings", "message"),
    [
        ((2, 2), scale(1, 3), r"scale.cpus_per_worker is 3: no node of the cluster has more than 2 CPUs"),
        ((1, 1), scale(3), r"scale.num_workers is 3: 3 CPUs are needed and the cluster has 2"),
        ((2, 2, 2), scale(4, 1.5), r"scale.num_workers is 4: a worker needs 1.5 CPUs on one node, .* 3 nodes"),
        ((4,), scale(1, gpus_per_worker=1), r"scale.gpus_per_worker is 1: no node of the cluster has more than 0 GPUs"),
        ((2,), scale(8, 1.5, min_workers=2), r"scale.min_workers is 2: 3 CPUs are needed and the cluster has 2"),
    ],
)
def test_workers_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, cpus: tuple[float, ...], settings: ScaleConfig, message: str
) -> None:
    nodes(monkeypatch, *cpus)
    with pytest.raises(UserError, match=message):
        resources.decode_tasks(settings, DataConfig(cpus_per_decode=0.1))


def test_a_decode_task_has_to_fit_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, 2, 2)
    # Half a CPU is left on each node: one in all, and room for none of one CPU.
    with pytest.raises(UserError, match=r"data.cpus_per_decode is 1: 2 workers leave 1 CPUs .* 0.5 of them on one"):
        resources.decode_tasks(scale(2, 1.5), DataConfig(cpus_per_decode=1))
    assert resources.decode_tasks(scale(2, 1.5), DataConfig(cpus_per_decode=0.5)) == 2
    assert resources.decode_tasks(scale(1, 1.5), DataConfig(cpus_per_decode=1)) == 2


def test_tasks_alone_have_all_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "ensure_ray", lambda: None)
    monkeypatch.setattr(resources, "node_cpus", lambda: [2.0, 1.5])
    assert resources.check_cluster(None, DataConfig(cpus_per_decode=1)) == 3
    assert resources.check_cluster(None, DataConfig(cpus_per_decode=0.5, decode_tasks=4)) == 4
    with pytest.raises(UserError, match=r"data.cpus_per_decode is 3: no node of the cluster has more than 2 CPUs"):
        resources.check_cluster(None, DataConfig(cpus_per_decode=3))


def test_fewer_workers_are_enough_where_they_may_be_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, 1)
    settings, data = scale(2, 0.75, min_workers=1), DataConfig(cpus_per_decode=0.25)
    assert resources.decode_tasks(settings, data) == 1
    assert resources.decode_tasks_per_worker(settings, data, 1) == (1, 0.25)


def test_decoding_goes_on_where_workers_hold_all_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(cpus_per_decode=0.5)
    nodes(monkeypatch, 2)
    assert resources.decode_tasks_per_worker(scale(2, min_workers=1), data, 2) == (1, resources.RESERVED_CPUS)
    nodes(monkeypatch, 2, 2)
    assert resources.decode_tasks_per_worker(scale(2, min_workers=1), data, 2) == (2, 0.5)


def test_settings_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match=r"scale.min_workers is 3: give 0 to scale.num_workers, 2"):
        scale(2, min_workers=3)
    with pytest.raises(ValueError, match=r"scale.hang_timeout_s is 1"):
        scale(2, hang_timeout_s=1)


# --- where the process runs -----------------------------------------------------------------------------------------

START = """
import sys
from pipelines.errors import UserError
from pipelines.running.resources import ensure_ray
try:
    ensure_ray()
except UserError as error:
    print(error)
"""
ROOT = Path(__file__).parents[3]


def starting(command: list[str], cwd: Path, executable: str | None = None, **env: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        executable=executable,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_folder_of_temporary_files_is_named(tmp_path: Path, variable: str) -> None:
    folder = tmp_path / ("d" * (103 - len(str(tmp_path)) - 1))
    folder.mkdir()
    told = starting([sys.executable, "-c", START], tmp_path, **{variable: str(folder)})
    assert told.startswith(f"{variable} is {str(folder)!r}, 103 bytes long: Ray's sockets lie below it")
    assert told.endswith("set RAY_TMPDIR to a short folder, such as /tmp\n")
    assert told.count("\n") == 1


def test_uv_run_from_another_folder_is_named(tmp_path: Path) -> None:
    project, here = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    here.mkdir()
    # A process with uv's command line: its parent is all that Ray looks at.
    (here / "start.py").write_text(START)
    (here / "run").write_text(f"{sys.executable} start.py\ntrue\n")
    told = starting(["uv", "run", "--project", str(project), "python", "start.py"], here, "/bin/sh")
    assert told.startswith("this runs below `uv run`, with which Ray cannot start its workers from this folder (Your")
    assert "set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0, or run the environment's own Python" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("given", [None, "1"])
def test_the_command_line_leaves_uv_out_unless_told(tmp_path: Path, given: str | None) -> None:
    code = (
        "import os; from pipelines.__main__ import main; main(); print(os.environ.get('RAY_ENABLE_UV_RUN_RUNTIME_ENV'))"
    )
    chosen = {} if given is None else {resources.UV_HOOK: given}
    told = starting([sys.executable, "-c", code], tmp_path, RAY_ADDRESS="host:6379", **chosen)
    assert told.splitlines()[-1] == (given or "0")
