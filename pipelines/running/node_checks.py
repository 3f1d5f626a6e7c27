"""What a node of a cluster is asked by `cluster_report`, and what it reports.

Each function but `make_clip` runs there as a task, and raises what is wrong. What a node may lack is imported by the
functions: that it is missing is an answer too.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from pipelines.errors import last_line
from s5.errors import VideoError

ASKED, CLIP, MARK = "asked.json", "clip.mp4", "[cluster_report] "
"""Files that `cluster_report` reads, and what the line begins with that it prints."""
STORE_BYTES = 64 << 20
"""Size of the file that each node writes to the store."""
TORCH_S = 120
REASON_CHARACTERS = 300
CLIP_SIDE, CLIP_FRAMES, CLIP_FPS = 64, 16, 8
CLIP_TIMES_S = (0.0, 1.0, 1.5)
LEVEL, LEVEL_TOLERANCE = 15, 4
"""Frame i of the clip is grey, of level LEVEL * i, as far as encoding keeps it."""
SEEN_BY_TORCH = """
import json, torch
print(json.dumps(torch.cuda.device_count() if torch.cuda.is_available() else 0))
"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What nodes are to reach; empty for nothing."""

    store: str = ""
    """Absolute path or URI of a folder."""
    tracking_uri: str = ""
    """Address of an MLflow server."""
    video: str = ""
    """Absolute path or URI of a video."""


@dataclass(kw_only=True)
class NodeReport:
    """What a node says."""

    name: str
    """Its address, with the beginning of its id where several nodes share one."""
    resources: dict[str, float]
    """What Ray counts."""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    temp_dir: str = ""
    free_bytes: dict[str, int] = field(default_factory=dict)
    """Of `disk` (that of Ray's temporary files), `memory` and `shm`, where there is one."""
    total_bytes: dict[str, int] = field(default_factory=dict)
    torch_gpus: int = 0
    torch_reason: str = ""
    """What torch says of GPUs that it does not see."""
    write_mb_s: float | None = None
    """MB/s while all nodes write at once."""
    read_mb_s: float | None = None
    """MB/s while all nodes read at once, what another one wrote."""
    unseen: str = ""
    """Name of the node whose file in the store is not there for this one."""
    clock_offset_s: float | None = None
    """How far its clock is ahead of that of the job's node."""
    clock_error_s: float = 0.0
    """By how much that may be wrong: half of the round trip."""
    errors: dict[str, str] = field(default_factory=dict)
    """What went wrong, by question: `system`, `torch`, `decord`, `pyav`, `video`, `mlflow`, `write`,
    `read`, `clock`."""


# --- the node itself --------------------------------------------------------------------------------------------------


def system() -> dict[str, Any]:
    """Return the machine, versions, and free and whole space in bytes, as `NodeReport` names them."""
    import ray
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    from pipelines.storage import provenance

    temp = ray.get_runtime_context().get_temp_dir()
    disk, memory = shutil.disk_usage(temp), get_system_memory()
    free = {"disk": disk.free, "memory": memory - get_used_memory()}  # type: ignore[no-untyped-call]
    total = {"disk": disk.total, "memory": memory}
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm")
        free, total = free | {"shm": shared.free}, total | {"shm": shared.total}
    return {
        "machine": platform.machine(),
        "versions": provenance.versions(),
        "temp_dir": temp,
        "free_bytes": free,
        "total_bytes": total,
    }


def gpus_of_torch() -> tuple[int, str]:
    """Return how many GPUs torch sees, and what it says about those that it does not.

    In a process of its own, which sees all that the node has: Ray hides GPUs from tasks that ask for none.

    Raises:
        ImportError: torch cannot be imported.
    """
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", SEEN_BY_TORCH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TORCH_S)
    if done.returncode:
        raise ImportError(last_line(done.stderr) or f"import torch ends with status {done.returncode}")
    warnings = [line.partition("Warning: ")[2] for line in done.stderr.splitlines() if "Warning: " in line]
    return json.loads(done.stdout), warnings[-1][:REASON_CHARACTERS] if warnings else ""


# --- decoding -------------------------------------------------------------------------------------------------------


def make_clip() -> bytes:
    """Return a small video of frames that say which they are (mp4, H.264)."""
    import av
    import numpy as np

    with av.open(target := BytesIO(), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=CLIP_FPS, options={"bf": "0"})
        stream.width = stream.height = CLIP_SIDE
        stream.pix_fmt = "yuv420p"
        for index in range(CLIP_FRAMES):
            picture = np.full((CLIP_SIDE, CLIP_SIDE, 3), LEVEL * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


def decode(decoder: str, clip: bytes) -> None:
    """Decode what `make_clip` made by `decord` or `pyav` alone.

    Raises:
        VideoError: it cannot be decoded, or to other frames.
        ImportError, OSError, RuntimeError: the decoder cannot be loaded.
    """
    import numpy as np

    from s5.video.decord_reader import DecordReader

    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(clip)
        file.flush()
        with closing(
            _pyav(file.name) if decoder == "pyav" else DecordReader(file.name, CLIP_SIDE, CLIP_SIDE)
        ) as reader:
            frames = reader.read(np.array(CLIP_TIMES_S))
    levels = [float(frame.mean()) for frame in frames]
    expected = [LEVEL * CLIP_FPS * time_s for time_s in CLIP_TIMES_S]
    if not np.allclose(levels, expected, rtol=0, atol=LEVEL_TOLERANCE):
        raise VideoError(f"grey levels of the frames are {np.round(levels)} in place of {expected}")


def _pyav(path: str) -> Any:
    from s5.video.pyav_reader import PyAVReader

    return PyAVReader(path, (CLIP_SIDE, CLIP_SIDE))


def read_video(uri: str) -> None:
    """Read a video of the user's as `index` and training do.

    Raises:
        VideoError, OSError, UserError: it is not there, or cannot be read.
    """
    import numpy as np

    from pipelines import storage
    from s5.video import reading

    with storage.open_video(uri) as source:
        facts = reading.probe(source)
    with storage.open_video(uri) as source:
        times = np.array([0.0, facts.duration_s / 2])
        reading.read_clips(source, [times], CLIP_SIDE, (facts.width, facts.height), facts.decoder)


# --- what the node reaches ------------------------------------------------------------------------------------------


def write_file(path: str) -> tuple[float, str]:
    """Write a file of STORE_BYTES random bytes; return how many seconds it took, and the digest of its content."""
    from pipelines import storage

    content = os.urandom(STORE_BYTES)
    began = time.perf_counter()
    storage.write_bytes(path, content)
    return time.perf_counter() - began, hashlib.sha256(content).hexdigest()


def read_file(path: str) -> tuple[float, str] | None:
    """Read a file; return how many seconds it took and the digest of its content, or None where there is none."""
    from pipelines import storage

    if not storage.exists(path):
        return None
    began = time.perf_counter()
    content = storage.read_bytes(path)
    return time.perf_counter() - began, hashlib.sha256(content).hexdigest()


def remove_file(path: str) -> None:
    """Delete a file if it is there."""
    from pipelines import storage

    storage.remove(path)


def ask_mlflow(uri: str) -> None:
    """Ask an MLflow server for an experiment, as a run does.

    Raises:
        RefusedError, UnavailableError: it refuses, or does not answer.
    """
    from pipelines.tracking.client import connect, set_environment, translated_errors

    set_environment(uri)
    with translated_errors():
        connect(uri).search_experiments(max_results=1)


def clock() -> float:
    """Return the node's time in seconds since 1970."""
    return time.time()
