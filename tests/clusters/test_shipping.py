"""What a job takes along: code alone, not much of it, and the Python that runs Ray."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clusters import shipping, submit
from pipelines.config import PretrainConfig
from pipelines.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def plant(tree: Path) -> None:
    """Make a checkout with things that must not leave it."""
    for package in shipping.CODE:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    for name in (".env", "secret.txt", "s5/.env", ".git/config", "out/run/model.pt", "v.mp4", "s5/weights.pt"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("secret")


def test_only_code_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path / "tree")
    (tmp_path / "tree/clusters/values-with-password.yaml").write_text("secret")
    monkeypatch.setattr(shipping, "ROOT", tmp_path / "tree")
    config = PretrainConfig(out="/o", manifest="/m")
    submit.stage_package(submit.Submission("pretrain", config, (), 0, 60), tmp_path / "package")
    shipped = {path.relative_to(tmp_path / "package") for path in (tmp_path / "package").rglob("*") if path.is_file()}
    assert {str(path) for path in shipped if path.suffix != ".py"} == {
        "clusters/python.sh",
        "pyproject.toml",
        "run.json",
        "pipelines/reporting/page.html",
    }
    assert {path.parts[0] for path in shipped if path.suffix == ".py"} == set(shipping.CODE)
    run = json.loads((tmp_path / "package/run.json").read_text())
    assert run["stage"] == "pretrain"
    assert run["manifest"] == "/m"


def test_more_than_code_is_refused_with_the_largest_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "ROOT", tmp_path)
    for name, size in {"s5/a.py": 9, "pipelines/page.html": 5_000_000, "clusters/b.py": 4_000_000}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(size))
    with pytest.raises(UserError, match=r"the code to ship has 9.0 MB.*files are pipelines/page.html \(5.0 MB\), clus"):
        shipping.stage_code(tmp_path / "package")


def test_the_python_of_ray_is_found(tmp_path: Path) -> None:
    """Ray's raylet is an ancestor of a job; here a shell whose arguments are like the raylet's stands in for it."""
    raylet = ["sh", "-c", "sh -c 'sh clusters/python.sh -c \"$1\"; true' sh 'import sys; print(sys.executable)'; true"]
    path = {"PATH": "/usr/bin:/bin"}
    worker = f"--python_worker_command={sys.executable} setup_worker.py --a=b"
    done = subprocess.run([*raylet, worker], cwd=ROOT, env=path, capture_output=True, text=True)
    assert done.stdout == f"{sys.executable}\n", done.stderr
    (tmp_path / "python").symlink_to(sys.executable)
    done = subprocess.run(raylet, cwd=ROOT, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/python\n", done.stderr
