"""Damaged and lost packets: clips that need them fail, others are right, or the file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s5.errors import VideoError
from s5.video.choice import choose
from s5.video.containers import asf
from s5.video.containers.scan import scan
from s5.video.pyav_reader import PyAVReader
from s5.video.reading import probe, read_clips
from tests.s5.odd_videos import FPS, damage
from tests.s5.videos import code, write_coded


@pytest.mark.parametrize("suffix", ["mp4", "mov", "avi"])
@pytest.mark.parametrize("codec", ["mpeg2video", "libx264", "mpeg4", "mjpeg"])
@pytest.mark.parametrize(("value", "kept"), [(255, 0.0), (0, 0.0), (0, 0.5)])
def test_only_clips_that_need_damaged_packets_fail(
    tmp_path: Path, codec: str, suffix: str, value: int, kept: float
) -> None:
    """Packets 40 to 59 are overwritten: frames up to 38 are right, as are those from the key frame at 120 on."""
    path = damage(write_coded(tmp_path / f"a.{suffix}", codec, 150, noise=30), 40, 60, value, kept)
    decoder = choose(path, scan(path))
    failed = []
    for index in (0, 39, 43, 50, 59, 120, 140):
        try:
            frame = read_clips(path, [np.array([(index + 0.5) / FPS])], 64, (64, 64), decoder)[0][0]
        except VideoError:
            failed.append(index)
        else:
            assert code(frame) == index
    assert failed in ([43, 50, 59], [39, 43, 50, 59])


@pytest.mark.parametrize(("codec", "bframes"), [("mpeg2video", 0), ("mpeg2video", 2), ("libx264", 0), ("libx264", 3)])
@pytest.mark.parametrize("end", [50, 60])
def test_lost_packets_of_transport_streams(tmp_path: Path, codec: str, bframes: int, end: int) -> None:
    """Neither they nor their times are in the file; what needs them ends with a key frame."""
    path = damage(write_coded(tmp_path / "a.ts", codec, 150, bframes=bframes, noise=8), 40, end, 0)
    failed = set()
    for index in (0, 30, 35, *range(41, 60), 100, 140):
        try:
            frame = read_clips(path, [np.array([(index + 0.5) / FPS])], 64, (64, 64), "pyav")[0][0]
        except VideoError:
            failed.add(index)
        else:
            assert code(frame) == index
    assert set(range(42, end - 1)) <= failed <= set(range(41, 60))


def test_lost_blocks_of_matroska(tmp_path: Path) -> None:
    for value in (0, 255):
        path = damage(write_coded(tmp_path / "a.mkv", frames=150), 40, 60, value)
        with pytest.raises(VideoError, match="the file is damaged"):
            probe(path)


@pytest.mark.parametrize("end", [41, 60])
def test_lost_packets_of_flv(tmp_path: Path, end: int) -> None:
    whole = write_coded(tmp_path / "a.flv", frames=150, noise=30)
    assert probe(whole).num_frames == 150
    with pytest.raises(VideoError, match=r"the file is damaged \(\d+ bytes in its middle cannot be read\)"):
        probe(damage(whole, 40, end, 0))


@pytest.mark.parametrize("codec", ["wmv2", "msmpeg4", "mpeg4"])
@pytest.mark.parametrize("sound_s", [0.0, 6.0])
def test_lost_packets_of_wmv(tmp_path: Path, codec: str, sound_s: float) -> None:
    whole = write_coded(tmp_path / "a.wmv", codec, frames=600, noise=30, sound_s=sound_s)
    assert probe(whole).num_frames == 600
    stated = Path(whole).read_bytes()
    for end in (41, 60):
        Path(whole).write_bytes(stated)
        with pytest.raises(
            VideoError, match=r"the file is damaged \(\d+ frames in its middle are lost or incomplete\)"
        ):
            probe(damage(whole, 40, end, 255))
    Path(whole).write_bytes(stated[: len(stated) * 3 // 4])
    with pytest.raises(VideoError, match=r"truncated: 7\d% of the data that the file states are there"):
        probe(whole)


@pytest.mark.parametrize("first", [1, 2, 5])
def test_live_recordings_of_wmv_may_begin_anywhere_and_state_wrong_sizes(tmp_path: Path, first: int) -> None:
    path = Path(write_coded(tmp_path / "a.wmv", "wmv2", frames=200, noise=30))
    content = bytearray(path.read_bytes())
    data, properties = content.index(asf.ASF_DATA), content.index(asf.FILE_PROPERTIES)
    content[data + 16 : data + 24] = (1 << 62).to_bytes(8, "little")
    content[properties + asf.FLAGS_PLACE] |= asf.BROADCAST
    packets = data + asf.ASF_DATA_HEADER_BYTES
    del content[packets : packets + 3200 * first]
    path.write_bytes(content)
    assert asf.lost_objects(str(path), 1) == 0
    assert asf.missing_share(str(path)) == 0
    assert probe(str(path)).num_frames > 100


def test_a_damaged_frame_is_not_transcoded(tmp_path: Path) -> None:
    path = damage(write_coded(tmp_path / "a.mp4", "mpeg2video", 150), 40, 60, 255)
    with pytest.raises(VideoError, match=r"the frame at 1\.60 s"):
        list(PyAVReader(path).pictures())
