#!/usr/bin/env bash
# MLflow 3.17.2, database backend (the default): an infinite metric comes back as a finite number.
#
# The program logs 1, inf, -inf and NaN as a loss and reads the history back. A loss that overflowed can no longer be
# told from one that is large: `math.isfinite` holds for it. NaN survives.
#
# Expected: the four values that were logged, or an error.
# Seen (2026-11-27): [1.0, 1.7976931348623157e+308, -1.7976931348623157e+308, nan]
#
# Exits 0 while MLflow behaves this way and 1 once it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check mlflow==3.17.2

cat > "$folder/program.py" <<'PYTHON'
import math
import sys

from mlflow import MlflowClient

client = MlflowClient(f"sqlite:///{sys.argv[1]}/mlflow.db")
experiment = client.create_experiment("losses", artifact_location=f"{sys.argv[1]}/artifacts")
run = client.create_run(experiment).info.run_id
for step, value in enumerate([1.0, math.inf, -math.inf, math.nan]):
    client.log_metric(run, "loss", value, step=step)
found = [metric.value for metric in sorted(client.get_metric_history(run, "loss"), key=lambda metric: metric.step)]
print("logged: [1.0, inf, -inf, nan]")
print("read:  ", found)
largest = sys.float_info.max
sys.exit(0 if found[:3] == [1.0, largest, -largest] and math.isnan(found[3]) else 1)
PYTHON
MLFLOW_DISABLE_TELEMETRY=true "$folder/venv/bin/python" "$folder/program.py" "$folder"
