"""Read videos with decord, on one thread: a second one gains only 6-21 %, so videos are read in parallel instead."""

from __future__ import annotations

from typing import Any

import numpy as np

from s5.errors import VideoError
from s5.video.reader import FloatArray, FrameArray, frame_indices

# decord 0.6 mistakes a frame for a four-channel one, and fails, if its padded row has four times as many bytes as the
# frame is wide. Padding is below 64 bytes and rounds up to a multiple of at least 4, so odd widths and widths of 64 or
# more are safe.
SAFE_WIDTH = 64


class DecordReader:
    """A video opened by decord, with `starts_N`: when each frame comes on screen, in seconds after the first.

    Raises:
        VideoError: decord cannot open it, finds no frames or has no times for them.
    """

    def __init__(self, path: str, width: int, height: int) -> None:
        try:
            import decord
        except ModuleNotFoundError:
            # decord has wheels for x86-64 only; PyAV reads the same files.
            raise VideoError("decord is not installed") from None

        decord.logging.set_level(decord.logging.QUIET)
        self._cut = width
        width = width | 1 if width < SAFE_WIDTH else width
        try:
            self._reader: Any = decord.VideoReader(path, width=width, height=height, num_threads=1)
            times_N = np.asarray(self._reader.get_frame_timestamp(np.arange(len(self._reader))), np.float64)[:, 0]
        except _errors() as error:
            raise VideoError(f"decord cannot open the video{_short_reason(error)}") from None
        # Unset times come out as millions of years.
        if len(times_N) == 0 or np.any(np.diff(times_N) < 0) or np.any(np.abs(times_N) > 1e6):
            raise VideoError("decord finds no frames, or no times for them")
        self.starts_N: FloatArray = times_N - times_N[0]

    def read(self, times_U: FloatArray) -> list[FrameArray]:
        """Return the pictures at ascending times; see `Reader`."""
        indices_U = frame_indices(self.starts_N, times_U)
        union_V = np.unique(indices_U)
        try:
            frames_VHWC: FrameArray = self._reader.get_batch(union_V).asnumpy()[:, :, : self._cut]
        except _errors() as error:
            raise VideoError(f"frames {union_V[0]} to {union_V[-1]} fail to decode{_short_reason(error)}") from None
        return [frames_VHWC[place] for place in np.searchsorted(union_V, indices_U)]

    def close(self) -> None:
        """Close the file and free the decoder."""
        self._reader = None


def _errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that decord raises; most native ones are DECORDError, which is no RuntimeError."""
    import decord

    return decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, IndexError, StopIteration, OSError


def _short_reason(error: Exception) -> str:
    """Return the message of a decord error without its source lines and native stack."""
    first = str(error).strip().partition("\n")[0].rpartition(": ")[2][:120].rstrip(".")
    return f": {first}" if any(c.isalpha() for c in first) else ""
