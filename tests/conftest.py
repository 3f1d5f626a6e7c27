"""What every test needs: quiet and offline libraries, one thread, a fixed seed, and on demand Ray on this machine."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

# Read when the libraries are imported, here and in the processes that tests start.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # A token of this session: neither is the user's needed nor one left behind.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI", "S5_COMMIT")

for name in FOREIGN:
    os.environ.pop(name, None)
os.environ.update(ENVIRONMENT)
# A time limit ends pytest with SIGTERM: fixtures are to be torn down then too.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses Ray as such."""
    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start each test from the same random state, in those libraries that are loaded, and at the usual priority."""
    # Opened by the superuser, the encoder libsvtav1 makes the thread a real-time one, which starves all others.
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Run Ray with 2 CPUs and its dashboard on this machine, as a stage starts it; tests share it."""
    import ray

    from pipelines.running import resources

    # Ray's sockets lie below the folder and their names may have 107 characters: pytest's folders are too deep.
    folder = tempfile.mkdtemp(prefix="s5ray")
    os.environ.update({key: os.environ.get(key, value) for key, value in resources.ENVIRONMENT.items()})
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=True,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=500_000_000,
        runtime_env={"env_vars": {key: os.environ[key] for key in resources.ENVIRONMENT}},
        _temp_dir=folder,
    )
    resources.ensure_ray()
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
