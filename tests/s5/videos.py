"""Small videos whose frames say which they are, up to the 51st: frame i is grey, of level LEVEL * i."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

# The rest of s5 is tested without the decoders too; a test that imports this file is skipped there.
av = pytest.importorskip("av")
pytest.importorskip("decord")

LEVEL = 5


def write_video(
    path: Path,
    frames: int,
    fps: int = 8,
    width: int = 64,
    height: int = 64,
    starts: list[float] | None = None,
    codec: str = "libx264",
) -> str:
    """Write a video and return its name; `starts` gives each frame's time in seconds (a variable rate)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"bf": "0"})
        stream.bit_rate = 4_000_000
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if starts:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            picture = np.full((height, width, 3), min(255, LEVEL * index), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if starts:
                frame.pts, frame.time_base = round(1000 * starts[index]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def write_audio(path: Path) -> str:
    """Write an mp4 with a second of silence and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def truncate(path: str, share: float = 0.5) -> str:
    """Cut a file's end off and return its name."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(share * len(content))])
    return path


def numbers(frames_TSSC: npt.NDArray[np.uint8]) -> list[int]:
    """Return the index that each frame shows."""
    return [round(float(frame.mean()) / LEVEL) for frame in frames_TSSC]
