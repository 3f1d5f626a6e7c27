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

from pipelines.config import DecodeConfig, ScaleConfig, UserError

# Ray Train moves each worker into a folder of its own, where relative paths end; Ray Data's bars drown progress lines.
ENVIRONMENT = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}


def ensure_ray() -> None:
    """Join the cluster at $RAY_ADDRESS (a job's is set by Ray), or start Ray on this machine; once per process.

    Raises:
        UserError: there is no cluster at that address.
    """
    if ray.is_initialized():
        return
    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    address = os.environ.get("RAY_ADDRESS") or "local"
    runtime_env: dict[str, Any] = {"env_vars": {key: os.environ[key] for key in ENVIRONMENT}}
    if address != "local" and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        root = Path(__file__).parent.parent
        runtime_env["py_modules"] = [str(root / "s5"), str(root / "pipelines")]
    try:
        ray.init(
            address=address,
            log_to_driver=os.environ.get("RAY_LOG_TO_DRIVER", "0").lower() in ("1", "true"),
            logging_level=logging.ERROR,
            runtime_env=runtime_env,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if address == "local":
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"RAY_ADDRESS is {address!r}: the cluster there cannot be joined ({reason})") from None
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler ends the process with status 15, which reads as a failure.
        signal.signal(signal.SIGTERM, _terminate)


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


def free_cpus(scale: ScaleConfig) -> float:
    """Return the CPUs of the cluster that its training workers leave free.

    Raises:
        UserError: the cluster lacks the CPUs or GPUs for the workers.
    """
    total = resources()
    for kind, each in (("CPU", scale.cpus_per_worker), ("GPU", scale.gpus_per_worker)):
        need, have = each * scale.num_workers, total.get(kind, 0.0)
        if need > have:
            raise UserError(
                f"scale.num_workers is {scale.num_workers}: {need:g} {kind}s are needed and the cluster has {have:g}; "
                f"lower scale.num_workers or scale.{kind.lower()}s_per_worker, or add nodes"
            )
    return total["CPU"] - scale.cpus_per_worker * scale.num_workers


def decode_tasks(scale: ScaleConfig, data: DecodeConfig) -> int:
    """Return how many decode tasks may run at once beside the training workers, at least one for each worker.

    Raises:
        UserError: training workers and decoding do not fit the cluster together (they would wait for each other).
    """
    free = free_cpus(scale)
    fit = int(free / data.cpus_per_decode + 1e-6)
    if fit < scale.num_workers:
        raise UserError(
            f"data.cpus_per_decode is {data.cpus_per_decode:g}: {scale.num_workers} workers leave {free:g} CPUs for "
            f"decoding, which is fewer than one decode task each; lower it or scale.cpus_per_worker"
        )
    return min(fit, data.decode_tasks) if data.decode_tasks else fit


def check_cluster(scale: ScaleConfig, data: DecodeConfig | None) -> int:
    """Start or join Ray and return how many decode tasks fit beside the workers; call it before anything is written.

    Args:
        scale: the workers.
        data: decoding; None where nothing is decoded, which gives 0.

    Raises:
        UserError: workers and decoding do not fit the cluster.
    """
    ensure_ray()
    if data is None:
        free_cpus(scale)
        return 0
    return decode_tasks(scale, data)
