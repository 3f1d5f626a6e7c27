"""One worker in the process of the stage, or of a sweep's trial: no process, and no import, has to be waited for.

It has the monitor, the heartbeat and the watchdog of any worker. What nobody does is replace it.
"""

from __future__ import annotations

import sys
import uuid

import ray
import torch

from pipelines import storage
from pipelines.running.resources import own_device
from pipelines.training.failure_policy import during
from pipelines.training.heartbeat import WORKER_PROCESS
from pipelines.training.run_monitor import STACKS
from pipelines.training.worker import Place, WorkerSetup, run_loop
from s5.training.loop import TrainingResult
from s5.training.watchdog import Hang


def train_here(setup: WorkerSetup) -> TrainingResult:
    """Run the loop of the only worker in the calling thread.

    Raises:
        UserError: a GPU is asked for, and this process sees none.
        Exception: what the loop raises.
    """

    def on_hang(hang: Hang) -> None:
        # The process that reads what is sent to the monitor is this one, which ends.
        path = storage.join(setup.out, STACKS)
        storage.write_bytes(path, hang.stacks.encode())
        print(
            f"error: training hangs {during(hang.phase)} for {hang.seconds:.0f} s (see {path} for the stacks of its "
            "threads): run the same command again to resume",
            file=sys.stderr,
            flush=True,
        )

    group = uuid.uuid4().hex
    ray.get(setup.monitor.begin.remote(group, 1))
    WORKER_PROCESS.group = group
    threads = torch.get_num_threads()
    # As many as Ray gives the process of a worker.
    torch.set_num_threads(max(1, int(setup.scale.cpus_per_worker)))
    try:
        return run_loop(setup, Place(0, 1, torch.device(own_device(setup.scale)), lambda: False, on_hang))
    finally:
        torch.set_num_threads(threads)
        # Of a model that is gone; another stage of this process may need the memory.
        torch.cuda.empty_cache()
