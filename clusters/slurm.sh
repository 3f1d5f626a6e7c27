#!/usr/bin/env bash
# A run on whole nodes of Slurm: `sbatch clusters/slurm.sh`. Starts Ray on them, runs one stage, and ends with it.
# Five minutes before its time is up, the stage saves a checkpoint and the job is queued again; it resumes from there.
#
# EDIT 1: the nodes. One task a node: Ray starts its own processes there.
#SBATCH --job-name=s5
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# EDIT 2: a checkout on storage that all nodes share, with the .venv of `make setup`; here that of `sbatch`.
cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"

# EDIT 3: the stage and its settings; paths are on shared storage. MLflow's server runs elsewhere.
stage=(pretrain --manifest /shared/index --out /shared/runs/a --tracking.uri http://mlflow.example.com:5000
    --scale.num-workers 8 --scale.gpus-per-worker 1
    --loop.precision bf16 --loop.batch-size 256)

port=$((20000 + SLURM_JOB_ID % 10000))
head=$SLURMD_NODENAME
workers=$((SLURM_JOB_NUM_NODES - 1))
folder=/tmp/ray-$SLURM_JOB_ID
address=$(python -c 'import ray; print(ray.util.get_node_ip_address())'):$port
export RAY_ADDRESS=$address

# Other users of the network need this job's token, which is in no command line.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")
# Decode tasks, which ask for no GPU, do not see the workers' ones.
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1 RAY_USAGE_STATS_ENABLED=0

nodes=()
waiter=
trap 'kill "${nodes[@]}" $waiter 2>/dev/null || true; wait; rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

# Return once as many nodes as asked for have joined; fail once one of them ends.
wait_for() {
    python - "$1" <<'PYTHON' &
import sys
import time

import ray

asked, alive, end = int(sys.argv[1]), 0, time.monotonic() + 600
while alive < asked:
    if time.monotonic() > end:
        sys.exit(f"{alive} of {asked} nodes joined Ray within 10 minutes; the lines above may say why")
    time.sleep(1)
    try:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        alive = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:
        continue
PYTHON
    waiter=$!
    wait -n "$waiter" "${nodes[@]}"
}

# srun does not take over the job's CPUs a task by itself.
step=(srun --overlap --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0)
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="$folder")
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --block --port="$port" --dashboard-host=127.0.0.1 "${resources[@]}" &
nodes+=($!)
wait_for 1
if ((workers > 0)); then
    "${step[@]}" --nodes="$workers" --ntasks="$workers" --exclude="$head" \
        ray start --address="$address" --block "${resources[@]}" &
    nodes+=($!)
fi
wait_for "$SLURM_JOB_NUM_NODES"

python -m pipelines "${stage[@]}" &
driver=$!
trap 'kill -TERM "$driver" 2>/dev/null; stopped=1' TERM
stopped=0
status=0
wait "$driver" || status=$?
if ((stopped)); then
    wait "$driver" || status=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
