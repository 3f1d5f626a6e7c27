"""What `clusters/` describes is closed: tokens wanted, ports kept in, no secret in a file, no root in the image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.files import (
    FILES,
    LAUNCHERS,
    ROOT,
    compose,
    containers,
    document,
    documents,
    launcher,
    ray_starts,
    walk,
)

SECRET = re.compile(r"token|secret|passw|credential|api_?key|access_key", re.IGNORECASE)
# What a secret's name may hold: nothing, the name of a mode or file, or a variable that has to be set.
REFERENCE = re.compile(r"|token|~?/[\w./~-]+|\$\{\w+:\?[^}]*\}")


# --- closed -----------------------------------------------------------------------------------------------------------


def secrets_in_clear(tree: Any) -> list[str]:
    """Return where a document holds a value under a secret's name."""
    found = []
    for path, node in walk(tree):
        if isinstance(node, dict) and SECRET.search(str(node.get("name", ""))) and "value" in node:
            found.append((path, node["value"]))
        if path and SECRET.search(path[-1]) and isinstance(node, str):
            found.append((path, node))
    return ["/".join(path) for path, value in found if not REFERENCE.fullmatch(value)]


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".yaml")])
def test_no_secret_stands_in_a_file(name: str) -> None:
    assert [found for tree in documents(name) for found in secrets_in_clear(tree)] == []
    assert not any(tree.get("kind") == "Secret" for tree in documents(name))
    assert not re.search(r"AKIA[A-Z0-9]{16}|\b[0-9a-f]{32,}\b", FILES[name].read_text())


@pytest.mark.parametrize(
    "tree",
    [
        {"env": [{"name": "RAY_AUTH_TOKEN", "value": "abc"}]},
        {"environment": {"AWS_SECRET_ACCESS_KEY": "${KEY:-abc}"}},
        {"kind": "x", "stringData": {"password": "abc"}},
    ],
)
def test_a_secret_in_clear_is_found(tree: dict[str, Any]) -> None:
    assert len(secrets_in_clear(tree)) == 1


@pytest.mark.parametrize("name", ["cluster", "job", "mlflow"])
def test_pods_are_reached_within_the_cluster_alone(name: str) -> None:
    trees = documents(f"kuberay/{name}.yaml")
    keys = {path[-1]: node for path, node in walk(trees) if path}
    assert not {"hostPort", "hostNetwork", "enableIngress", "nodePort", "externalIPs", "loadBalancerIP"} & set(keys)
    types = {node for path, node in walk(trees) if path and path[-1] in ("serviceType", "type")}
    assert {"ClusterIP"} <= types <= {"ClusterIP", "Recreate"}
    assert {tree["metadata"]["namespace"] for tree in trees} == {"s5"}
    assert all(
        pod["securityContext"]["allowPrivilegeEscalation"] is False for pod in containers(f"kuberay/{name}.yaml")
    )


def test_the_namespace_is_closed() -> None:
    policy = document("kuberay/namespace.yaml", "NetworkPolicy")["spec"]
    assert policy["podSelector"] == {}
    assert policy["policyTypes"] == ["Ingress"]
    ((rule),) = policy["ingress"]
    assert all("podSelector" in peer and "ipBlock" not in peer for peer in rule["from"])


def test_nodes_reach_the_store_by_a_secret() -> None:
    for name in ("cluster", "job"):
        for pod in containers(f"kuberay/{name}.yaml"):
            assert pod["envFrom"] == [{"secretRef": {"name": "s5-store"}}]


def test_every_cluster_wants_its_token() -> None:
    assert document("kuberay/cluster.yaml", "RayCluster")["spec"]["authOptions"]["mode"] == "token"
    for name in ("head", "worker"):
        assert compose()[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert compose()[name]["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
    for name in LAUNCHERS:
        assert "--env=RAY_AUTH_MODE=token" in launcher(name)["docker"]["run_options"]
        assert launcher(name)["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "export RAY_AUTH_MODE=token" in FILES["slurm.sh"].read_text()
    assert "RAY_AUTH_MODE=token" in FILES["Dockerfile"].read_text()


@pytest.mark.parametrize("name", ["slurm.sh", *LAUNCHERS])
def test_the_dashboard_listens_on_loopback(name: str) -> None:
    assert [found["dashboard_host"] for found in ray_starts(name) if found["head"]] == ["127.0.0.1"]


# --- image and scripts ------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments, lines joined."""
    lines = FILES["Dockerfile"].read_text().replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line and not line.startswith("#")]


def test_image_holds_what_the_package_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {source for name, words in instructions() if name == "COPY" for source in words.split()[:-1]}
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    built_from = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"], *packages}
    assert built_from | {"constraints.txt"} == copied
    let_in = {
        line[1:].partition("/")[0] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert let_in == copied
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


def test_image_has_the_pinned_packages_and_no_root() -> None:
    found = instructions()
    assert {name for name, _ in found} <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER"}
    installs = [words for name, words in found if name == "RUN" and "pip install" in words]
    assert len(installs) == 2
    assert all("-c constraints.txt" in words for words in installs)
    assert next(words for name, words in found if name == "FROM").startswith("python:3.11")
    assert [words for name, words in found if name == "USER"] == ["ray"]
    (volume,) = compose()["mlflow"]["volumes"]
    assert f"install --directory --owner=ray {volume.partition(':')[2]}" in FILES["Dockerfile"].read_text()
    assert not any(SECRET.search(words) for name, words in found if name == "ARG")


def test_shell_is_sound() -> None:
    script = FILES["slurm.sh"]
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if (shellcheck := shutil.which("shellcheck", path=places)) is None:
        pytest.skip("shellcheck is not installed: `make setup` brings it")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
