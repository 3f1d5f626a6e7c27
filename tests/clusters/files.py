"""The files of `clusters/` as their own tools read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mlflow.cli import server as mlflow_server
from ray.autoscaler._private.util import prepare_config
from ray.scripts.scripts import start as ray_start

ROOT = Path(__file__).parent.parent.parent
FILES = {
    path.relative_to(ROOT / "clusters").as_posix(): path
    for path in sorted((ROOT / "clusters").rglob("*"))
    if path.is_file() and path.suffix not in (".py", ".pyc", ".typed") and path.name != ".env"
}
LAUNCHERS = ("aws.yaml", "gcp.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return [dict(document) for document in yaml.safe_load_all(FILES[name].read_text())]


def document(name: str, kind: str) -> dict[str, Any]:
    return next(found for found in documents(name) if found.get("kind") == kind)


def walk(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every node of a document with the keys that lead to it."""
    yield path, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from walk(child, (*path, str(key)))


def containers(name: str) -> list[dict[str, Any]]:
    """Return all containers of a KubeRay or Kubernetes file."""
    lists = [node for path, node in walk(documents(name)) if path and path[-1] == "containers"]
    return [container for found in lists for container in found]


def compose() -> dict[str, Any]:
    return documents("compose.yaml")[0]["services"]  # type: ignore[no-any-return]


def launcher(name: str) -> dict[str, Any]:
    return dict(prepare_config(documents(name)[0]))


def shell_words(text: str) -> list[str]:
    """Return the words of a shell command with lines joined."""
    return shlex.split(text.replace("\\\n", " "))


def slurm_stage() -> list[str]:
    found = re.search(r"^stage=\((.*?)\)$", FILES["slurm.sh"].read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return shlex.split(found[1])


def ray_starts(name: str) -> list[dict[str, Any]]:
    """Return the parameters of each `ray start` in a file, as Ray's own command line reads them."""
    if name == "compose.yaml":
        texts = [service["command"] for service in compose().values() if service["command"].startswith("ray start")]
    elif name == "slurm.sh":
        script = FILES[name].read_text().replace("\\\n", " ").replace('"${resources[@]}" &', "")
        script = script.replace("$port", "6379")
        texts = [line[line.index("ray start") :] for line in script.splitlines() if "ray start" in line]
    else:
        config = launcher(name)
        texts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
        texts = [text for text in texts if text.startswith("ray start")]
    assert texts
    return [ray_start.make_context("start", shell_words(text)[2:]).params for text in texts]


def mlflow_parameters() -> dict[str, dict[str, Any]]:
    """Return by file what its MLflow server is started with, as MLflow's own command line reads it."""
    (pod,) = containers("kuberay/mlflow.yaml")
    commands = {"kuberay": pod["command"], "compose": shlex.split(compose()["mlflow"]["command"])}
    return {name: mlflow_server.make_context("server", words[2:]).params for name, words in commands.items()}
