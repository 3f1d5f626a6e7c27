"""Choose the decoder of a file: decord where it is proven right, PyAV elsewhere.

decord is the faster one by a few per cent, but takes packets for frames, trusts key frames that are none, reads a
stream of its own choice and passes over damage. So it reads a file only if its codec and container are in `PROVEN`, its
packets are `plain` (`scan.Contents`), it finds the same times, and its pictures are those of PyAV at random times of
two groups of pictures, read in order and alone.

Shapes: N frames of a video, U compared frames, H height and W width of a picture in pixels.
"""

from __future__ import annotations

from contextlib import closing

import numpy as np

from s5.errors import VideoError
from s5.video.containers.scan import Contents
from s5.video.decord_reader import DecordReader
from s5.video.pyav_reader import PyAVReader
from s5.video.reader import FloatArray, FrameArray, IntArray, Source

PROVEN = {
    "mov": ("h264", "vp9", "mpeg4", "mjpeg", "prores"),
    "matroska": ("h264", "vp8", "vp9", "mpeg4", "mjpeg"),
    "avi": ("mpeg4", "msmpeg4v3", "mjpeg", "vp8"),
}
"""Codecs that decord reads rightly by container (prefix of FFmpeg's name); the table in docs/data.md proves each."""
REORDERED = ("h264",)
"""Codecs that decord reads rightly if frames are shown in another order than they are stored."""
ROTATING = "mov"
"""The only container whose rotation decord applies."""
TIMES_S = 2e-3
"""Largest difference of times, which decord has as float32; and at most a quarter of the shortest frame."""
COMPARED = 2
"""Groups of pictures in which pictures are compared."""
DEPTH = 8
"""Largest number of frames between a key frame and a compared one: bounds what a comparison costs."""
SHORT_SIDE = 64
"""Short side of compared pictures, in pixels."""
ALIKE, NEAR = 6.0, 0.25
"""Largest mean difference in levels between the pictures of two decoders; and how much closer to another frame's."""


def choose(source: Source, contents: Contents) -> str:
    """Return the decoder of a file: `decord`, `pyav`, or `pyav:N` for stream N of a file with several video streams."""
    pyav = f"pyav:{contents.stream}" if contents.streams > 1 else "pyav"
    if not isinstance(source, str) or contents.streams > 1 or not _is_proven(contents):
        return pyav
    try:
        return "decord" if _agrees(source, contents) else pyav
    except VideoError:
        return pyav


def stream_of(decoder: str) -> int | None:
    """Return the place of the video stream in the file that `choose` has named."""
    return int(decoder.partition(":")[2]) if ":" in decoder else None


def _is_proven(contents: Contents) -> bool:
    codecs = next((codecs for name, codecs in PROVEN.items() if contents.container.startswith(name)), ())
    ordered = not contents.reordered or contents.codec in REORDERED
    turned = any(contents.turn)
    upright = not turned or (contents.turn.is_rotation and contents.container.startswith(ROTATING))
    in_order = ordered and not contents.open_groups and not contents.decoded
    return contents.codec in codecs and contents.plain and in_order and upright


def _agrees(path: str, contents: Contents) -> bool:
    """Return whether decord finds the same times, and in a few groups the same pictures; decode the last frame, too."""
    starts_N, (width, height) = contents.starts_N, contents.display_size
    small = SHORT_SIDE / min(width, height)
    size = max(1, round(width * small)), max(1, round(height * small))
    compared_U = _compared(contents)
    # The frames before and after show whether a picture that is alike is the right one.
    near_U = np.unique(np.clip(compared_U[:, None] + np.arange(-1, 2), 0, len(starts_N) - 1))
    with closing(DecordReader(path, *size)) as decord:
        if not _same_times(decord.starts_N, starts_N):
            return False
        *found, _ = decord.read(starts_N[np.append(compared_U, len(starts_N) - 1)])
        # After the last frame, decord has to seek for this one.
        found += decord.read(starts_N[compared_U[-1:]])
    with closing(PyAVReader(path, size, contents.stream)) as pyav:
        right = dict(zip(near_U.tolist(), pyav.read(starts_N[near_U]), strict=True))
    pictures = zip(found, [*compared_U, compared_U[-1]], strict=True)
    return all(_is_right(picture, int(index), right) for picture, index in pictures)


def _is_right(picture_HWC: FrameArray, index: int, right: dict[int, FrameArray]) -> bool:
    """Return whether a picture is the right one of a frame, and not that of the frame before or after."""
    around = [at for at in (index - 1, index, index + 1) if at in right]
    differences = {at: float(np.abs(picture_HWC.astype(np.int16) - right[at]).mean()) for at in around}
    return differences[index] <= min(ALIKE, min(differences.values()) + NEAR)


def _compared(contents: Contents) -> IntArray:
    """Return the indices (U,), ascending, of frames at random places of the first and of random groups of pictures."""
    count = len(contents.starts_N)
    rng = np.random.default_rng(count)
    keys = np.searchsorted(contents.starts_N, [0.0, *contents.keys], side="left")
    chosen = np.append(rng.choice(keys, COMPARED - 1), keys[0])
    indices: IntArray = np.unique(np.minimum(chosen + rng.integers(1, DEPTH, COMPARED), count - 1))
    return indices


def _same_times(found_N: FloatArray, starts_N: FloatArray) -> bool:
    if len(found_N) != len(starts_N):
        return False
    shortest_s = float(np.diff(starts_N).min()) if len(starts_N) > 1 else TIMES_S
    allowed_s = min(TIMES_S, shortest_s / 4) if shortest_s else TIMES_S
    return bool(np.abs(found_N - starts_N).max() <= allowed_s)
