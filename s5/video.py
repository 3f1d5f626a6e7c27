"""Open a video, read the frames at given times, say what is wrong with it.

Shapes: T frames of a clip, S height and width of a frame in pixels. Times are seconds after the first frame.
Decoding is decord's, with one thread: 2 threads gain 6-21 % for twice the cores, so parallelism is over videos.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
FrameArray = npt.NDArray[np.uint8]

# decord 0.6 takes a frame for four-channel when its padded row is four times as many bytes as it is wide, and fails.
# Rows are padded by less than 64 bytes and to a multiple of at least 4, so widths of 64 or more and odd ones are safe.
SAFE_WIDTH = 64


class VideoError(Exception):
    """A video that cannot be read; `reason` says why in one sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Failure:
    """A video that could not be read, and why."""

    video_id: str
    uri: str
    reason: str


@dataclass(frozen=True)
class VideoFacts:
    """What a video is: display size in pixels (after rotation), length in seconds, mean frame rate, codec."""

    duration_s: float
    fps: float
    num_frames: int
    width: int
    height: int
    codec: str


def probe(path: str) -> VideoFacts:
    """Return the facts of a video after decoding its first, middle and last frame.

    Raises:
        VideoError: it is missing, empty, not a video, has no video stream or no frames, or a frame fails to decode.
    """
    codec = _codec(path)
    reader = _open(path, codec)
    starts_N, _ = frame_times(reader, path)
    num_frames = len(starts_N)
    height, width = (_frame(reader, 0, "first").shape)[:2]
    _frame(reader, num_frames // 2, "middle")
    _frame(reader, num_frames - 1, "last")
    # The last frame stays on screen for as long as a frame does on average.
    shown = float(starts_N[-1])
    duration_s = shown * num_frames / (num_frames - 1) if num_frames > 1 else 1 / _rate(reader)
    return VideoFacts(duration_s, num_frames / duration_s, num_frames, int(width), int(height), codec)


def read_frames(path: str, times_T: FloatArray, size: int, display_size: tuple[int, int] | None = None) -> FrameArray:
    """Return the frames on screen at the given times, (T, S, S, 3) uint8 RGB; see `read_clips`."""
    return read_clips(path, [times_T], size, display_size)[0]


def read_clips(
    path: str, clips: Sequence[FloatArray], size: int, display_size: tuple[int, int] | None = None
) -> list[FrameArray]:
    """Return several clips of one video from one open and one ascending pass over all their frames.

    A frame is scaled so that its short side has S pixels, with its aspect ratio, and cropped to S x S at the centre.
    A time takes the frame that is on screen then; times beyond the end take the last frame.

    Args:
        path: a local file.
        clips: times (T,) in seconds of each clip, in any order; T may differ between clips.
        size: S in pixels.
        display_size: width and height of the video where they are known (`VideoFacts`), which saves a second open.

    Returns:
        For each clip its frames (T, S, S, 3), uint8 RGB.

    Raises:
        VideoError: the file cannot be opened or a frame fails to decode.
    """
    check_file(path)
    if display_size is None:
        height, width = _frame(_open(path, ""), 0, "first").shape[:2]
        display_size = int(width), int(height)
    width, height = scaled(display_size, size)
    reader = _open(path, "", width, height)
    starts_N, seekable = frame_times(reader, path)
    indices = [frame_indices(starts_N, times_T) for times_T in clips]
    union_U = np.unique(np.concatenate(indices))
    try:
        frames_UHWC = reader.get_batch(union_U).asnumpy() if seekable else _in_sequence(reader, union_U)
    except _decode_errors() as error:
        raise VideoError(f"frames {union_U[0]} to {union_U[-1]} fail to decode{_telling(error)}") from None
    top, left = (height - size) // 2, (width - size) // 2
    square_USSC = frames_UHWC[:, top : top + size, left : left + size]
    return [square_USSC[np.searchsorted(union_U, indices_T)] for indices_T in indices]


def _in_sequence(reader: Any, indices_U: IntArray) -> FrameArray:
    """Return frames (U, H, W, 3) of ascending indices, decoding all from the first on: skipping misses some too."""
    wanted = set(indices_U.tolist())
    frames = ((index, reader.next()) for index in range(int(indices_U[-1]) + 1))
    return np.stack([frame.asnumpy() for index, frame in frames if index in wanted])


def scaled(display_size: tuple[int, int], size: int) -> tuple[int, int]:
    """Return the width and height to decode at: short side `size`, aspect ratio kept, a width that decord can do."""
    width, height = display_size
    if width < height:
        scaled_width, scaled_height = size, max(size, round(size * height / width))
    else:
        scaled_width, scaled_height = max(size, round(size * width / height)), size
    return (scaled_width | 1 if scaled_width < SAFE_WIDTH else scaled_width), scaled_height


def frame_times(reader: Any, path: str) -> tuple[FloatArray, bool]:
    """Return when each frame of an open video comes on screen, and whether decord can seek in it.

    Where decord has no times (Matroska of a variable rate, MPEG programme streams, some AVI files), they are those of
    the packets or, where these have none, at a constant rate; decord's seeking misses frames in such files.

    Returns:
        Ascending times (N,) in seconds after the first frame, and whether seeking finds the right frame.
    """
    num_frames = len(reader)
    starts_N = np.asarray(reader.get_frame_timestamp(np.arange(num_frames)), dtype=np.float64)[:, 0]
    if _are_times(starts_N):
        return starts_N - starts_N[0], True
    starts_N = _packet_times(path)
    if len(starts_N) != num_frames or not _are_times(starts_N):
        starts_N = np.arange(num_frames) / _rate(reader)
    return starts_N - starts_N[0], False


def _are_times(starts_N: FloatArray) -> bool:
    # Unset times come out as millions of years.
    return len(starts_N) > 0 and bool(np.all(np.diff(starts_N) >= 0) and np.all(np.abs(starts_N) < 1e6))


def _packet_times(path: str) -> FloatArray:
    """Return the times (N,) of the packets of the first video stream in seconds, sorted; empty where one has none."""
    import av

    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            times = [packet.pts for packet in container.demux(stream) if packet.size]
    except av.FFmpegError as error:
        raise VideoError(f"not a video file, or a truncated one ({error.strerror})") from None
    if any(pts is None for pts in times):
        return np.empty(0)
    return np.sort(np.array(times, dtype=np.float64)) * float(stream.time_base or 0)


def frame_indices(starts_N: FloatArray, times_T: FloatArray) -> IntArray:
    """Return the indices (T,) of the frames on screen at the given times, for frames that start at `starts_N`."""
    # Frame times are stored in float32 and whole ticks: a time that equals one must not fall on the frame before.
    shown_T = np.searchsorted(starts_N, times_T + 1e-3, side="right") - 1
    return np.clip(shown_T, 0, len(starts_N) - 1).astype(np.int64)


def check_file(path: str) -> None:
    """Raise `VideoError` unless there is a file with something in it."""
    if not os.path.isfile(path):
        raise VideoError("file not found")
    if os.path.getsize(path) == 0:
        raise VideoError("file is empty (0 bytes)")


def _codec(path: str) -> str:
    """Return the codec of the first video stream."""
    import av

    check_file(path)
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise VideoError("no video stream in the file")
            return str(container.streams.video[0].codec_context.codec.canonical_name)
    except av.FFmpegError as error:
        raise VideoError(f"not a video file, or a truncated one ({error.strerror})") from None


def _open(path: str, codec: str, width: int = -1, height: int = -1) -> Any:
    """Return a decord reader with at least one frame."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(path, width=width, height=height, num_threads=1)
    except _decode_errors() as error:
        of_codec = f" of codec {codec}" if codec else ""
        raise VideoError(f"the decoder cannot open the video{of_codec}{_telling(error)}") from None
    if len(reader) == 0:
        raise VideoError("no frames in the video stream")
    return reader


def _frame(reader: Any, index: int, name: str) -> FrameArray:
    """Return one frame, (H, W, 3)."""
    try:
        frame: FrameArray = reader.get_batch([index]).asnumpy()[0]
    except _decode_errors() as error:
        raise VideoError(f"the {name} frame (number {index}) fails to decode{_telling(error)}") from None
    return frame


def _rate(reader: Any) -> float:
    fps = float(reader.get_avg_fps())
    if not (np.isfinite(fps) and fps > 0):
        raise VideoError(f"the frame rate is {fps}")
    return fps


def _decode_errors() -> tuple[type[Exception], ...]:
    """Return what decord raises; most of its native errors are DECORDError, which is no RuntimeError."""
    import decord

    return decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, IndexError, StopIteration, OSError


def _telling(error: Exception) -> str:
    """Return the telling part of a decoder's error, which comes with source lines and a native stack."""
    first = str(error).strip().partition("\n")[0].rpartition(": ")[2][:120].rstrip(".")
    return f": {first}" if any(c.isalpha() for c in first) else ""
