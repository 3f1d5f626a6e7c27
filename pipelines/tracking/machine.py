"""What this machine does while a run lasts, as MLflow's own monitors measure it: CPUs, memory, disk, network and GPUs.

MLflow's monitor sends by itself, and ends where a server is away: here samples go through the run's queue.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipelines.tracking.send_queue import print_message
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uri import OFF

PREFIX = "system/"
"""Of the metrics' names; MLflow's pages show these apart."""


@contextmanager
def machine_logged(tracker: Tracker, every_s: float) -> Iterator[None]:
    """Log what this machine does every so many seconds and at the end; the step is the seconds since the run's start.

    Args:
        tracker: of the run.
        every_s: seconds between two samples; 0 for none.
    """
    if tracker.uri == OFF or every_s == 0:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_log, args=(tracker, every_s, ended), name="machine", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _log(tracker: Tracker, every_s: float, ended: threading.Event) -> None:
    try:
        monitors = _monitors()
    except ImportError as error:
        print_message(f"what this machine does is not logged ({error}): install psutil, or give --tracking.system-s 0")
        return
    while True:
        last = ended.wait(every_s)
        # Steps are known once the server has answered.
        if tracker.started is not None:
            tracker.log(_sample(monitors), step=int(time.time() - tracker.started))
        if last:
            return


def _monitors() -> list[Any]:
    """Return MLflow's monitors, that of GPUs where there are any."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    # Without types.
    always: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor]
    of_gpus: Any = GPUMonitor
    monitors = [monitor() for monitor in always]
    # No package to ask for GPUs, or none there.
    with suppress(ImportError, RuntimeError):
        monitors.append(of_gpus())
    # The share of CPUs in use is that since the sample before.
    _sample(monitors)
    return monitors


def _sample(monitors: list[Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        found |= {f"{PREFIX}{key}": value for key, value in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return found
