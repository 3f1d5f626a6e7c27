"""How a decoded frame is displayed: turned or mirrored as its display matrix says, with square pixels.

Shapes: H height and W width of a picture in pixels.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from s5.video.reader import FrameArray

MAX_PIXEL_ASPECT = 4
"""A pixel aspect ratio beyond this is taken for an error in the file; pixels then count as square."""


class Turn(NamedTuple):
    """How a stored picture becomes the displayed one: transposed first, then mirrored."""

    transposed: bool = False
    right_left: bool = False
    upside_down: bool = False

    @property
    def is_rotation(self) -> bool:
        """Whether nothing is mirrored."""
        return (self.transposed + self.right_left + self.upside_down) % 2 == 0

    def applied(self, picture_HWC: FrameArray) -> FrameArray:
        """Return the displayed picture, a view."""
        shown = np.swapaxes(picture_HWC, 0, 1) if self.transposed else picture_HWC
        return shown[:: -1 if self.upside_down else 1, :: -1 if self.right_left else 1]


def turn_of(frame: Any) -> Turn:
    """Return how a frame is turned, to the nearest quarter: its display matrix (ISO 14496-12, 8.3.2 and 6.2.2)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Turn()
    # A point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = struct.unpack("=9i", bytes(data))[:5]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Turn(False, a < 0, d < 0)
    return Turn(True, c < 0, b < 0)


def display_size(frame: Any, aspect: Fraction | None, turn: Turn) -> tuple[int, int]:
    """Return the width and height on screen of a frame whose pixels have an aspect ratio."""
    width, height = max(1, round(frame.width * _pixel_aspect(aspect))), frame.height
    return (height, width) if turn.transposed else (width, height)


def aspect_of(frame: Any, aspect: Fraction | None) -> float:
    """Return the width of a stored frame over its height, of square pixels."""
    return float(frame.width * _pixel_aspect(aspect) / frame.height)


def _pixel_aspect(aspect: Fraction | None) -> Fraction:
    return aspect if aspect and 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else Fraction(1)
