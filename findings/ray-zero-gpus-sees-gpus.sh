#!/usr/bin/env bash
# Ray 2.60.0: a task with num_gpus=0 still sees the GPUs that the driver sees.
#
# The program states one GPU (none is needed to run it) and prints CUDA_VISIBLE_DEVICES inside a task without a GPU and
# inside one with. Decode tasks beside training thus see the training GPU, and a library in them that initialises CUDA
# takes some of its memory. RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1 restores what Ray did earlier and hides the GPUs.
#
# Expected: a task that asks for no GPU sees none.
# Seen (2026-11-27), CUDA_VISIBLE_DEVICES=0 in the driver:
#   num_gpus=0: '0'    num_gpus=1: '0'    with the variable, num_gpus=0: ''    num_gpus=1: '0'
#
# Exits 0 while Ray behaves this way and 1 once it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check ray==2.60.0

cat > "$folder/program.py" <<'PYTHON'
import os

import ray


@ray.remote
def visible():
    return os.environ.get("CUDA_VISIBLE_DEVICES")


ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
without, with_one = (ray.get(visible.options(num_gpus=count).remote()) for count in (0, 1))
print(f"num_gpus=0: {without!r} num_gpus=1: {with_one!r}")
PYTHON
# A token of this run: Ray would write one to the home folder otherwise.
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token CUDA_VISIBLE_DEVICES=0
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d " \n")
export RAY_AUTH_TOKEN
default=$("$folder/venv/bin/python" "$folder/program.py" 2> "$folder/warnings" | tail -n 1)
hidden=$(RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1 "$folder/venv/bin/python" "$folder/program.py" 2>> "$folder/warnings" | tail -n 1)
echo "by default:                            $default"
echo "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1:  $hidden"
[ "$default" = "num_gpus=0: '0' num_gpus=1: '0'" ] && [ "$hidden" = "num_gpus=0: '' num_gpus=1: '0'" ]
