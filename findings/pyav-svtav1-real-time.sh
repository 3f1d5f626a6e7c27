#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg with SVT-AV1): encoding AV1 as the superuser makes the calling thread a real-time one, for good.
#
# The program encodes one black frame with libsvtav1 and prints the scheduling policy of its own thread before it, and
# after the file is closed.
#
# Expected: SCHED_OTHER (0) before and after.
# Seen as root (2026-11-29): 0 before; SCHED_FIFO (1) with priority 99 after. Whatever that thread starts next inherits
# it, and other processes get what these leave: a Ray cluster started so took minutes for what takes seconds.
#
# Exits 0 while the encoder behaves this way and 1 once it does not; 2 where it is not run as root.
set -euo pipefail

if [ "$(id -u)" != 0 ]; then
    echo "only the superuser may have real-time threads: run this in a container as root" >&2
    exit 2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import os
import sys

import av
import numpy as np

before = os.sched_getscheduler(0)
with av.open(sys.argv[1], "w") as container:
    stream = container.add_stream("libsvtav1", rate=8)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))
    container.mux([*stream.encode(frame), *stream.encode()])
after = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
print(f"before: policy {before}; after: policy {after[0]}, priority {after[1]}")
sys.exit(0 if (before, after) == (os.SCHED_OTHER, (os.SCHED_FIFO, 99)) else 1)
PYTHON

"$folder/venv/bin/python" "$folder/program.py" "$folder/black.mp4" 2>/dev/null
