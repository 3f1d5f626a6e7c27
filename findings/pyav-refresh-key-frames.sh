#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1): H.264 with intra refresh has packets marked as key frames at which decoding cannot start.
#
# The program encodes 90 grey pictures with `intra-refresh=1` (mp4, no B-frames, no scene cuts), so that only the first
# is an IDR picture, and seeks to 1.6 s, frame 40. FFmpeg's index has key frames 0, 30 and 60.
#
# Expected: decoding starts at frame 30, the key frame before it, which is intra coded.
# Seen (2026-11-29): the packet of frame 30 is a key frame by `packet.is_keyframe`, but the first frame that comes out
#   is a later one, of type P, without `key_frame`. No error is raised, and `is_corrupt` is False. Code that takes the
#   first frame after a seek to be that of the key frame shows a later one.
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

path = sys.argv[1]
with av.open(path, "w") as container:
    options = {"x264-params": "intra-refresh=1:keyint=30:bframes=0:scenecut=0"}
    stream = container.add_stream("libx264", rate=25, options=options)
    stream.width = stream.height = 64
    stream.pix_fmt = "yuv420p"
    for index in range(90):
        shown = np.full((64, 64, 3), 2 * index + 20, np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
    container.mux(stream.encode())

with av.open(path) as container:
    stream = container.streams.video[0]
    keys = [round(25 * packet.pts * packet.time_base) for packet in container.demux(stream) if packet.is_keyframe]
    container.seek(round(1.6 / stream.time_base), stream=stream)
    packets = container.demux(stream)
    key = next(packets)
    first = next(frame for packet in [key, *packets] for frame in packet.decode())
    number = round(25 * first.time)
    print("key frames:", *keys)
    print(f"after the seek: packet {round(25 * key.pts * key.time_base)}, key frame: {key.is_keyframe}")
    print(f"first frame: {number}, type {'?IPB'[first.pict_type]}, key frame: {first.key_frame}")
sys.exit(0 if keys == [0, 30, 60] and key.is_keyframe and number > 30 and not first.key_frame else 1)
PYTHON
"$folder/venv/bin/python" "$folder/program.py" "$folder/video.mp4"
