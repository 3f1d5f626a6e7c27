"""Probe a video, and read its frames at given times; errors say what is wrong with it.

decord reads the files for which it returns the right frames, PyAV the rest (`choice`). A frame is on screen from its
presentation time until that of the next; times are seconds after the first frame, wherever the container's clock
starts. Sizes are as displayed: after rotation, with square pixels.

Shapes: T frames of a clip, U times of all clips, S height and width of a frame in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from s5.errors import VideoError
from s5.video.choice import choose, stream_of
from s5.video.containers.scan import scan
from s5.video.crops import Box
from s5.video.decord_reader import DecordReader
from s5.video.pyav_reader import PyAVReader
from s5.video.reader import FloatArray as FloatArray
from s5.video.reader import FrameArray as FrameArray
from s5.video.reader import Reader, Source

Decoder = str
"""`decord`, `pyav`, or `pyav:N` for stream N of a file with several video streams (`choice.choose`)."""


@dataclass(frozen=True)
class VideoFacts:
    """Facts of a video: length in seconds, mean frame rate, display size in pixels, codec, and its decoder."""

    duration_s: float
    fps: float
    num_frames: int
    width: int
    height: int
    codec: str
    decoder: Decoder


def probe(source: Source) -> VideoFacts:
    """Return the facts of a video after reading all its packets and decoding a few of its frames, the last one too.

    Raises:
        VideoError: it is missing, empty, truncated, not a video, has no video stream or no frames, or a frame fails to
            decode.
    """
    source = checked(source)
    contents = scan(source)
    starts_N, size = contents.starts_N, contents.display_size
    decoder = choose(source, contents)
    if decoder != "decord" and not contents.decoded:
        with closing(_opened(source, decoder, size)) as reader:
            reader.read(starts_N[[0, len(starts_N) // 2, -1]])
    # The last frame stays on screen for as long as a frame does on average.
    shown_s, count = float(starts_N[-1]), len(starts_N)
    if shown_s == 0 and not contents.rate:
        raise VideoError("the file has neither times of the frames nor a frame rate")
    duration_s = shown_s * count / (count - 1) if shown_s else count / contents.rate
    return VideoFacts(duration_s, count / duration_s, count, *size, contents.codec, decoder)


def read_frames(source: Source, times_T: FloatArray, size: int) -> FrameArray:
    """Return the frames on screen at the given times, (T, S, S, 3) uint8 RGB; see `read_clips`."""
    return read_clips(source, [times_T], size)[0]


def read_clips(
    source: Source,
    clips: Sequence[FloatArray],
    size: int,
    display_size: tuple[int, int] | None = None,
    decoder: Decoder | None = None,
    boxes: Sequence[Box] = (),
) -> list[FrameArray]:
    """Return several clips of one video from one open and one ascending pass over all their frames.

    A frame is scaled so that its short side has S pixels, with its aspect ratio, and cropped to S x S at the centre; or
    a box is cut out of it and scaled to S x S. A time takes the frame that is on screen then; times beyond the end take
    the last frame.

    Args:
        source: a local file, or an open file, which PyAV reads.
        clips: times (T,) in seconds of each clip, in any order; T may differ between clips.
        size: S in pixels.
        display_size: width and height of the video, if known (`VideoFacts`).
        decoder: which decoder reads the video, if known (`VideoFacts`). If either is unknown, all packets of the file
            are read first. PyAV takes over where decord fails, and reads all boxes: it cuts them out before it converts
            colours, which decord cannot.
        boxes: of each clip, the part of its frames that it shows, in pixels as displayed; none for the centre.

    Returns:
        For each clip its frames (T, S, S, 3), uint8 RGB.

    Raises:
        VideoError: the file cannot be opened or a frame fails to decode.
    """
    source = checked(source)
    if display_size is None or decoder is None:
        contents = scan(source)
        display_size, decoder = contents.display_size, choose(source, contents)
    if boxes:
        return _read_boxes(source, stream_of(decoder), clips, boxes, size)
    times_U = np.unique(np.concatenate(clips))
    with closing(SquareReader(source, size, display_size, decoder)) as reader:
        square = reader.read(times_U)
    return [np.stack([square[place] for place in np.searchsorted(times_U, times_T)]) for times_T in clips]


class SquareReader:
    """A `Reader` of one video as a model sees it, scaled and cropped as in `read_clips`; times ascend over all calls.

    Args:
        source: a local file, or an open file, which PyAV reads.
        size: S in pixels.
        display_size: width and height of the video (`VideoFacts`).
        decoder: which decoder reads the video (`VideoFacts`); PyAV takes over where decord fails.
    """

    def __init__(self, source: Source, size: int, display_size: tuple[int, int], decoder: Decoder) -> None:
        self._source, self._size, self._decoder = checked(source), size, decoder
        self._scaled = scaled(display_size, size)
        self._reader: Reader | None = None

    def read(self, times_U: FloatArray) -> list[FrameArray]:
        """Return the pictures (S, S, 3); see `Reader`."""
        try:
            frames = self._opened().read(times_U)
        except VideoError:
            if self._decoder != "decord":
                raise
            self.close()
            self._decoder = "pyav"
            frames = self._opened().read(times_U)
        width, height = self._scaled
        top, left = (height - self._size) // 2, (width - self._size) // 2
        return [frame[top : top + self._size, left : left + self._size] for frame in frames]

    def close(self) -> None:
        """Close the file and free the decoder."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _opened(self) -> Reader:
        if self._reader is None:
            self._reader = _opened(self._source, self._decoder, self._scaled)
        return self._reader


def scaled(display_size: tuple[int, int], size: int) -> tuple[int, int]:
    """Return the width and height to decode at: the short side is `size`, the aspect ratio is preserved."""
    width, height = display_size
    if width < height:
        return size, max(size, round(size * height / width))
    return max(size, round(size * width / height)), size


def _opened(source: Source, decoder: Decoder, size: tuple[int, int]) -> Reader:
    if decoder == "decord" and isinstance(source, str):
        return DecordReader(source, *size)
    return PyAVReader(source, size, stream_of(decoder))


def _read_boxes(
    source: Source, stream: int | None, clips: Sequence[FloatArray], boxes: Sequence[Box], size: int
) -> list[FrameArray]:
    frames = [np.empty((len(times_T), size, size, 3), np.uint8) for times_T in clips]
    wanted = [(time, clip, place) for clip, times_T in enumerate(clips) for place, time in enumerate(times_T.tolist())]
    with closing(PyAVReader(source, stream=stream)) as reader:
        croppers = [reader.cropper(box, size) for box in boxes]
        for time, clip, place in sorted(wanted):
            frames[clip][place] = reader.crop(time, croppers[clip])
    return frames


def checked(source: Source) -> Source:
    """Return a source with a local path made absolute: FFmpeg would take `a:b.mp4` for a URL of protocol `a`.

    Raises:
        VideoError: there is no file of that name, or it is empty or may not be read.
    """
    if not isinstance(source, str):
        return source
    if not os.path.isfile(source):
        raise VideoError("a folder, not a file" if os.path.isdir(source) else "file not found")
    if os.path.getsize(source) == 0:
        raise VideoError("file is empty (0 bytes)")
    if not os.access(source, os.R_OK):
        raise VideoError("no permission to read the file")
    return os.path.abspath(source)
