"""Small videos whose frames say which they are.

Frame i of a plain video is grey, of level LEVEL * i (up to the 51st); that of a coded one shows i as eight blocks.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

LEVEL = 5
ROWS, COLUMNS = 2, 4
"""Blocks of a coded frame, a bit each."""


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


def write_coded(
    path: Path,
    codec: str = "libx264",
    frames: int = 90,
    fps: int = 25,
    size: tuple[int, int] = (64, 64),
    bframes: int = 0,
    starts: list[int] | None = None,
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    sound_s: float = 0.0,
    noise: int = 0,
) -> str:
    """Write a video of coded frames with a key frame every 30, and return its name.

    `starts` numbers the frames' times in frames at `fps`; `size` is width and height; a second of sound is added for
    each of `sound_s`; `noise` of up to 100 levels makes files large.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"g": "30", "bf": str(bframes)} | (options or {}))
        stream.width, stream.height = size
        stream.pix_fmt = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}.get(codec, "yuv420p")
        stream.bit_rate = 2_000_000
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("mp2", rate=16000, layout="mono") if sound_s else None
        rng = np.random.default_rng(0)
        for index in range(frames):
            picture = blocks(index, size)
            if noise:
                picture = picture // 2 + rng.integers(0, noise, picture.shape, np.uint8) + 20
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (starts[index] if starts else index), Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for _ in range(round(sound_s)):
            container.mux(sound.encode(silence()))
    return str(path)


def blocks(index: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return the coded picture (H, W, 3) of an index, of a width and height."""
    width, height = size
    bits = np.array([index >> bit & 1 for bit in range(ROWS * COLUMNS)]).reshape(ROWS, COLUMNS)
    picture = bits[np.arange(height) * ROWS // height][:, np.arange(width) * COLUMNS // width]
    return np.repeat(230 * picture[:, :, None], 3, axis=2).astype(np.uint8)


def code(frame_HWC: npt.NDArray[np.uint8]) -> int:
    """Return the index that a coded frame shows."""
    height, width = frame_HWC.shape[:2]
    middles = frame_HWC[height // ROWS // 2 :: height // ROWS, width // COLUMNS // 2 :: width // COLUMNS]
    bits = middles[:ROWS, :COLUMNS].mean(axis=2).ravel() > 115
    return int(bits @ (1 << np.arange(ROWS * COLUMNS)))


def silence() -> av.AudioFrame:
    """Return a second of no sound."""
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
    frame.sample_rate = 16000
    return frame


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
