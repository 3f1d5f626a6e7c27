#!/usr/bin/env bash
# Ray Train 2.60.0 (V2, the default): the CPUs of a run whose driver is killed are not always released.
#
# Ray Train has an actor, PlacementGroupCleaner, that releases the workers' CPUs once the controller is gone. The program
# trains one worker on a cluster of 2 CPUs from an actor, as a trial of Ray Tune does, kills that actor, and waits 45 s
# for 2 free CPUs: a) while the worker runs; b) the same while another, unrelated Ray runs on the machine; c) before the
# worker has started.
#
# Expected: 2 free CPUs after each.
# Seen (2026-11-27):
#   a) worker running: 2 CPUs free
#   b) worker running, another Ray on the machine: 1 CPU free. The cleaner's thread died of "ConnectionError: Found
#      multiple active Ray instances", though it runs inside a cluster
#   c) worker starting: 1 CPU free. The cleaner is told of the placement group only once all workers have started
#
# Exits 0 while Ray behaves this way and 1 once it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "ray[default,train]==2.60.0" pyarrow==25.0.1

cat > "$folder/program.py" <<'PYTHON'
import os
import subprocess
import sys
import tempfile
import time

import ray
import ray.train

# The base class of TorchTrainer, which needs no PyTorch.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

WAIT_SECONDS = 45


def start(cpus):
    folder = tempfile.mkdtemp(dir="/tmp")  # Ray's sockets need a short path
    ray.init(address="local", num_cpus=cpus, log_to_driver=False, logging_level="ERROR", _temp_dir=folder)


def work(config):
    open(config["started"], "w").close()
    time.sleep(3600)


@ray.remote(num_cpus=0)
class Trial:
    def fit(self, folder):
        DataParallelTrainer(
            work,
            train_loop_config={"started": f"{folder}/started"},
            scaling_config=ray.train.ScalingConfig(num_workers=1),
            run_config=ray.train.RunConfig(storage_path=folder),
        ).fit()


def free_cpus():
    return int(ray.available_resources().get("CPU", 0))


def freed(let_it_start):
    """CPUs that are free some time after a trial was killed."""
    start(2)
    folder, trial = tempfile.mkdtemp(), Trial.remote()
    trial.fit.remote(folder)
    while free_cpus() == 2 or (let_it_start and not os.path.exists(f"{folder}/started")):
        time.sleep(0.1)
    if let_it_start:
        time.sleep(5)
    ray.kill(trial)
    deadline = time.monotonic() + WAIT_SECONDS
    while free_cpus() < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    found = free_cpus()
    ray.shutdown()
    return found


if sys.argv[1:] == ["another"]:
    start(0)
    print("ready", flush=True)
    sys.stdin.read()
    sys.exit()
running = freed(let_it_start=True)
with subprocess.Popen([sys.executable, __file__, "another"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as another:
    another.stdout.readline()
    beside = freed(let_it_start=True)
    another.stdin.close()
starting = freed(let_it_start=False)
print(f"worker running: {running} CPUs free")
print(f"worker running, another Ray on the machine: {beside} CPUs free")
print(f"worker starting: {starting} CPUs free")
sys.exit(0 if (running, beside, starting) == (2, 1, 1) else 1)
PYTHON
# A token of this run: Ray would write one to the home folder otherwise.
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d " \n")
export RAY_AUTH_TOKEN
"$folder/venv/bin/python" "$folder/program.py"
