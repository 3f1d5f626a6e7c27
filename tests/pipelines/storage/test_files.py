"""Files on the local disk, on an S3 service on this machine, and on a web server."""

from __future__ import annotations

import contextlib
import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs

from pipelines import storage
from pipelines.data.decode_tasks import CANDIDATE, ClipSpec, decode_chunk, probe_chunk
from pipelines.data.video_process import _whole
from pipelines.errors import UserError
from pipelines.storage import filesystems
from pipelines.storage.weights import local_checkpoint
from s5.config import ClipConfig
from s5.video.reading import probe, read_frames
from tests.pipelines.conftest import SECRET
from tests.s5.videos import code, write_coded, write_video


def _upload(path: str, uri: str) -> str:
    storage.write_bytes(uri, Path(path).read_bytes())
    return uri


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a b.mp4", "s3://bucket/a b.mp4"),
        ("see https://user:pass@host/a.mp4 there", "see https://***@host/a.mp4 there"),
        ("https://host/a.mp4?X-Amz-Signature=1&b=2", "https://host/a.mp4?***"),
        ("s3://KEY:SE@CRET@bucket/a@b", "s3://***@bucket/a@b"),
        ("'s3://bucket/a?sig=x' and 'gs://u@b/c'", "'s3://bucket/a?***' and 'gs://***@b/c'"),
        ("mail a@b.c?d", "mail a@b.c?d"),
        ("s3://KEY:wJal/K7@bucket/m", "s3://***@bucket/m"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
    ],
)
def test_redacted(text: str, shown: str) -> None:
    assert storage.redacted(text) == shown


@pytest.mark.parametrize("name", ["https://user:hush@host/a", "s3://key:hush@bucket/a", "http://host/a?sig=hush"])
def test_a_name_with_credentials_is_refused_without_showing_them(name: str) -> None:
    for use in (storage.filesystem, storage.exists, storage.read_bytes, storage.read_table):
        with pytest.raises(UserError, match="holds credentials") as raised:
            use(name)
        assert "hush" not in str(raised.value)


def test_an_unknown_scheme_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        storage.filesystem("ftps://host/a")


def test_a_web_address_cannot_be_listed_or_written() -> None:
    for use in (storage.filesystem, lambda name: storage.write_bytes(name, b"")):
        with pytest.raises(UserError, match="neither list folders nor write"):
            use("https://host/a")


# --- S3 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a b/ü 日.json", "a%20b.json", "a+b#c.json"])
def test_files_on_s3_have_any_name(bucket: str, name: str) -> None:
    uri = storage.join(bucket, "folder", name)
    assert not storage.exists(uri)
    storage.write_json(uri, {"a": 1})
    assert storage.exists(uri)
    assert storage.read_json(uri) == {"a": 1}
    system, inner = storage.filesystem(storage.join(bucket, "folder"))
    files = system.get_file_info(fs.FileSelector(inner, recursive=True))
    assert [file.path.removeprefix(f"{inner}/") for file in files if file.is_file] == [name]
    storage.remove(uri)
    assert not storage.exists(uri)


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_a_file_written_in_parts_is_there_whole_or_not_at_all(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = str(tmp_path / "local") if place == "local" else request.getfixturevalue("bucket")
    path = storage.join(folder, "below", "a.mp4")

    def fail() -> None:
        with storage.atomic_write(path) as part:
            Path(part).write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not storage.exists(path)
    with storage.atomic_write(path) as part:
        Path(part).write_bytes(b"whole")
        assert not storage.exists(path)
    assert storage.read_bytes(path) == b"whole"
    assert storage.size(path) == 5
    assert not list(tmp_path.rglob("*.part"))


def test_tables_and_folders_on_s3(bucket: str, tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", "y"]})
    storage.check_writable(bucket + "/out")
    storage.write_table(bucket + "/out/t.parquet", table)
    assert storage.read_table(bucket + "/out/t.parquet", ["b"]) == table.select(["b"])
    assert storage.is_folder(bucket + "/out")
    assert not storage.is_folder(bucket + "/out/t.parquet")
    storage.write_bytes(bucket + "/out/deep/x", b"1")
    storage.download(bucket + "/out", tmp_path / "copy")
    assert (tmp_path / "copy" / "deep" / "x").read_bytes() == b"1"
    assert storage.read_table(str(tmp_path / "copy" / "t.parquet")) == table


def test_a_bucket_that_is_missing_is_reported_without_secrets(bucket: str) -> None:
    assert not storage.exists("s3://no-such-bucket/a")
    with pytest.raises(UserError, match=r"--out is 's3://no-such-bucket/a': it cannot be written to") as raised:
        storage.check_writable("s3://no-such-bucket/a")
    assert SECRET not in str(raised.value)


def test_a_checkpoint_on_s3_is_fetched(bucket: str) -> None:
    for name in ("meta.json", "model.safetensors"):
        storage.write_bytes(f"{bucket}/run/checkpoint/{name}", b"{}")
    with local_checkpoint(f"{bucket}/run/checkpoint") as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "model.safetensors"]


# --- Google's object store -------------------------------------------------------------------------------------------


@pytest.fixture
def gs_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve Google's object store from a process of its own: its client holds Python's lock while it asks for sizes."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", port]
    server = subprocess.Popen([*command, "--in-memory", "--default-bucket", "bucket"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", int(port))):
                break
            time.sleep(0.05)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{port}")
        filesystems._object_store.cache_clear()
        yield "gs://bucket"
    finally:
        filesystems._object_store.cache_clear()
        server.kill()
        server.wait()


def test_files_in_googles_store(gs_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{gs_bucket}/out/a b%20ü.mp4"
    path = write_coded(tmp_path / "a.mp4", frames=90, noise=60)
    storage.check_writable(f"{gs_bucket}/out")
    with storage.atomic_write(uri) as part:
        Path(part).write_bytes(Path(path).read_bytes())
    assert storage.exists(uri)
    assert storage.is_folder(f"{gs_bucket}/out")
    assert storage.size(uri) == Path(path).stat().st_size
    monkeypatch.setattr("pipelines.storage.files.WHOLE_BYTES", 0)
    with storage.open_video(uri) as source:
        assert isinstance(source, pa.NativeFile)
        assert code(read_frames(source, np.array([2.0]), 64)[0]) == 50
    storage.write_json(f"{gs_bucket}/out/deep/er/b.json", [1])
    storage.download(f"{gs_bucket}/out", tmp_path / "copy")
    assert storage.read_json(str(tmp_path / "copy" / "deep" / "er" / "b.json")) == [1]
    storage.remove(uri)
    assert not storage.exists(uri)
    # Nor is a bucket made that is not there.
    with pytest.raises(UserError, match=r"--out is 'gs://none/out': it cannot be written to \(.*404"):
        storage.check_writable("gs://none/out")


@pytest.mark.slow
def test_googles_store_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:9")
    monkeypatch.setattr(filesystems, "GCS_RETRY", timedelta(seconds=1))
    filesystems._object_store.cache_clear()
    with pytest.raises(UserError, match=r"'gs://bucket/a' cannot be reached: .*UNAVAILABLE") as raised:
        storage.exists("gs://bucket/a")
    filesystems._object_store.cache_clear()
    assert "error_info" not in str(raised.value)


# --- videos ---------------------------------------------------------------------------------------------------------


def _rows(uri: str) -> pa.Table:
    video = {"video_id": "v", "uri": uri, "start_s": 0.0, "end_s": 3.5, "fps": 25.0, "seed": 1, "width": 64}
    return pa.table({"candidates": pa.array([[video | {"height": 64, "decoder": "pyav"}]], pa.list_(CANDIDATE))})


SPEC = ClipSpec(ClipConfig(frames=4, long_stride=0.5, short_stride=0.1), frame_size=64, timeout_s=30.0)


@pytest.mark.parametrize("name", ["a.mp4", "a b ü.mkv"])
def test_a_video_on_s3_is_read_like_a_local_one(bucket: str, tmp_path: Path, name: str) -> None:
    path = write_coded(tmp_path / name, bframes=2)
    uri = _upload(path, f"{bucket}/videos/{name}")
    (facts,) = probe_chunk(pa.table({"uri": [uri]}), 30.0).to_pylist()
    here = probe(path)
    assert facts["reason"] is None
    assert (facts["num_frames"], facts["duration_s"]) == (here.num_frames, here.duration_s)
    assert facts["decoder"] == "pyav"
    remote, local = decode_chunk(_rows(uri), SPEC), decode_chunk(_rows(path), SPEC)
    assert remote["failures"].tolist() == ["[]"]
    np.testing.assert_array_equal(remote["long"], local["long"])


def test_of_a_long_video_only_ranges_are_fetched(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_coded(tmp_path / "a.mp4", frames=250, fps=2, noise=100)
    uri = _upload(path, f"{bucket}/a.mp4")
    monkeypatch.setattr("pipelines.storage.files.WHOLE_BYTES", 0)
    with storage.open_video(uri) as source:
        assert isinstance(source, pa.NativeFile)
        assert code(read_frames(source, np.array([100.0]), 64)[0]) == 200
    with storage.open_video(uri, whole=True) as source:
        assert probe(source) == replace(probe(path), decoder="pyav")
    monkeypatch.setattr("pipelines.storage.files.WHOLE_BYTES", 100 << 20)
    with storage.open_video(uri) as source:
        assert not isinstance(source, (str, pa.NativeFile))
        assert source.read() == Path(path).read_bytes()


class Counting:
    """An open file that counts the bytes that are read of it: what an object store sends."""

    def __init__(self, file: Any) -> None:
        self._file, self.fetched = file, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        data = bytes(self._file.read(size))
        self.fetched += len(data)
        return data


def _write_large(path: Path, codec: str, movflags: str) -> str:
    """Write a video of 8 s and about 19 MB, which is not fetched as a whole for its size."""
    pictures = np.random.default_rng(0).integers(0, 255, (4, 256, 320, 3), np.uint8)
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream: Any = container.add_stream(codec, rate=25, options={"g": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 320, 256, "yuv420p", 20_000_000
        for index in range(200):
            frame = av.VideoFrame.from_ndarray(pictures[index % 4], format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "codec", "movflags"),
    [("a.mp4", "libx264", "faststart"), ("a.mp4", "mpeg4", ""), ("a.mov", "mpeg4", "")],
)
def test_a_probe_fetches_ranges_of_files_with_an_index(
    bucket: str, tmp_path: Path, name: str, codec: str, movflags: str
) -> None:
    path = _write_large(tmp_path / name, codec, movflags)
    uri = _upload(path, f"{bucket}/{name}")
    with storage.open_video(uri, _whole(None)) as source:
        assert isinstance(source, pa.NativeFile)
        counting: Any = Counting(source)
        facts = probe(counting)
    assert facts == replace(probe(path), decoder="pyav")
    # Little more of a longer one: its index, thrice, and what is decoded.
    assert counting.fetched < 6e6 < 0.4 * Path(path).stat().st_size
    # What index does: the same facts from the child.
    (row,) = probe_chunk(pa.table({"uri": [uri]}), 30.0).to_pylist()
    assert (row["num_frames"], row["duration_s"], row["reason"]) == (facts.num_frames, facts.duration_s, None)


def test_a_probe_fetches_other_files_as_a_whole(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.files.WHOLE_BYTES", 0)
    for name in ("a.mkv", "a.avi", "a.ts"):
        path = write_coded(tmp_path / name)
        with storage.open_video(_upload(path, f"{bucket}/{name}"), _whole(None)) as source:
            assert not isinstance(source, (str, pa.NativeFile))
            assert probe(source).num_frames == 90


def test_a_video_that_vanished_from_s3_is_a_failure(bucket: str) -> None:
    columns = decode_chunk(_rows(f"{bucket}/videos/gone.mp4"), SPEC)
    assert columns["video_id"].tolist() == [""]
    assert "gone.mp4" in columns["failures"][0]
    assert SECRET not in columns["failures"][0]


def test_a_local_name_is_given_as_it_is(tmp_path: Path) -> None:
    for name in (str(tmp_path / "a b.mp4"), f"file://{tmp_path}/a b.mp4"):
        with storage.open_video(name) as source:
            assert source == str(tmp_path / "a b.mp4")


# --- the web --------------------------------------------------------------------------------------------------------


CUT = 0
"""In place of a status: the connection breaks off in the middle of the file."""


class _Web(http.server.SimpleHTTPRequestHandler):
    failures: list[int]

    def do_GET(self) -> None:
        if self.failures and self.failures[-1] == CUT:
            self.failures.pop()
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        elif self.failures:
            self.send_error(self.failures.pop())
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("pipelines.storage.web.time.sleep", lambda _: None)
    _Web.failures = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Web(*args, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_files_on_the_web_are_read(web: str, tmp_path: Path) -> None:
    storage.write_table(str(tmp_path / "a b.parquet"), pa.table({"a": [1]}))
    assert storage.exists(f"{web}/a b.parquet")
    assert not storage.exists(f"{web}/b.parquet")
    assert not storage.is_folder(web)
    assert storage.read_table(f"{web}/a b.parquet").to_pylist() == [{"a": 1}]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{web}/b.parquet")


def test_a_video_on_the_web_is_copied_and_the_copy_deleted(web: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 24)
    with storage.open_video(f"{web}/a.mp4") as copy:
        assert isinstance(copy, str)
        assert Path(copy).read_bytes() == Path(path).read_bytes()
    assert not Path(copy).exists()
    (facts,) = probe_chunk(pa.table({"uri": [f"{web}/a.mp4"]}), 30.0).to_pylist()
    assert (facts["num_frames"], facts["decoder"]) == (24, "decord")


def test_passing_errors_of_a_server_are_retried(web: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    _Web.failures = [503, 500]
    assert storage.read_bytes(f"{web}/a") == b"content"
    _Web.failures = [503, 503, 503]
    with pytest.raises(OSError, match="answers 503"):
        storage.read_bytes(f"{web}/a")
    _Web.failures = [403]
    with pytest.raises(OSError, match="answers 403"):
        storage.read_bytes(f"{web}/a")
    assert not _Web.failures


def test_a_file_that_breaks_off_is_fetched_again(web: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 24)
    _Web.failures = [CUT, CUT]
    with storage.open_video(f"{web}/a.mp4") as copy:
        assert isinstance(copy, str)
        assert Path(copy).read_bytes() == Path(path).read_bytes()
    (tmp_path / "a").write_bytes(b"content")
    _Web.failures = [CUT]
    assert storage.read_bytes(f"{web}/a") == b"content"
    _Web.failures = [CUT, CUT, CUT]
    with pytest.raises(OSError, match="breaks off after 3 of 7 bytes"):
        storage.read_bytes(f"{web}/a")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.web.time.sleep", lambda _: None)
    with pytest.raises(OSError, match="cannot be reached"):
        storage.read_bytes("http://127.0.0.1:9/a")
    with pytest.raises(UserError, match="cannot be reached"):
        storage.exists("http://127.0.0.1:9/a")


@pytest.mark.slow
def test_an_s3_service_that_is_not_there(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow's client tries for 6 s."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    filesystems._object_store.cache_clear()
    with pytest.raises(UserError, match=r"cannot be reached: .*NETWORK_CONNECTION") as raised:
        storage.exists(f"{bucket}/a")
    assert SECRET not in str(raised.value)
