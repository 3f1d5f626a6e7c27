"""Random resized crops: which part of a video's picture a clip shows, and cutting it out of decoded frames.

A crop is cut out before frames are scaled and converted to RGB, so that it costs no more than a centre crop.

Shapes: S height and width of a cropped frame in pixels.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from s5.errors import VideoError
from s5.video.containers.opening import av_error, short_reason
from s5.video.pictures import Turn
from s5.video.reader import FrameArray

ATTEMPTS = 10
"""Boxes drawn until one fits the picture."""
SMALLEST = 4
"""Least width and height of a stored box in pixels: a crop starts and ends between samples of colour, which some
formats have for every fourth pixel alone."""


class Box(NamedTuple):
    """A part of a picture as it is displayed, in pixels."""

    left: int
    top: int
    width: int
    height: int


def random_box(
    display_size: tuple[int, int], scale: tuple[float, ...], ratio: tuple[float, ...], rng: np.random.Generator
) -> Box:
    """Return the box of a random resized crop (Inception crop, arXiv 1409.4842), drawn as torchvision draws it.

    Area and aspect ratio are drawn until the box fits into the picture; if none does, it is the largest one at the
    centre whose aspect ratio is allowed.

    Args:
        display_size: width and height of the picture.
        scale: smallest and largest share of its area, drawn uniformly.
        ratio: smallest and largest width over height, drawn uniformly in the logarithm.
        rng: draws the numbers.
    """
    (width, height), (smallest, largest), (narrow, broad) = display_size, scale, ratio
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(smallest, largest)
        aspect = math.exp(rng.uniform(math.log(narrow), math.log(broad)))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
            return Box(left, top, wide, high)
    wide = min(width, max(1, round(height * broad)))
    high = min(height, max(1, round(width / narrow)))
    return Box((width - wide) // 2, (height - high) // 2, wide, high)


class Cropper:
    """Cuts a box out of PyAV's frames, scales it to (S, S) and displays it as the video says.

    Args:
        box: what to cut out.
        display_size: width and height of the picture that the box is a part of.
        turn: how stored pictures are turned.
        size: S.
    """

    def __init__(self, box: Box, display_size: tuple[int, int], turn: Turn, size: int) -> None:
        self._turn, self._size = turn, size
        self._box, self._of = stored_box(box, display_size, turn)
        self._graph: tuple[Any, Any] | None = None
        self._picture: tuple[Any, FrameArray] | None = None

    def __call__(self, frame: Any) -> FrameArray:
        """Return the picture (S, S, 3), uint8 RGB.

        Raises:
            VideoError: the frame has a format that cannot be cropped.
        """
        if self._picture is None or self._picture[0] is not frame:
            key = frame.width, frame.height, frame.format.name
            try:
                if self._graph is None or self._graph[0] != key:
                    self._graph = key, self._built(frame)
                self._graph[1].push(frame)
                picture_HWC: FrameArray = self._graph[1].pull().to_ndarray()
            except av_error() as error:
                raise VideoError(f"frames of format {key[2]} cannot be cropped{short_reason(error)}") from None
            self._picture = frame, self._turn.applied(picture_HWC)
        return self._picture[1]

    def _built(self, frame: Any) -> Any:
        import av.filter

        left, width = _along(self._box.left, self._box.width, self._of[0], frame.width)
        top, height = _along(self._box.top, self._box.height, self._of[1], frame.height)
        graph = av.filter.Graph()
        chain = [
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base),
            graph.add("crop", f"{width}:{height}:{left}:{top}:threads=1"),
            # Bilinear, as the readers scale whole pictures.
            graph.add("scale", f"{self._size}:{self._size}:flags=bilinear:threads=1"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        ]
        for first, second in itertools.pairwise(chain):
            first.link_to(second)
        graph.configure()
        return graph


def stored_box(box: Box, display_size: tuple[int, int], turn: Turn) -> tuple[Box, tuple[int, int]]:
    """Return a displayed box, and the size of the picture that it is a part of, as they were before a turn."""
    (width, height), (left, top, wide, high) = display_size, box
    left = width - left - wide if turn.right_left else left
    top = height - top - high if turn.upside_down else top
    if turn.transposed:
        return Box(top, left, high, wide), (height, width)
    return Box(left, top, wide, high), (width, height)


def _along(start: int, length: int, whole: int, stored: int) -> tuple[int, int]:
    """Return start and length of a box along one side, of as many pixels as are stored for the `whole` one."""
    first, last = round(start * stored / whole), round((start + length) * stored / whole)
    taken = min(stored, max(SMALLEST, last - first))
    return min(first, stored - taken), taken
