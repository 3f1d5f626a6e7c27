"""See what S5 looks at: a video with the tokens dimmed that its first block drops, and frames for a contact sheet.

Tokens are known for the frames of the model's clips; in between, those of the frame before count. Around the square
that the model sees, the picture is as dark as dropped tokens are.

Shapes: F frames with known tokens, M moments, R and Q rows and columns of a frame's tokens, H and W height and width of
a picture, S of the frames that the model sees, in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import numpy.typing as npt

from pipelines.data.decoding.encoding import fitted, write_pictures
from pipelines.data.decoding.video_requests import EncodeRequest
from s5.evaluation.prediction import KeptTokens
from s5.video.choice import stream_of
from s5.video.pyav_reader import PyAVReader
from s5.video.reader import TOLERANCE_S, FloatArray, FrameArray, IntArray, Source
from s5.video.reading import SquareReader, VideoFacts, checked

DIMMED = 0.25
"""Brightness of a token that no clip keeps."""
SHORT_SIDE, GOP_S, QUALITY = 480, 2.0, 23
MOMENTS = 24
"""Frames of a contact sheet, at most."""


def write_overlay(source: Source, facts: VideoFacts, kept: KeptTokens, path: str) -> None:
    """Write a video whose dropped tokens are dimmed, as H.264 in mp4 without sound.

    Raises:
        VideoError: the video cannot be read to its end.
        OSError: the file cannot be written.
    """
    with closing(PyAVReader(checked(source), stream=stream_of(facts.decoder))) as reader:
        size = fitted(reader.display_size, SHORT_SIDE)
        reader.resize(size)
        encoding = EncodeRequest(path, SHORT_SIDE, GOP_S, QUALITY, "veryfast", facts.fps, facts.num_frames)
        write_pictures(encoding, size, reader.time_base, _dimmed(reader, kept, size))


def _dimmed(reader: PyAVReader, kept: KeptTokens, size: tuple[int, int]) -> Iterator[tuple[int, FrameArray]]:
    last, light_HW1 = -1, np.ones((1, 1, 1), np.float32)
    for tick, picture_HWC in reader.pictures():
        place = int(np.searchsorted(kept.times_F, tick * reader.time_base + TOLERANCE_S, side="right")) - 1
        if (place := max(0, place)) != last:
            last, light_HW1 = place, light(kept.share_FRQ[place], size)
        yield tick, (picture_HWC * light_HW1).astype(np.uint8)


def light(share_RQ: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Return the brightness (H, W, 1) of a picture of a width and height, whose central square has these tokens."""
    width, height = size
    side = min(size)
    rows, columns = (np.arange(side) * count // side for count in share_RQ.shape)
    light_HW = np.full((height, width), DIMMED, np.float32)
    top, left = (height - side) // 2, (width - side) // 2
    light_HW[top : top + side, left : left + side] += (1 - DIMMED) * share_RQ[rows][:, columns]
    return light_HW[..., None]


def most_kept(kept: KeptTokens, moments: int = MOMENTS) -> IntArray:
    """Return the places (M,), ascending, of the frame with most tokens kept in each of M equal stretches of time."""
    times_F, share_F = kept.times_F, kept.share_FRQ.mean((1, 2))
    count = min(moments, len(times_F))
    length = max(float(times_F[-1] - times_F[0]), TOLERANCE_S)
    stretch_F = np.minimum((times_F - times_F[0]) * count // length, count - 1)
    places = [np.flatnonzero(stretch_F == stretch) for stretch in np.unique(stretch_F)]
    return np.array([place[np.argmax(share_F[place])] for place in places], np.int64)


def dimmed_frames(source: Source, facts: VideoFacts, kept: KeptTokens, places_M: IntArray, size: int) -> FrameArray:
    """Return the frames (M, S, S, 3) at some places of the kept tokens, as the model sees them, with others dimmed.

    Raises:
        VideoError: a frame cannot be read.
    """
    times_M: FloatArray = kept.times_F[places_M]
    with closing(SquareReader(source, size, (facts.width, facts.height), facts.decoder)) as reader:
        frames = reader.read(times_M)
    lit = [
        (frame * light(kept.share_FRQ[place], (size, size))).astype(np.uint8)
        for frame, place in zip(frames, places_M, strict=True)
    ]
    return np.stack(lit)
