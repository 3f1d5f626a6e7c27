#!/usr/bin/env bash
# decord 0.6.0 (x86-64, Python 3.11): VP8 packets that are never shown count as frames.
#
# The program encodes 60 numbered pictures as VP8 in webm (PyAV 18.1.0), every tenth of them twice, and clears the bit
# that shows a frame (RFC 6386, section 9.1) in the first of each two: what two-pass encoders write for alternate
# reference frames. The file is valid and shows 60 frames; FFmpeg plays them at 0, 0.1, ... 5.9 s.
#
# Expected: 60 frames, each at its time.
# Seen (2026-11-29): decord counts 66 frames. Frame i is picture i, but with the time of packet i: at the time of
#   picture 40, frame 44 starts, which is picture 44. No error is raised.
#
# Exits 0 while decord behaves this way and 1 once it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check decord==0.6.0 av==18.1.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import sys
from fractions import Fraction

import av
import decord
import numpy as np

WIDTH, HEIGHT, BITS, FRAMES = 96, 64, 7, 60


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
numbers = [n for n in range(FRAMES) for _ in range(2 if n % 10 == 9 else 1)]
encoder = av.CodecContext.create("libvpx", "w")
encoder.width, encoder.height, encoder.pix_fmt, encoder.bit_rate = WIDTH, HEIGHT, "yuv420p", 2_000_000
encoder.framerate, encoder.time_base, encoder.options = 10, Fraction(1, 10), {"g": "20"}
packets = []
for place, n in enumerate(numbers):
    frame = av.VideoFrame.from_ndarray(picture(n), format="rgb24")
    frame.pts, frame.time_base = place, Fraction(1, 10)
    packets += encoder.encode(frame)
packets = [bytes(packet) for packet in packets + encoder.encode(None)]
with av.open(path, "w") as container:
    stream = container.add_stream("libvpx", rate=10)
    stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    container.start_encoding()
    for place, (n, data) in enumerate(zip(numbers, packets)):
        hidden = numbers[place + 1 : place + 2] == [n]
        packet = av.Packet(bytes([data[0] & ~0x10]) + data[1:] if hidden else data)
        packet.stream, packet.time_base = stream, Fraction(1, 1000)
        packet.pts = packet.dts = 100 * n - hidden
        packet.is_keyframe = not data[0] & 1
        container.mux(packet)

with av.open(path) as container:
    truth = [(number(f.to_ndarray(format="rgb24")), round(10 * f.time)) for f in container.decode(video=0)]
reader = decord.VideoReader(path)
starts = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
at = [int(np.searchsorted(starts, n / 10 + 0.01)) - 1 for n in range(FRAMES)]
shown = [number(reader[index].asnumpy()) for index in at]
wrong = sum(n != m for n, m in enumerate(shown))
print(f"FFmpeg: {len(truth)} frames; decord: {len(reader)}; wrong pictures at {wrong} of {FRAMES} times")
print("decord, at 0, 0.1, ... s:", *shown)
sys.exit(0 if truth == [(n, n) for n in range(FRAMES)] and len(reader) > FRAMES and wrong else 1)
PYTHON
"$folder/venv/bin/python" "$folder/program.py" "$folder/video.webm"
