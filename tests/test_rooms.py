"""The rooms rule: who may import whom, read from the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("s5", "pipelines", "clusters")
# The rooms of a package, in the order in which they may import each other: a room those before it. "" is the top.
ROOMS = {
    "s5": ("config", "", "video", "ssm", "models", "tasks", "checkpoints", "training", "evaluation"),
    "pipelines": (
        "",
        "config",
        "storage",
        "tracking",
        "running",
        "data",
        "training",
        "tuning",
        "recipes",
        "plots",
        "reporting",
        "stages",
    ),
    "clusters": ("",),
}
# Modules at the top that stand above all rooms: the command line, and what a notebook calls.
FACES = (
    "pipelines/__main__.py",
    "pipelines/command_line.py",
    "pipelines/closing.py",
    "pipelines/dry_run.py",
    "pipelines/preflight.py",
    "pipelines/usage.py",
    "pipelines/__init__.py",
    "s5/__init__.py",
)
STAGES = (
    "sample",
    "index",
    "transcode",
    "narrate",
    "pretrain",
    "features",
    "finetune",
    "evaluate",
    "sweep",
    "predict",
    "report",
    "recipe",
)
FORBIDDEN = {"s5": ("ray", "mlflow", "pipelines", "clusters"), "pipelines": ("clusters",)}
# Who alone may import a package: a folder, or a file.
HOMES = {
    "mlflow": ("pipelines/tracking/",),
    "ray.train": ("pipelines/training/",),
    "ray.tune": ("pipelines/tuning/",),
    "matplotlib": ("pipelines/plots/",),
    "jinja2": ("pipelines/reporting/",),
    "tyro": ("pipelines/usage.py",),
}
MODULES_A_ROOM = 13
S5_NEEDS = ("torch", "timm", "einops", "numpy", "safetensors", "torchvision")
BLOCKED = ("ray", "mlflow", "decord", "av", "pyarrow", "tyro", "pydantic", "sklearn", "pipelines", "clusters")


def imports(tree: ast.Module, package: str) -> set[str]:
    """Return the dotted names that a file imports or reaches through `ray.`, those inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ray":
            names.add(f"ray.{node.attr}")
    return names


def holds(names: set[str], module: str) -> bool:
    """Return whether a module or a part of it is among imported names."""
    return any(name == module or name.startswith(f"{module}.") for name in names)


def room_of(package: str, parts: list[str]) -> str:
    """Return the room of a package that a dotted name, split and without the package's, leads to."""
    return parts[0] if parts and parts[0] in ROOMS[package] else ""


def against_the_order(path: str, names: set[str]) -> Iterator[str]:
    """Yield the rooms below its own that a file imports."""
    package, *rest = path.split("/")
    order = ROOMS[package]
    own = room_of(package, rest[:-1])
    for room in sorted({room_of(package, name.split(".")[1:]) for name in names if name.startswith(f"{package}.")}):
        if path not in FACES and order.index(room) > order.index(own):
            yield f"{path} imports the room {package}.{room}, which comes after its own"


def breaches(path: str, source: str) -> Iterator[str]:
    """Yield what a file, given by its path below the root, does against the rooms rule."""
    tree = ast.parse(source, path)
    *folders, file = path.removesuffix(".py").split("/")
    names = imports(tree, ".".join(folders))
    for module in FORBIDDEN.get(folders[0], ()):
        if holds(names, module):
            yield f"{path} imports {module}"
    for module, homes in HOMES.items():
        if not path.startswith(homes) and holds(names, module):
            yield f"{path} imports {module}, which belongs in {homes[0]}"
    yield from against_the_order(path, names)
    if file == "utils" or "utils" in folders:
        yield f"{path} is named utils"
    if folders == ["pipelines", "stages"] and file in STAGES:
        for later in STAGES[STAGES.index(file) + 1 :]:
            if holds(names, f"pipelines.stages.{later}"):
                yield f"{path} imports the later stage {later}"
    if folders[0] == "pipelines":
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Module") for base in node.bases):
                yield f"{path} defines the nn.Module {node.name}"


def files() -> list[str]:
    """Return every Python file of the rooms, by its path below the root."""
    return [
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
    ]


@pytest.mark.parametrize("path", files())
def test_file_keeps_to_its_room(path: str) -> None:
    assert not list(breaches(path, (ROOT / path).read_text()))


@pytest.mark.parametrize(
    ("path", "source", "breach"),
    [
        ("s5/a.py", "import ray", "imports ray"),
        ("s5/a.py", "def f():\n    from mlflow.entities import Run", "imports mlflow"),
        ("s5/a.py", "if TYPE_CHECKING:\n    from pipelines import stage", "imports pipelines"),
        ("s5/deep/a.py", "from ... import clusters", None),
        ("s5/ssm/a.py", "from s5.models.blocks import Block", "imports the room s5.models"),
        ("s5/ssm/a.py", "from s5 import models", "imports the room s5.models"),
        ("s5/ssm/a.py", "from ..models import blocks", "imports the room s5.models"),
        ("s5/ssm/a.py", "from s5.video.reading import probe", None),
        ("s5/ssm/a.py", "from s5 import rng", None),
        ("s5/batch.py", "import s5.video.reading", "imports the room s5.video"),
        ("s5/__init__.py", "from s5.models.video_model import VideoModel", None),
        ("pipelines/a.py", "from clusters.submit import run", "imports clusters"),
        ("pipelines/a.py", "from ray import train", "imports ray.train"),
        ("pipelines/data/a.py", "import ray\nray.train.report({})", "imports ray.train"),
        ("pipelines/stages/a.py", "from ray.tune.integration.ray_train import TuneReportCallback", "imports ray.tune"),
        ("pipelines/tuning/tuner.py", "from ray.tune.integration.ray_train import TuneReportCallback", None),
        ("pipelines/stages/a.py", "import matplotlib.pyplot", "imports matplotlib"),
        ("pipelines/a.py", "import tyro", "imports tyro"),
        (
            "pipelines/data/a.py",
            "from pipelines.training.launcher import launch",
            "imports the room pipelines.training",
        ),
        ("pipelines/tuning/a.py", "from pipelines.stages import pretrain", "imports the room pipelines.stages"),
        ("pipelines/stages/pretrain.py", "from pipelines.stages import finetune", "later stage finetune"),
        ("pipelines/stages/pretrain.py", "from .sweep import run", "later stage sweep"),
        ("pipelines/stages/sweep.py", "from pipelines.stages import finetune, pretrain", None),
        ("pipelines/stages/index.py", "class Head(nn.Module):\n    pass", "nn.Module Head"),
        ("pipelines/stages/index.py", "class Head:\n    pass", None),
        ("clusters/utils.py", "", "named utils"),
        ("s5/a.py", "import raytracer\nfrom s5 import rng", None),
    ],
)
def test_rule_finds_what_breaks_it(path: str, source: str, breach: str | None) -> None:
    found = list(breaches(path, source))
    assert bool(found) == bool(breach), found
    assert breach is None or breach in found[0]


def test_rooms_are_listed_and_no_room_is_a_list() -> None:
    for package in PACKAGES:
        folders = {p.parent.relative_to(ROOT / package).parts[0] for p in (ROOT / package).glob("*/*.py")}
        assert folders == set(ROOMS[package]) - {""}
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(modules) <= MODULES_A_ROOM, f"{folder} has {len(modules)} modules"


def test_s5_needs_few_packages_at_import() -> None:
    known = {*sys.stdlib_module_names, *S5_NEEDS, "s5"}
    for path in files():
        if path.startswith("s5/"):
            tree = ast.parse((ROOT / path).read_text())
            top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
            roots = {name.partition(".")[0] for name in imports(top, "s5")}
            assert roots <= known, f"{path} needs {sorted(roots - known)} to be imported"


def test_s5_imports_without_the_rest() -> None:
    code = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))
try:
    import ray
except ImportError:
    pass
else:
    raise SystemExit("the block does not hold")
import s5
for module in pkgutil.walk_packages(s5.__path__, "s5."):
    importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
