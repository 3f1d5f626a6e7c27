"""What `clusters/` describes is valid, and its parts agree with each other and with the code.

The schemas of KubeRay and of compose are no part of this repository. With S5_SCHEMAS set to a folder that holds
`ray.io_rayclusters.yaml` and `ray.io_rayjobs.yaml` of KubeRay and `compose-spec.json`, files are checked against them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header
from ray.autoscaler._private.util import validate_config

from clusters import submit
from pipelines.command_line import parse
from pipelines.config import PretrainConfig, ScaleConfig
from pipelines.config.presets import preset
from pipelines.running import resources
from tests.clusters.files import (
    FILES,
    LAUNCHERS,
    ROOT,
    compose,
    containers,
    document,
    documents,
    launcher,
    mlflow_parameters,
    ray_starts,
    slurm_stage,
)

PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
# Measured for a GPU at the paper's clip sizes: docs/benchmarks.md, "Decode cores for one H100".
DECODE_CORES = 6.3


# --- schemas ----------------------------------------------------------------------------------------------------------


def schema_file(name: str) -> Path:
    path = Path(os.environ.get("S5_SCHEMAS", "")) / name
    if not path.is_file():
        pytest.skip(f"S5_SCHEMAS names no folder with {name}")
    return path


def closed(schema: Any) -> Any:
    """Return a definition's schema that also refuses unknown keys, which Kubernetes drops without a word."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    return made


def definition(name: str) -> dict[str, Any]:
    versions = yaml.load(schema_file(name).read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    return dict(closed(schema))


def errors(schema: dict[str, Any], value: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]


@pytest.mark.parametrize(("file", "crd"), [("cluster", "rayclusters"), ("job", "rayjobs")])
def test_kuberay_knows_every_key(file: str, crd: str) -> None:
    schema, manifest = definition(f"ray.io_{crd}.yaml"), documents(f"kuberay/{file}.yaml")[0]
    schema["properties"]["metadata"] = {"type": "object"}
    assert errors(schema, manifest) == []
    manifest["spec"]["rayVersoin"] = "2.60.0"
    assert len(errors(schema, manifest)) == 1


def test_kubernetes_knows_every_key_of_mlflows_pod() -> None:
    spec = definition("ray.io_rayclusters.yaml")["properties"]["spec"]["properties"]
    pod = spec["headGroupSpec"]["properties"]["template"]["properties"]["spec"]
    manifest = document("kuberay/mlflow.yaml", "Deployment")["spec"]["template"]["spec"]
    assert errors(pod, manifest) == []
    manifest["containers"][0]["readinessProb"] = {}
    assert len(errors(pod, manifest)) == 1


def test_compose_knows_every_key() -> None:
    schema, file = json.loads(schema_file("compose-spec.json").read_text()), documents("compose.yaml")[0]
    assert errors(schema, file) == []
    file["services"]["head"]["imge"] = "s5"
    assert len(errors(schema, file)) == 1


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_the_launchers_file(name: str) -> None:
    config = launcher(name)
    validate_config(config)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert sum(node["max_workers"] for node in types.values()) == config["max_workers"]
    needed = {"aws": {"region"}, "gcp": {"region", "availability_zone", "project_id"}}[config["provider"]["type"]]
    assert all(config["provider"].get(key) for key in needed)


# --- parts that have to agree -----------------------------------------------------------------------------------------


def test_every_file_is_tested_here() -> None:
    kuberay = {f"kuberay/{name}.yaml" for name in ("cluster", "job", "mlflow", "namespace")}
    assert set(FILES) == {"Dockerfile", "compose.yaml", "grafana.json", "python.sh", "slurm.sh", *LAUNCHERS, *kuberay}


@pytest.mark.parametrize("name", FILES)
def test_at_most_three_places_are_marked_for_editing(name: str) -> None:
    marks = [int(number) for number in re.findall(r"# EDIT (\d)", FILES[name].read_text())]
    assert sorted(marks) == list(range(1, len(marks) + 1))
    assert len(marks) <= 3


@pytest.mark.parametrize("name", FILES)
def test_versions_are_the_pinned_ones(name: str) -> None:
    text = FILES[name].read_text()
    assert set(re.findall(r"\bs5:([\d.]+\d)", text)) <= {PINNED["ray"]}
    assert set(re.findall(r'rayVersion: "(.*)"', text)) <= {PINNED["ray"]}


def test_a_job_has_the_cluster_that_stays() -> None:
    job, cluster = document("kuberay/job.yaml", "RayJob"), document("kuberay/cluster.yaml", "RayCluster")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert cluster["spec"]["enableInTreeAutoscaling"]
    assert job["spec"]["shutdownAfterJobFinishes"]


def job_config() -> PretrainConfig:
    words = shlex.split(document("kuberay/job.yaml", "RayJob")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "pipelines"]
    _, config = parse(words[3:])
    assert isinstance(config, PretrainConfig)
    return config


@pytest.mark.parametrize("words", [None, slurm_stage()], ids=["kuberay", "slurm"])
def test_stages_in_files_are_fit_for_a_cluster(words: list[str] | None) -> None:
    config = job_config() if words is None else parse(words)[1]
    submit.check_paths(config)
    submit.check_tracking(config)


def pools(name: str, edge: str) -> list[dict[str, float]]:
    """Return the nodes of the smallest (`min`) or largest (`max`) cluster that a file describes."""
    if name == "kuberay":
        found = []
        for group in document("kuberay/cluster.yaml", "RayCluster")["spec"]["workerGroupSpecs"]:
            (container,) = group["template"]["spec"]["containers"]
            limits = container["resources"]["limits"]
            node = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
            found += [node] * group[f"{edge}Replicas"]
        return found
    if name == "slurm.sh":
        asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", FILES[name].read_text(), re.MULTILINE))
        return [{"CPU": float(asked["cpus-per-task"]), "GPU": float(asked["gpus-per-node"])}] * int(asked["nodes"])
    types = launcher(name)["available_node_types"].values()
    return [node["resources"] for node in types for _ in range(node[f"{edge}_workers"])]


@pytest.mark.parametrize("name", ["kuberay", "slurm.sh", *LAUNCHERS])
@pytest.mark.parametrize("edge", ["min", "max"])
def test_workers_and_their_decoding_fit(name: str, edge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(slurm_stage())[1] if name == "slurm.sh" else job_config()
    assert isinstance(config, PretrainConfig)
    workers = (edge == "min" and config.scale.min_workers) or config.scale.num_workers
    scale = ScaleConfig(num_workers=workers, gpus_per_worker=config.scale.gpus_per_worker)
    monkeypatch.setattr(resources, "nodes", lambda: pools(name, edge))
    assert resources.decode_tasks(scale, config.data) >= DECODE_CORES * workers


def test_quickstart_fits_the_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = compose()["worker"]
    cpus = next(found["num_cpus"] for found in ray_starts("compose.yaml") if not found["head"])
    monkeypatch.setattr(resources, "nodes", lambda: [{"CPU": cpus}] * worker["deploy"]["replicas"])
    config = preset("quickstart").pretrain
    assert resources.decode_tasks(config.scale, config.data) >= config.scale.num_workers


@pytest.mark.parametrize("name", ["compose.yaml", *LAUNCHERS])
def test_workers_join_the_head(name: str) -> None:
    head, worker = ray_starts(name)
    assert head["head"]
    assert not worker["head"]
    assert worker["address"].rpartition(":")[2] == str(head["port"])


def test_docs_name_what_the_files_make() -> None:
    text = (ROOT / "docs/cluster.md").read_text()
    cluster, job = document("kuberay/cluster.yaml", "RayCluster"), document("kuberay/job.yaml", "RayJob")
    name = cluster["metadata"]["name"]
    # KubeRay names the service of the head and the secret of the token after the cluster.
    for made in (f"svc/{name}-head-svc ", f"get secret {name} ", f"job/{job['metadata']['name']}\n"):
        assert made in text
    assert set(re.findall(r"--namespace (\S+)", text)) == {cluster["metadata"]["namespace"]}
    assert f"registry.example.com/s5:{PINNED['ray']} ." in text


# --- MLflow -----------------------------------------------------------------------------------------------------------


def tracking_uris() -> dict[str, set[str]]:
    """Return by file the tracking URIs that its clients are given."""
    pods = [
        entry
        for name in ("cluster", "job")
        for pod in containers(f"kuberay/{name}.yaml")
        for entry in pod.get("env", ())
    ]
    services = [service["environment"] for name, service in compose().items() if name in ("head", "worker")]
    return {
        "kuberay": {entry["value"] for entry in pods if entry["name"] == "MLFLOW_TRACKING_URI"},
        "compose": {environment["MLFLOW_TRACKING_URI"] for environment in services},
    }


@pytest.mark.parametrize("name", ["kuberay", "compose"])
def test_mlflow_answers_under_the_name_that_clients_use(name: str) -> None:
    parameters = mlflow_parameters()[name]
    allowed = parameters["allowed_hosts"].split(",")
    (uri,) = tracking_uris()[name]
    host = uri.removeprefix("http://")
    assert host.rpartition(":")[2] == str(parameters["port"])
    # A given list replaces MLflow's own, which has localhost.
    for asked in (host, f"localhost:{parameters['port']}", f"127.0.0.1:{parameters['port']}"):
        assert is_allowed_host_header(allowed, asked)
    assert not is_allowed_host_header(allowed, "elsewhere.example.com:5000")
    assert parameters["backend_store_uri"].startswith("sqlite:////mlflow/")
    assert parameters["artifacts_destination"].startswith("/mlflow/")


def test_mlflows_service_leads_to_its_server() -> None:
    service, (pod,) = document("kuberay/mlflow.yaml", "Service"), containers("kuberay/mlflow.yaml")
    template = document("kuberay/mlflow.yaml", "Deployment")["spec"]["template"]
    (port,) = service["spec"]["ports"]
    (open_port,) = pod["ports"]
    (uri,) = tracking_uris()["kuberay"]
    assert f"http://{service['metadata']['name']}:{port['port']}" == uri
    assert port["targetPort"] == open_port["name"]
    assert open_port["containerPort"] == mlflow_parameters()["kuberay"]["port"]
    assert service["spec"]["selector"] == template["metadata"]["labels"]
    assert pod["readinessProbe"]["httpGet"]["httpHeaders"] == [{"name": "Host", "value": uri.removeprefix("http://")}]
    assert template["spec"]["enableServiceLinks"] is False


def test_compose_publishes_what_its_services_listen_on() -> None:
    services = compose()
    head = next(found for found in ray_starts("compose.yaml") if found["head"])
    listening = {"head": head["dashboard_port"], "mlflow": mlflow_parameters()["compose"]["port"], "store": 8333}
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {name: [f"127.0.0.1:{port}:{port}"] for name, port in listening.items()}
    assert services["head"]["environment"]["AWS_ENDPOINT_URL"] == "http://store:8333"
