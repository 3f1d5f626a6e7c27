"""Stage `transcode` on real files, and the encoding of one video."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.config import DecodeConfig, TrackingConfig, TranscodeConfig
from pipelines.data.decoding.encoding import encode, fitted
from pipelines.data.decoding.video_process import VideoProcess, VideoTimeoutError
from pipelines.data.decoding.video_requests import EncodeRequest
from pipelines.data.manifest import SCHEMA, Description, classes, description, metadata, read_manifest
from pipelines.errors import UserError
from pipelines.stages import transcode
from s5.config import ClipConfig
from s5.errors import VideoError
from s5.video.containers.scan import scan
from s5.video.reading import probe, read_frames
from tests.s5.videos import code, truncate, write_coded, write_video

CLIPS = ClipConfig(frames=4, long_stride=1.0, short_stride=0.5)
in_ray = pytest.mark.usefixtures("ray_local")


def _encoding(source: str, path: Path, **changes: Any) -> EncodeRequest:
    facts = probe(source)
    settings: dict[str, Any] = {"short_side": 48, "gop_s": 0.5, "quality": 20, "speed": "veryfast"}
    return EncodeRequest(path=str(path), fps=facts.fps, num_frames=facts.num_frames, **(settings | changes))


def _packets(path: str) -> list[tuple[float, bool]]:
    """Return the time and the key-frame flag of each packet, checking that they are stored in the order of times."""
    with av.open(path) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert all(packet.pts == packet.dts for packet in packets)
    return [(float(packet.pts * packet.time_base), packet.is_keyframe) for packet in packets]


# --- one video ------------------------------------------------------------------------------------------------------

UNEVEN = [0, 1, 2, 5, 6, 20, 21, 22, 23, 24, 40, 41, 43, 80, 81]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("plain.mp4", {"sound_s": 3.0}),
        ("uneven.mp4", {"starts": UNEVEN, "frames": len(UNEVEN)}),
        ("uneven.mkv", {"starts": UNEVEN, "frames": len(UNEVEN)}),
        ("ntsc.mp4", {"fps": Fraction(30000, 1001)}),
        ("open.mp4", {"bframes": 2, "options": {"x264-params": "open-gop=1"}}),
        ("counted.avi", {"codec": "mpeg4", "bframes": 2}),
        ("vp9.webm", {"codec": "libvpx-vp9"}),
    ],
)
def test_times_and_pictures_stay(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    source, new = write_coded(tmp_path / name, **settings), tmp_path / "new"
    facts = encode(source, _encoding(source, new))
    before, after = scan(source), scan(str(new))
    np.testing.assert_allclose(after.starts_N, before.starts_N, atol=1e-6)
    assert facts.duration_s == pytest.approx(probe(source).duration_s)
    assert (facts.width, facts.height, facts.codec) == (48, 48, "h264")
    # Closed groups without reordering are what decord reads rightly.
    assert facts.decoder == "decord"
    assert not after.open_groups
    old_TSSC, new_TSSC = (read_frames(path, before.starts_N, 48) for path in (source, str(new)))
    assert [code(frame) for frame in new_TSSC] == [code(frame) for frame in old_TSSC]
    assert len({code(frame) for frame in new_TSSC}) > 10
    keys = [time for time, is_key in _packets(str(new)) if is_key]
    starts = sorted(time for time, _ in _packets(str(new)))
    for key, after_key in zip(keys, [*keys[1:], float("inf")], strict=True):
        group = [time for time in starts if key <= time < after_key]
        assert group[-1] - key < 0.5


@pytest.mark.parametrize(
    ("settings", "size"),
    [({"rotation": 90}, (48, 96)), ({"pixel_aspect": Fraction(2, 1)}, (192, 48)), ({"size": (40, 90)}, (40, 90))],
)
def test_pictures_are_upright_of_square_pixels_and_not_enlarged(
    tmp_path: Path, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    source, new = write_coded(tmp_path / "v.mp4", **({"size": (128, 64)} | settings)), tmp_path / "new"
    facts = encode(source, _encoding(source, new))
    assert (facts.width, facts.height) == size
    with av.open(str(new)) as container:
        frame = next(container.decode(video=0))
        assert (frame.width, frame.height, frame.rotation) == (*size, 0)
    (old,) = read_frames(source, np.array([1.0]), 32)
    (reencoded,) = read_frames(str(new), np.array([1.0]), 32)
    assert np.abs(old.astype(int) - reencoded).mean() < 8


def test_sizes_are_even_and_never_grow() -> None:
    assert fitted((1920, 1080), 224) == (398, 224)
    assert fitted((1080, 1921), 224) == (224, 398)
    assert fitted((101, 75), 224) == (100, 74)
    assert fitted((1, 1), 224) == (2, 2)


def test_a_video_that_ends_early_is_refused(tmp_path: Path) -> None:
    source = write_coded(tmp_path / "v.mkv", frames=90)
    encoding = _encoding(source, tmp_path / "new")
    with pytest.raises(VideoError, match=r"of its 90 frames can be decoded|damaged|fails to decode"):
        encode(truncate(source), encoding)


def test_a_video_gives_the_same_bytes_whatever_lies_in_memory(tmp_path: Path) -> None:
    for size in ((112, 80), (104, 76), (102, 74)):
        source, found = write_coded(tmp_path / f"{size[0]}.mp4", frames=60, size=size, noise=60), set()
        for number in range(6):
            # Other encoders leave other bytes in the memory that is used next.
            write_coded(tmp_path / "other.mp4", frames=10, size=(100 * number + 100, 66), noise=60)
            encode(source, _encoding(source, tmp_path / "new", short_side=96))
            found.add((tmp_path / "new").read_bytes())
        assert len(found) == 1


def test_the_child_encodes_within_its_time(tmp_path: Path) -> None:
    source = write_coded(tmp_path / "v.mp4", frames=250, size=(640, 480), noise=100)
    process = VideoProcess()
    try:
        with pytest.raises(VideoTimeoutError, match=r"data.decode_timeout_s, 0.01 s"):
            process.encode(source, _encoding(source, tmp_path / "new"), 0.01)
        with pytest.raises(OSError, match="cannot be written"):
            process.encode(source, _encoding(source, tmp_path / "nowhere" / "new"), 60.0)
        assert process.encode(source, _encoding(source, tmp_path / "new"), 60.0).num_frames == 250
    finally:
        process.close()


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """Write a manifest of three files and four videos: two are stretches of one file, one file breaks after it."""
    folder = tmp_path / "old"
    folder.mkdir()
    sources = {
        "train/a/ü 1": write_coded(folder / "a.mp4", size=(128, 96)),
        "long@0-2": (film := write_video(folder / "film.mp4", 40, width=96)),
        "long@2-5": film,
        "broken": write_video(folder / "broken.mp4", 40),
    }
    rows = []
    for number, (video_id, uri) in enumerate(sources.items()):
        facts = probe(uri)
        stretch = {"long@0-2": (0.0, 2.0), "long@2-5": (2.0, 5.0)}.get(video_id, (0.0, facts.duration_s))
        row = {"video_id": video_id, "uri": uri, "split": "train", "label": number % 2, "target": number / 2}
        names = ("duration_s", "fps", "num_frames", "width", "height", "codec", "decoder")
        rows.append(row | dict(zip(("start_s", "end_s"), stretch, strict=True)) | {n: getattr(facts, n) for n in names})
    truncate(sources["broken"])
    about = metadata(["x", "y", "z"], Description(dataset="lvu", listed={"train": 9}))
    storage.write_table(str(tmp_path / "manifest.parquet"), pa.Table.from_pylist(rows, SCHEMA.with_metadata(about)))
    return str(tmp_path / "manifest.parquet")


def _config(tmp_path: Path, manifest: str, **changes: Any) -> TranscodeConfig:
    settings: dict[str, Any] = {"out": str(tmp_path / "out"), "manifest": manifest, "short_side": 64, "clips": CLIPS}
    data = DecodeConfig(clips_per_task=1, decode_timeout_s=60.0)
    return TranscodeConfig(**(settings | changes), tracking=TrackingConfig(uri="off"), data=data)


@in_ray
def test_a_manifest_keeps_all_but_the_files(tmp_path: Path, manifest: str) -> None:
    result = transcode.run(_config(tmp_path, manifest))
    old, new = read_manifest(manifest), read_manifest(str(tmp_path / "out"))
    assert new["video_id"].to_pylist() == ["train/a/ü 1", "long@0-2", "long@2-5"]
    changed = ("uri", "width", "height", "codec", "decoder")
    assert new.drop_columns(list(changed)).equals(old.slice(0, 3).drop_columns(list(changed)))
    assert classes(new) == ["x", "y", "z"]
    assert description(new) == description(old)
    rows = new.to_pylist()
    assert [(row["width"], row["height"]) for row in rows] == [(86, 64), (96, 64), (96, 64)]
    assert rows[1]["uri"] == rows[2]["uri"]
    assert all(row["uri"].startswith(str(tmp_path / "out" / "videos")) for row in rows)
    for before, after in zip(old.to_pylist(), rows, strict=False):
        facts = probe(after["uri"])
        assert (facts.width, facts.decoder, facts.num_frames) == (after["width"], "decord", before["num_frames"])

    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert [reject["video_id"] for reject in rejects] == ["broken"]
    assert rejects[0]["reason"]
    assert result["counts"] == {"videos": 3, "files": 2, "kept": 0, "rejects": 1, "train": 3}
    files = [{row["uri"] for row in table} for table in (old.to_pylist()[:3], rows)]
    sizes = [sum(Path(uri).stat().st_size for uri in uris) for uris in files]
    assert [result["metrics"][f"transcode/bytes_{when}"] for when in ("before", "after")] == sizes
    assert result["metrics"]["transcode/pair_seconds_before"] > 0
    assert result["metrics"]["transcode/pair_seconds_after"] > 0


@in_ray
def test_a_second_start_goes_on(tmp_path: Path, manifest: str) -> None:
    config = _config(tmp_path, manifest, measured_videos=0)
    transcode.run(config)
    first = read_manifest(str(tmp_path / "out"))
    kept, lost = sorted(set(first["uri"].to_pylist()))
    facts, changed = probe(lost), Path(kept).stat().st_mtime_ns
    # As if it had been killed: no result, one file missing, one half-written.
    for name in ("result.json", "manifest.parquet"):
        (tmp_path / "out" / name).unlink()
    Path(lost).rename(Path(lost).parent / ".0123.part")

    with pytest.raises(UserError, match="short_side 64, not 32"):
        transcode.run(_config(tmp_path, manifest, measured_videos=0, short_side=32))
    result = transcode.run(config)
    assert result["counts"]["kept"] == 1
    assert read_manifest(str(tmp_path / "out")).equals(first)
    assert probe(lost) == facts
    assert Path(kept).stat().st_mtime_ns == changed
    assert not list((tmp_path / "out").rglob("*.part"))
    # A finished run is left alone.
    assert transcode.run(config) == result


@in_ray
def test_nothing_readable_is_an_error(tmp_path: Path, manifest: str) -> None:
    for path in (tmp_path / "old").iterdir():
        path.write_bytes(b"no video")
    with pytest.raises(UserError, match="none of the 4 videos can be read"):
        transcode.run(_config(tmp_path, manifest))


def test_new_files_have_names_that_any_storage_takes() -> None:
    names = [transcode.file_name(video_id) for video_id in ("a/b", "a_b", "ü ../x", "x" * 500)]
    assert len(set(names)) == 4
    assert all(name.isascii() and ".." not in name and len(name) < 100 and name.count("/") == 1 for name in names)


def test_groups_are_as_long_as_the_short_stride(tmp_path: Path, manifest: str) -> None:
    def gops(**changes: Any) -> list[float]:
        files = transcode.files_of(read_manifest(manifest), _config(tmp_path, manifest, **changes), "videos")
        return list(files["gop_s"].to_pylist())

    assert gops() == [0.5, 0.5, 0.5]
    assert gops(gop_s=2.0) == [2.0, 2.0, 2.0]
    frames = ClipConfig(frames=4, long_stride=20, short_stride=10, unit="frames")
    assert gops(clips=frames) == pytest.approx([10 / 25, 10 / 8, 10 / 8])
