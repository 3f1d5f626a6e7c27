"""Files and videos on a web server, and services that are not there."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.data.decoding.decode_tasks import probe_chunk
from pipelines.errors import UserError
from pipelines.storage import filesystems
from tests.pipelines.conftest import SECRET
from tests.s5.videos import write_video

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
