#!/usr/bin/env bash
# MLflow 3.17.2: /health answers 200 under a host name for which every request of a client is refused.
#
# The program starts `mlflow server` as in a container or a Kubernetes service called "mlflow", and sends requests with
# the Host header that its clients there send. Names outside localhost and private addresses are refused on purpose, as
# a guard against DNS rebinding; the health check does not pass through that guard, so the service becomes "healthy" and
# training jobs get 403. `mlflow server --allowed-hosts "mlflow:5000,localhost:5000"` is the remedy: it replaces the
# default list.
#
# Expected: a readiness check that fails, or works, together with the API.
# Seen (2026-11-27):
#   Host: localhost    /health 200   /version 200   API 200
#   Host: mlflow:5000  /health 200   /version 200   API 403
#
# Exits 0 while MLflow behaves this way and 1 once it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check mlflow==3.17.2

cat > "$folder/program.py" <<'PYTHON'
import http.client
import socket
import subprocess
import sys
import time

folder = sys.argv[1]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
server = subprocess.Popen(
    [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    + ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)


def status(path, host):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": host})
    return connection.getresponse().status


try:
    for _ in range(180):
        try:
            status("/health", "localhost")
            break
        except OSError:
            time.sleep(1)
    paths = ("/health", "/version", "/api/2.0/mlflow/experiments/get?experiment_id=0")
    found = {host: [status(path, host) for path in paths] for host in ("localhost", "mlflow:5000")}
finally:
    server.terminate()
    server.wait()
for host, statuses in found.items():
    print(f"Host: {host:12} /health {statuses[0]}   /version {statuses[1]}   API {statuses[2]}")
sys.exit(0 if found == {"localhost": [200, 200, 200], "mlflow:5000": [200, 200, 403]} else 1)
PYTHON
MLFLOW_DISABLE_TELEMETRY=true "$folder/venv/bin/python" "$folder/program.py" "$folder"
