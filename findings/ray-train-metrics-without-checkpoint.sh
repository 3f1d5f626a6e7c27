#!/usr/bin/env bash
# Ray Train 2.60.0 (V2, the default): metrics that are reported without a checkpoint are missing from the result.
#
# The program reports a loss three times with ray.train.report(metrics) and no checkpoint, then reads the Result.
# Nothing is logged about it. What the training function returns arrives as Result.return_value.
#
# Expected, from the docstring of Result.metrics ("The latest set of metrics reported by the training function via
# ray.train.report"): the third report, {'loss': 0.333}.
# Seen (2026-11-27):
#   metrics: None    metrics_dataframe: None    return_value: {'loss': 0.25}
#
# Exits 0 while Ray behaves this way and 1 once it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "ray[train]==2.60.0" pyarrow==25.0.1

cat > "$folder/program.py" <<'PYTHON'
import sys

import ray
import ray.train

# The base class of TorchTrainer, which needs no PyTorch.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


def train():
    for step in range(3):
        ray.train.report({"loss": 1 / (step + 1)})
    return {"loss": 0.25}


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
result = DataParallelTrainer(
    train,
    scaling_config=ray.train.ScalingConfig(num_workers=1),
    run_config=ray.train.RunConfig(name="run", storage_path=sys.argv[1]),
).fit()
print("metrics:", result.metrics)
print("metrics_dataframe:", result.metrics_dataframe)
print("return_value:", result.return_value)
as_before = result.metrics is None and result.metrics_dataframe is None and result.return_value == {"loss": 0.25}
sys.exit(0 if as_before else 1)
PYTHON
# A token of this run: Ray would write one to the home folder otherwise.
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d " \n")
export RAY_AUTH_TOKEN
"$folder/venv/bin/python" "$folder/program.py" "$folder/runs"
