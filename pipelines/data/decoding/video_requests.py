"""What a decode task and its child process send each other: a request about one video, and the reply."""

from __future__ import annotations

from dataclasses import dataclass, field

from s5.video.crops import Box
from s5.video.reader import FloatArray
from s5.video.reading import Decoder, VideoFacts


@dataclass(frozen=True)
class ClipRequest:
    """Read clips of a video: the arguments of `s5.video.reading.read_clips`."""

    clips: list[FloatArray]
    size: int
    display_size: tuple[int, int] | None
    decoder: Decoder | None
    boxes: list[Box] = field(default_factory=list)


@dataclass(frozen=True)
class FramesRequest:
    """Read frames of a video that stays open for later ones: the arguments of `s5.video.reading.SquareReader`."""

    times_F: FloatArray
    size: int
    display_size: tuple[int, int]
    decoder: Decoder


@dataclass(frozen=True)
class EncodeRequest:
    """Re-encode a video: how, and to which file."""

    path: str
    """Local file to write."""
    short_side: int
    """Longest short side in pixels; an even number."""
    gop_s: float
    """Seconds between two key frames."""
    quality: int
    """Constant rate factor (CRF) of libx264."""
    speed: str
    """Preset of libx264."""
    fps: float
    """Mean frame rate of the video."""
    num_frames: int
    """Frames of the video."""


@dataclass(frozen=True)
class VideoRequest:
    """A video and what to do with it: read clips or frames, re-encode it, or probe it (None)."""

    uri: str
    work: ClipRequest | FramesRequest | EncodeRequest | None
    timeout_s: float


@dataclass(frozen=True)
class VideoReply:
    """The result: facts of the video, the shapes of the clips, or the reason why there are neither."""

    facts: VideoFacts | None = None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    reason: str = ""
    unwritable: str = ""
    """Why the new video cannot be written, which is no fault of the old one."""
