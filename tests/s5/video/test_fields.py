"""H.264 whose pictures are coded as two fields, as television is: in one packet, or in one each."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from s5.video.reading import probe, read_clips
from tests.s5.odd_videos import FPS
from tests.s5.videos import blocks, code

FRAMES, GROUP, SIDE = 90, 30, 64


class Bits:
    """Bits of an H.264 unit (ISO 14496-10, 7.3 and 9.1); encoders that write fields are no part of PyAV."""

    def __init__(self) -> None:
        self._bits = ""

    def fixed(self, *fields: tuple[int, int]) -> Bits:
        """Append numbers, each with its number of bits: u(n)."""
        self._bits += "".join(format(value, f"0{count}b") for count, value in fields)
        return self

    def coded(self, *values: int) -> Bits:
        """Append Exp-Golomb codes: ue(v)."""
        for value in values:
            text = format(value + 1, "b")
            self._bits += "0" * (len(text) - 1) + text
        return self

    def samples(self, values: list[int]) -> Bits:
        """Append aligned samples."""
        self._bits += "0" * (-len(self._bits) % 8)
        return self.fixed(*((8, value) for value in values))

    def unit(self, head: int) -> bytes:
        """Return the unit with a start code."""
        bits = self._bits + "1"
        bits += "0" * (-len(bits) % 8)
        out = bytearray()
        for value in int(bits, 2).to_bytes(len(bits) // 8, "big"):
            if value <= 3 and out.endswith(b"\0\0"):
                out.append(3)
            out.append(value)
        return b"\0\0\0\1" + bytes([head]) + bytes(out)


def _parameters() -> bytes:
    """Main profile, 4 x 2 pairs of macroblocks, fields or frames, and a rate of 50 fields a second."""
    flags = [(1, 0), (1, 0), (1, 1), (1, 0), (1, 1), (1, 0), (1, 0), (1, 0), (1, 0), (1, 1), (32, 1), (32, 2 * FPS)]
    sequence = Bits().fixed((8, 77), (8, 0), (8, 30)).coded(0, 4, 0, 4, 1).fixed((1, 0)).coded(SIDE // 16 - 1, 1)
    sequence.fixed(*flags, (1, 1), (1, 0), (1, 0), (1, 0), (1, 1), (1, 1)).coded(0, 0, 10, 10, 0, 1)
    picture = Bits().coded(0, 0).fixed((1, 0), (1, 0)).coded(0, 0, 0).fixed((1, 0), (2, 0)).coded(0, 0, 0)
    return sequence.unit(0x67) + picture.fixed((1, 1), (1, 0), (1, 0)).unit(0x68)


def _field(luma_HW: np.ndarray, place: int, bottom: int) -> bytes:
    """Return a field at a place of its group of pictures, its samples as they are (I_PCM)."""
    key = place == 0
    bits = Bits().coded(0, 7 if key else 5, 0).fixed((8, place), (1, 1), (1, bottom))
    entry = key and not bottom
    bits = (bits.coded(0) if entry else bits).fixed((8, 2 * place + bottom))
    bits = bits.fixed(*([] if key else [(1, 0), (1, 0)]), *([(1, 0), (1, 0)] if entry else [(1, 0)])).coded(0, 1)
    rows = luma_HW[bottom::2]
    for top in range(0, SIDE // 2, 16):
        for left in range(0, SIDE, 16):
            bits = bits.coded(25) if key else bits.coded(0, 30)
            bits.samples([*rows[top : top + 16, left : left + 16].ravel().tolist(), *[128] * 128])
    return bits.unit(0x65 if entry else 0x61)


def write_fields(path: Path, apart: bool) -> str:
    """Write coded frames as fields, two in a packet, or one in each (`apart`)."""
    fields = []
    for index in range(FRAMES):
        luma_HW, place = np.where(blocks(index, (SIDE, SIDE))[..., 0] > 0, 220, 16), index % GROUP
        top = (_parameters() if place == 0 else b"") + _field(luma_HW, place, 0)
        fields += [top, _field(luma_HW, place, 1)]
    step = 1 if apart else 2
    stream_of_fields = io.BytesIO(b"".join(fields))
    with av.open(stream_of_fields, format="h264") as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number in range(0, len(fields), step):
            packet = av.Packet(b"".join(fields[number : number + step]))
            packet.stream, packet.time_base, packet.duration = stream, Fraction(1, 2 * FPS), step
            packet.pts = packet.dts = number
            packet.is_keyframe = number % (2 * GROUP) == 0
            container.mux(packet)
    return str(path)


@pytest.mark.parametrize(
    ("suffix", "apart"),
    [(suffix, False) for suffix in ("mp4", "mkv", "ts", "avi", "flv")]
    + [(name, True) for name in ("mp4", "mkv", "ts")],
)
def test_two_fields_are_a_frame(tmp_path: Path, suffix: str, apart: bool) -> None:
    path = write_fields(tmp_path / f"a.{suffix}", apart)
    facts = probe(path)
    assert facts.num_frames == FRAMES
    assert facts.fps == pytest.approx(FPS, rel=1e-3)
    times_T = (np.arange(FRAMES) + 0.5) / FPS
    (frames,) = read_clips(path, [times_T], SIDE, (SIDE, SIDE), facts.decoder)
    assert [code(frame) for frame in frames] == list(range(FRAMES))
    for index in (1, 29, 30, 31, 59, 88):
        (frames,) = read_clips(path, [times_T[index : index + 1]], SIDE, (SIDE, SIDE), facts.decoder)
        assert code(frames[0]) == index
