"""Start or join Ray, and say before any work whether a stage fits what the cluster has."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import ray
import ray.exceptions

from pipelines.config import DecodeConfig, ScaleConfig
from pipelines.errors import UserError

# Ray Train moves each worker into a folder of its own, where relative paths end; Ray Data's bars drown progress lines.
ENVIRONMENT = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}

# A local Ray's own limit is its number of CPUs: it then starts processes one after another, and warns the user at
# each multiple of it, which a run with a monitor, a controller and decode tasks always reaches.
STARTUP_CONCURRENCY = ("RAY_worker_maximum_startup_concurrency", "64")

UV_HOOK = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
"""Whether Ray starts its workers by `uv run` too where the driver was; `pipelines.__main__` turns it off."""

# CPUs that each worker leaves to decoding where Ray Train, which knows of no decoding, may add workers to all others.
RESERVED_CPUS = 0.001


def ensure_ray() -> None:
    """Join the cluster at $RAY_ADDRESS (a job's is set by Ray), or start Ray on this machine; once per process.

    Raises:
        UserError: there is no cluster at that address, or Ray cannot start where this process runs.
    """
    if ray.is_initialized():
        return
    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    os.environ.setdefault(*STARTUP_CONCURRENCY)
    address = os.environ.get("RAY_ADDRESS") or "local"
    # A local Ray's processes inherit the environment, and one without a runtime environment has workers ready.
    runtime_env: dict[str, Any] = {}
    if address != "local":
        runtime_env["env_vars"] = {key: os.environ[key] for key in ENVIRONMENT}
    if address != "local" and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        root = Path(__file__).parents[2]
        runtime_env["py_modules"] = [str(root / "s5"), str(root / "pipelines")]
    try:
        ray.init(
            address=address,
            log_to_driver=os.environ.get("RAY_LOG_TO_DRIVER", "0").lower() in ("1", "true"),
            logging_level=logging.ERROR,
            runtime_env=runtime_env,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        _explain_surroundings(error)
        if address == "local":
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"RAY_ADDRESS is {address!r}: the cluster there cannot be joined ({reason})") from None
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler ends the process with status 15, which reads as a failure.
        signal.signal(signal.SIGTERM, _terminate)


def _explain_surroundings(error: Exception) -> None:
    """Raise `UserError` where Ray refuses the folder of temporary files, or how `uv run` was called."""
    text = str(error)
    if "AF_UNIX" in text:
        # Ray's own order.
        name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "TMPDIR")
        folder = os.environ.get(name, "")
        raise UserError(
            f"{name} is {folder!r}, {len(os.fsencode(folder))} bytes long: Ray's sockets lie below it, and the system "
            "allows the name of a socket 107 bytes in all; set RAY_TMPDIR to a short folder, such as /tmp"
        ) from None
    if isinstance(error, RuntimeError) and "working_dir" in text and "uv run" in text:
        reason = text.partition(". ")[0]
        raise UserError(
            f"this runs below `uv run`, with which Ray cannot start its workers from this folder ({reason}): set "
            f"{UV_HOOK}=0, or run the environment's own Python, .venv/bin/python"
        ) from None


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def resources() -> dict[str, float]:
    """Return what the cluster has in all, such as `CPU` and `GPU`."""
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def node_cpus() -> list[float]:
    """Return the CPUs of each node."""
    return [float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def own_node() -> str:
    """Return the resource that only this process' node has: a task that asks for some of it runs here."""
    return f"node:{ray.util.get_node_ip_address()}"  # type: ignore[no-untyped-call]


def nodes() -> list[dict[str, float]]:
    """Return what each node has, such as `CPU` and `GPU`."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def place_workers(has: list[dict[str, float]], scale: ScaleConfig, workers: int) -> list[float] | None:
    """Place workers, filling one node after the other, and return the free CPUs of each node; None if they do not fit.

    Args:
        has: resources of each node.
        scale: what each worker takes.
        workers: their number.
    """
    free = []
    for node in sorted(has, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), reverse=True):
        room = min(int(node.get(kind, 0) / each + 1e-6) for kind, each in _needs(scale).items())
        placed = min(room, workers)
        workers -= placed
        free.append(node.get("CPU", 0) - placed * scale.cpus_per_worker)
    return None if workers else free


def _tasks_that_fit(free: list[float], each: float) -> int:
    """Return how many tasks, each on one node, the free CPUs are enough for."""
    return sum(int(cpus / each + 1e-6) for cpus in free)


def _free_cpus(scale: ScaleConfig, workers: int) -> list[float]:
    """Return the free CPUs of each node once the workers are placed; raise `UserError` where they do not fit."""
    has = nodes()
    free = place_workers(has, scale, workers)
    if free is not None:
        return free
    name = "min_workers" if scale.min_workers else "num_workers"
    for kind, each in (("CPU", scale.cpus_per_worker), ("GPU", scale.gpus_per_worker)):
        have = [node.get(kind, 0.0) for node in has]
        setting = f"scale.{kind.lower()}s_per_worker"
        if each > max(have):
            raise UserError(
                f"{setting} is {each:g}: no node of the cluster has more than {max(have):g} {kind}s, and a worker has "
                f"to fit on one; lower it, or add larger nodes"
            )
        if each * workers > sum(have):
            raise UserError(
                f"scale.{name} is {workers}: {each * workers:g} {kind}s are needed and the cluster has {sum(have):g}; "
                f"lower scale.{name} or {setting}, or add nodes"
            )
    what = " and ".join(f"{each:g} {kind}s" for kind, each in _needs(scale).items())
    raise UserError(
        f"scale.{name} is {workers}: a worker needs {what} on one node, and the cluster's {len(has)} nodes have room "
        f"for fewer; lower scale.{name} or what a worker needs, or add nodes"
    )


def _needs(scale: ScaleConfig) -> dict[str, float]:
    needs = {"CPU": scale.cpus_per_worker, "GPU": scale.gpus_per_worker}
    return {kind: each for kind, each in needs.items() if each}


def decode_tasks(scale: ScaleConfig, data: DecodeConfig) -> int:
    """Return how many decode tasks may run at once beside the training workers, at least one for each worker.

    Where training may start with fewer workers (`scale.min_workers`), these are the workers that count.

    Raises:
        UserError: training workers and decoding do not fit the cluster together (they would wait for each other).
    """
    workers = scale.min_workers or scale.world_size
    free = _free_cpus(scale, workers)
    fit = _tasks_that_fit(free, data.cpus_per_decode)
    if fit < workers:
        raise UserError(
            f"data.cpus_per_decode is {data.cpus_per_decode:g}: {workers} workers leave {sum(free):g} CPUs for "
            f"decoding, {max(free):g} of them on one node, which is fewer than one decode task each; lower it or "
            f"scale.cpus_per_worker"
        )
    return min(fit, data.decode_tasks) if data.decode_tasks else fit


def tasks_alone(data: DecodeConfig) -> int:
    """Return how many decode tasks may run at once where there are no workers.

    Raises:
        UserError: none fits a node.
    """
    free = node_cpus()
    fit = _tasks_that_fit(free, data.cpus_per_decode)
    if not fit:
        raise UserError(
            f"data.cpus_per_decode is {data.cpus_per_decode:g}: no node of the cluster has more than {max(free):g} "
            "CPUs, and a task has to fit on one; lower it, or add larger nodes"
        )
    return min(fit, data.decode_tasks) if data.decode_tasks else fit


def decode_tasks_per_worker(scale: ScaleConfig, data: DecodeConfig, workers: int) -> tuple[int, float]:
    """Return the number of decode tasks of each running worker, and the CPUs that a task reserves.

    Where added workers have taken the CPUs that decoding needs, a task reserves only the `RESERVED_CPUS` that each
    worker leaves, so that it can still run.
    """
    free = place_workers(nodes(), scale, workers) or []
    fit = _tasks_that_fit(free, data.cpus_per_decode)
    if fit < workers:
        return 1, RESERVED_CPUS
    return (min(fit, data.decode_tasks) if data.decode_tasks else fit) // workers or 1, data.cpus_per_decode


def own_device(scale: ScaleConfig) -> str:
    """Return the device, `cuda` or `cpu`, of a worker in this process.

    Raises:
        UserError: it is to have a GPU, and this process sees none.
    """
    if not scale.gpus_per_worker:
        return "cpu"
    # Only where it is needed: it takes seconds.
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"scale.gpus_per_worker is {scale.gpus_per_worker:g} and scale.num_workers 0: this process sees no GPU; "
            "give scale.num_workers 1 for a worker where there is one, or scale.gpus_per_worker 0"
        )
    return "cuda"


def runs_that_fit(scale: ScaleConfig, data: DecodeConfig | None, most: int, here: bool = False) -> tuple[int, int]:
    """Return how many runs with such workers fit beside each other, and how many decode tasks each of them has then.

    Args:
        scale: the workers of a run.
        data: decoding, of which each worker needs a task; None where nothing is decoded.
        most: runs that are wanted.
        here: workers have to be on this process' node; decode tasks may be anywhere.
    """
    workers = scale.min_workers or scale.world_size
    all_nodes, own = nodes(), own_node()
    places = [node for node in all_nodes if own in node] if here else all_nodes
    others = [node.get("CPU", 0.0) for node in all_nodes if own not in node] if here else []
    runs, tasks = 0, 0
    for count in range(1, most + 1):
        free = place_workers(places, scale, count * workers)
        if free is None:
            break
        fit = count * workers if data is None else _tasks_that_fit(free + others, data.cpus_per_decode)
        if fit < count * workers:
            break
        runs, tasks = count, fit // count
    return runs, tasks


def check_cluster(scale: ScaleConfig | None, data: DecodeConfig | None) -> int:
    """Start or join Ray and return how many decode tasks fit beside the workers; call it before anything is written.

    Args:
        scale: the workers; None where there are none, but tasks alone.
        data: decoding; None where nothing is decoded, which gives 0.

    Raises:
        UserError: workers and decoding do not fit the cluster.
    """
    ensure_ray()
    if scale is not None and scale.num_workers == 0:
        own_device(scale)
    if data is None:
        if scale is not None:
            _free_cpus(scale, scale.min_workers or scale.world_size)
        return 0
    return tasks_alone(data) if scale is None else decode_tasks(scale, data)
