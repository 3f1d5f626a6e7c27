#!/usr/bin/env bash
# FFmpeg's filter crop, in PyAV 18.1.0 (Python 3.11): with exact=1 and an odd x, colours of 10-bit 4:2:0 frames are garbage.
#
# The program crops frames of random values that it knows, 8 and 10 bits deep, at even and odd x, and compares the first
# plane of colours with the values that it wrote. With exact=0 the filter rounds x down to a multiple of two pixels; with
# exact=1 it may not, and has to start the plane of colours, which has half as many values, between two of them or at one.
#
# Expected: values that are in the frame, at most 940.
# Seen (2026-11-29):
#   8 bits, x=5, exact=1: 107 214 216 73 86, as at x=4
#   10 bits, x=5, exact=0: 289 836 843 115 181
#   10 bits, x=5, exact=1: 17409 19203 29443 46336 30464, each made of halves of two neighbours; no error, no warning
#
# Exits 0 while FFmpeg behaves this way and 1 once it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import sys
from fractions import Fraction

import av
import numpy as np
from av.filter import Graph

SIZE, CROP = 64, 32


def colours(depth, x, exact):
    """The first plane of colours of a cropped frame, and the rows that the frame has from there on."""
    frame = av.VideoFrame(SIZE, SIZE, "yuv420p" if depth == 8 else "yuv420p10le")
    kind, rng, written = (np.uint8 if depth == 8 else np.uint16), np.random.default_rng(0), []
    for plane in frame.planes:
        side = SIZE if not written else SIZE // 2
        rows = np.zeros((side, plane.line_size // kind().itemsize), kind)
        rows[:, :side] = rng.integers(64, 235 if depth == 8 else 940, (side, side))
        plane.update(rows.tobytes())
        written.append(rows[:, :side])
    frame.pts, frame.time_base = 0, Fraction(1, 25)
    graph = Graph()
    source = graph.add_buffer(width=SIZE, height=SIZE, format=frame.format, time_base=frame.time_base)
    crop = graph.add("crop", f"w={CROP}:h={CROP}:x={x}:y=0:exact={exact}")
    sink = graph.add("buffersink")
    source.link_to(crop)
    crop.link_to(sink)
    graph.configure()
    graph.push(frame)
    plane = graph.pull().planes[1]
    found = np.frombuffer(bytes(plane), kind).reshape(plane.height, -1)[:, : CROP // 2]
    return found, written[1][: CROP // 2, x // 2 : x // 2 + CROP // 2]


right = {}
for depth in (8, 10):
    for x in (4, 5):
        for exact in (0, 1):
            found, wanted = colours(depth, x, exact)
            right[depth, x, exact] = bool((found == wanted).all())
            print(f"{depth} bits, x={x}, exact={exact}:", *found[0, :5], "" if right[depth, x, exact] else "(wrong)")
wrong = [case for case, is_right in right.items() if not is_right]
sys.exit(0 if wrong == [(10, 5, 1)] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/program.py"
