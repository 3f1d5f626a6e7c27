"""An S3 service on this machine, and a tracking database."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from pipelines import tracking
from pipelines.config import TrackingConfig
from pipelines.data.decoding import decode_tasks
from pipelines.storage import filesystems

SECRET = "wJalrXUtnFEMI"


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking database with its tables, which take seconds to make: to be copied."""
    folder = tmp_path_factory.mktemp("database")
    tracker = tracking.start(TrackingConfig(experiment="template"), stage="a", out=str(folder / "o"), params={})
    tracker.finish("FINISHED")
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def s3_service() -> Iterator[str]:
    """Serve S3 on this machine and return the endpoint's address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_service: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """Make a bucket, as a user whose settings are in the environment, and give its name."""
    settings = {
        "AWS_ENDPOINT_URL": s3_service,
        "AWS_ACCESS_KEY_ID": "AKIATEST",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    filesystems._object_store.cache_clear()
    # The child that reads videos has the environment of its start.
    decode_tasks._process.close()
    name = f"bucket-{zlib.crc32(request.node.name.encode())}"
    # Not through `storage`, which makes no buckets.
    fs.FileSystem.from_uri(f"s3://{name}?allow_bucket_creation=true")[0].create_dir(name)
    yield f"s3://{name}"
    decode_tasks._process.close()
    filesystems._object_store.cache_clear()
