from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.running import node_checks
from pipelines.running.cluster_report import read_from, report
from pipelines.running.node_checks import Asked
from pipelines.storage import provenance
from pipelines.tracking.send_queue import UnavailableError
from s5.errors import VideoError

ROOT = Path(__file__).parents[3]
DECODERS = ("decord", "pyav")


@pytest.fixture(scope="module")
def clip() -> bytes:
    return node_checks.make_clip()


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_is_sound_where_it_returns_the_right_frames(
    decoder: str, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_checks.decode(decoder, clip)
    # As if the clip had other frames.
    monkeypatch.setattr(node_checks, "CLIP_FPS", node_checks.CLIP_FPS + 1)
    with pytest.raises(VideoError, match="grey levels"):
        node_checks.decode(decoder, clip)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_missing_decoder_is_named(decoder: str, clip: bytes, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(clip)
    code = f"""
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys({["av", "decord"]!r}))
from pipelines.running import node_checks
from s5.errors import VideoError
try:
    node_checks.decode({decoder!r}, Path({str(tmp_path / "clip.mp4")!r}).read_bytes())
except (ImportError, VideoError) as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"decord": "decord", "pyav": "av"}[decoder] in done.stdout


def test_a_video_of_the_users_is_read_or_refused(clip: bytes, tmp_path: Path) -> None:
    (tmp_path / "sound.mp4").write_bytes(clip)
    node_checks.read_video(str(tmp_path / "sound.mp4"))
    (tmp_path / "broken.mp4").write_bytes(clip[:1000])
    for name in ("broken", "missing"):
        with pytest.raises(VideoError):
            node_checks.read_video(str(tmp_path / f"{name}.mp4"))


def test_a_file_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checks, "STORE_BYTES", 1000)
    path = str(tmp_path / "file")
    assert node_checks.read_file(path) is None
    _, written = node_checks.write_file(path)
    assert (found := node_checks.read_file(path)) is not None
    assert found[1] == written
    node_checks.remove_file(path)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="File exists"):
        node_checks.write_file(f"{path}/below")


def test_mlflow_that_does_not_answer_says_so() -> None:
    with pytest.raises(UnavailableError, match="Connection refused"):
        node_checks.ask_mlflow("http://127.0.0.1:9")


@pytest.mark.slow
def test_every_node_of_a_cluster_reports(ray_local: None, clip: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.mp4").write_bytes(clip)
    (tmp_path / "store").mkdir()
    asked = Asked(store=str(tmp_path / "store"), video=str(tmp_path / "mine.mp4"))
    (found,) = report(asked, clip)
    assert found.errors == {}
    assert found.resources["CPU"] == 2
    assert found.versions == provenance.versions()
    assert found.write_mb_s
    assert found.read_mb_s
    assert not [*(tmp_path / "store").iterdir()]
    (broken,) = report(Asked(store=asked.video, video=asked.store), clip[:1000])
    assert broken.errors.keys() == {"decord", "pyav", "video", "write"}
    assert "a folder, not a file" in broken.errors["video"]


@pytest.mark.parametrize(
    ("readers", "writers", "pairs"),
    [
        ("abc", "abc", {"a": "b", "b": "c", "c": "a"}),
        ("ab", "ab", {"a": "b", "b": "a"}),
        ("a", "a", {"a": "a"}),
        ("ab", "a", {"a": "a", "b": "a"}),
        ("ab", "", {}),
    ],
)
def test_a_node_reads_what_another_one_wrote(readers: str, writers: str, pairs: dict[str, str]) -> None:
    assert read_from([*readers], [*writers]) == pairs
