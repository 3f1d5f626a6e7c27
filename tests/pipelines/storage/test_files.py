"""Files on the local disk, on an S3 service on this machine, and in Google's store."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs

from pipelines import storage
from pipelines.errors import UserError
from pipelines.storage import filesystems
from pipelines.storage.weights import local_checkpoint
from s5.video.reading import read_frames
from tests.pipelines.conftest import SECRET
from tests.s5.videos import code, write_coded

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
