"""What the decoders have in common: their interface, and which frame is on screen at a time.

Shapes: N frames of a video, U times in ascending order, H height and W width of a picture in pixels.
"""

from __future__ import annotations

from typing import IO, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
FrameArray = npt.NDArray[np.uint8]
Source = str | IO[bytes]
"""A local path, or an open seekable file."""

TOLERANCE_S = 1e-3
"""Frame times are rounded (float32, whole ticks); a requested time that equals one must not yield the frame before."""
TOLERANCE_SHARE = 0.25
"""Largest tolerance as a share of the time for which the frame before is on screen: frames may last a millisecond."""


class Reader(Protocol):
    """An open video that returns pictures of one size."""

    def read(self, times_U: FloatArray) -> list[FrameArray]:
        """Return the pictures (H, W, 3), uint8 RGB, on screen at ascending times in seconds after the first frame.

        Raises:
            VideoError: a frame fails to decode.
        """

    def close(self) -> None:
        """Close the file and free the decoder."""


def tolerance(length_s: float) -> float:
    """Return by how many seconds a requested time may miss the start of a frame; the one before lasts `length_s`."""
    return min(TOLERANCE_S, TOLERANCE_SHARE * length_s)


def frame_indices(starts_N: FloatArray, times_U: FloatArray) -> IntArray:
    """Return the indices (U,) of the frames on screen at the given times, for frames that start at `starts_N`."""
    early_N = starts_N - np.minimum(TOLERANCE_S, TOLERANCE_SHARE * np.diff(starts_N, prepend=starts_N[:1]))
    shown_U = np.searchsorted(early_N, times_U, side="right") - 1
    return np.clip(shown_U, 0, len(starts_N) - 1).astype(np.int64)
