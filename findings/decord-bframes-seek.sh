#!/usr/bin/env bash
# decord 0.6.0 (x86-64, Python 3.11): after a seek, MPEG-4 video with B-frames gives other pictures for the same index.
#
# The program encodes 40 numbered pictures as MPEG-4 Part 2 with B-frames in mp4 (PyAV 18.1.0), then reads every index
# twice: in order from one reader, and alone from a fresh reader, as a loader of random clips does. No error is raised.
#
# Expected: the same picture both times.
# Seen (2026-11-27):
#   in order: 0 1 2 ... 39, all right
#   alone:    0 1 ... 9 12 13 14 15 14 15 16 17 18 21 ... 39 35 36 : 15 of 40 indices give another picture
#
# Exits 0 while decord behaves this way and 1 once it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check decord==0.6.0 av==18.1.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import sys

import av
import decord
import numpy as np

WIDTH, HEIGHT, BITS, FRAMES = 96, 64, 7, 40


def picture(number):
    """A picture whose vertical bars are the bits of its number."""
    shown = np.full((HEIGHT, WIDTH, 3), 16, np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            shown[:, 12 * bit : 12 * bit + 12] = 235
    return shown


def number(shown):
    """The number that a decoded picture shows."""
    return sum(int(shown[:, 12 * bit + 3 : 12 * bit + 9].mean() > 128) << bit for bit in range(BITS))


path = sys.argv[1]
with av.open(path, "w") as container:
    stream = container.add_stream("mpeg4", rate=10)
    stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 2_000_000
    stream.codec_context.gop_size, stream.codec_context.max_b_frames = 10, 2
    for index in range(FRAMES):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index), format="rgb24")))
    container.mux(stream.encode())

with av.open(path) as container:
    truth = [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
reader = decord.VideoReader(path)
in_order = [number(reader[index].asnumpy()) for index in range(len(reader))]
alone = [number(decord.VideoReader(path)[index].asnumpy()) for index in range(len(reader))]
wrong = sum(a != b for a, b in zip(alone, truth))
print("FFmpeg, from the start:", *truth)
print("decord, in order:      ", *in_order)
print("decord, each alone:    ", *alone)
print(f"{wrong} of {FRAMES} indices give another picture when read alone")
sys.exit(0 if truth == in_order == list(range(FRAMES)) and wrong else 1)
PYTHON
"$folder/venv/bin/python" "$folder/program.py" "$folder/video.mp4"
