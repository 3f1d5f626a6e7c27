#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1): in AVI, MPEG-4 video with B-frames starts at frame 1, not at 0.
#
# The program writes the same 40 frames with and without B-frames to AVI, and with B-frames to mp4. AVI stores no
# presentation times: FFmpeg counts them from the packets, and reordering shifts every one by a frame. `frame.pts` is
# never None, so nothing shows it: code that takes `pts / rate` for the index is off by one on these files alone.
#
# Expected: the first frame at 0, in all three.
# Seen (2026-11-27), pts in frames, first and last:
#   avi, no B-frames: 0 39      avi, B-frames: 1 40      mp4, B-frames: 0 39
#
# Exits 0 while PyAV behaves this way and 1 once it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import sys

import av
import numpy as np


def times(path, b_frames):
    """Presentation times, in frames, of the frames of a file that holds 40 of them."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 10, b_frames
        for index in range(40):
            shown = np.full((64, 64, 3), 5 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())
    with av.open(path) as container:
        return [round(float(frame.pts * frame.time_base) * 10) for frame in container.decode(video=0)]


found = {}
for name, ending, b_frames in (("no B-frames", "avi", 0), ("B-frames", "avi", 2), ("B-frames", "mp4", 2)):
    frames = times(f"{sys.argv[1]}/{name}.{ending}", b_frames)
    found[ending, b_frames] = frames
    print(f"{ending}, {name}: {frames[0]} to {frames[-1]}, {len(frames)} frames")
right, late = list(range(40)), list(range(1, 41))
sys.exit(0 if found == {("avi", 0): right, ("avi", 2): late, ("mp4", 2): right} else 1)
PYTHON
"$folder/venv/bin/python" "$folder/program.py" "$folder"
