"""Files are probed once, and a run that was ended goes on with what it has found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.config import DecodeConfig, IndexConfig, TrackingConfig
from pipelines.data.indexing import probing
from pipelines.data.indexing.probing import PARTS
from pipelines.stages import index
from tests.s5.videos import write_video

in_ray = pytest.mark.usefixtures("ray_local")


def _config(tmp_path: Path, out: str = "out", **changes: Any) -> IndexConfig:
    data = DecodeConfig(clips_per_task=1, cpus_per_decode=1)
    off = TrackingConfig(uri="off")
    return IndexConfig(out=str(tmp_path / out), videos=str(tmp_path / "videos"), data=data, tracking=off, **changes)


def _videos(tmp_path: Path, count: int) -> list[Path]:
    return [Path(write_video(tmp_path / f"videos/v{i}.mp4", 8 + i)) for i in range(count)]


def _manifest(tmp_path: Path, out: str = "out") -> pa.Table:
    return pq.read_table(tmp_path / out / "manifest.parquet")


def _end_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let probing be interrupted after some files."""
    whole = probing._probed

    def interrupted(uris: list[str], data: DecodeConfig) -> Iterator[dict[str, Any]]:
        for number, facts in enumerate(whole(uris, data)):
            if number == count:
                raise KeyboardInterrupt
            yield facts

    monkeypatch.setattr(probing, "_probed", interrupted)


@in_ray
def test_a_file_with_many_stretches_is_probed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _videos(tmp_path, 2)
    stretches = [f"v{i % 2}.mp4,{i / 100:.2f},{i / 100 + 0.5:.2f}" for i in range(50)]
    (tmp_path / "labels.csv").write_text("\n".join(["video,start_s,end_s", *stretches, "./v0.mp4,9,"]))
    result = index.run(_config(tmp_path, annotations=str(tmp_path / "labels.csv")))
    assert (result["counts"]["videos"], result["counts"]["rejects"]) == (50, 1)
    assert "[index] probed 2 of 2 files" in capsys.readouterr().out
    rows = _manifest(tmp_path).to_pylist()
    assert {(row["uri"][-6:], row["num_frames"]) for row in rows} == {("v0.mp4", 8), ("v1.mp4", 9)}
    assert [row["end_s"] - row["start_s"] for row in rows] == pytest.approx([0.5] * 50)


@in_ray
def test_a_run_that_was_ended_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = _videos(tmp_path, 6)
    (tmp_path / "videos/w.mp4").write_text("no video")
    index.run(_config(tmp_path, "whole"))
    with monkeypatch.context() as patched:
        _end_after(4, patched)
        with pytest.raises(KeyboardInterrupt):
            index.run(_config(tmp_path))
    assert not (tmp_path / "out/manifest.parquet").exists()
    assert len(list((tmp_path / "out" / PARTS).iterdir())) == 1
    # A part that is damaged, and a file that vanishes or changes or is no longer listed, are no obstacle.
    (tmp_path / "out" / PARTS / "damaged.parquet").write_bytes(b"PAR1")
    capsys.readouterr()
    result = index.run(_config(tmp_path))
    printed = capsys.readouterr().out
    assert "[index] 4 of 7 files were probed by an earlier run and have not changed since" in printed
    assert "[index] probed 3 of 3 files" in printed
    assert "damaged.parquet cannot be read" in printed
    assert _manifest(tmp_path).equals(_manifest(tmp_path, "whole"))
    assert (result["counts"]["videos"], result["counts"]["rejects"]) == (6, 1)
    assert not (tmp_path / "out" / PARTS).exists()
    assert videos[0].exists()


@in_ray
def test_files_that_have_changed_are_probed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = _videos(tmp_path, 5)
    monkeypatch.setattr(probing, "PART_S", 0.0)
    with monkeypatch.context() as patched:
        _end_after(4, patched)
        with pytest.raises(KeyboardInterrupt):
            index.run(_config(tmp_path))
    assert len(list((tmp_path / "out" / PARTS).iterdir())) == 4
    write_video(videos[0], 20)
    status = videos[1].stat()
    os.utime(videos[1], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    videos[2].rename(tmp_path / "videos/moved.mp4")
    capsys.readouterr()
    index.run(_config(tmp_path))
    assert "[index] 1 of 5 files were probed by an earlier run" in capsys.readouterr().out
    assert {row["video_id"]: row["num_frames"] for row in _manifest(tmp_path).to_pylist()} == {
        "moved": 10,
        "v0": 20,
        "v1": 9,
        "v3": 11,
        "v4": 12,
    }


@in_ray
def test_parts_of_another_program_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _videos(tmp_path, 2)
    with monkeypatch.context() as patched:
        _end_after(1, patched)
        patched.setattr(probing.provenance, "commit", lambda: "another")
        with pytest.raises(KeyboardInterrupt):
            index.run(_config(tmp_path))
    index.run(_config(tmp_path))
    printed = capsys.readouterr().out
    assert "earlier run" not in printed
    assert "[index] probed 2 of 2 files" in printed


@in_ray
def test_probing_in_several_executions_keeps_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [str(path) for path in _videos(tmp_path, 5)]
    monkeypatch.setattr(probing, "PROBED_AT_ONCE", 2)
    found = list(probing._probed(uris, DecodeConfig(clips_per_task=1)))
    assert [facts["num_frames"] for facts in found] == [8, 9, 10, 11, 12]


def test_folders_are_listed_and_removed(tmp_path: Path) -> None:
    folder = str(tmp_path / "parts")
    assert storage.files_below(folder) == []
    storage.remove_folder(folder)
    for name in ("b", "a", ".hidden"):
        storage.write_bytes(f"{folder}/{name}", b"")
    assert storage.files_below(folder) == [f"{folder}/a", f"{folder}/b"]
    storage.remove_folder(folder)
    assert not (tmp_path / "parts").exists()
