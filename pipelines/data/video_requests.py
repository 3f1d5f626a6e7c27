"""What a decode task and its child process send each other: a video and what is wanted of it, and the reply."""

from __future__ import annotations

from dataclasses import dataclass, field

from s5.video.reader import FloatArray
from s5.video.reading import Decoder, VideoFacts


@dataclass(frozen=True)
class Clips:
    """What is read of a video: the arguments of `s5.video.reading.read_clips`."""

    clips: list[FloatArray]
    size: int
    display_size: tuple[int, int] | None
    decoder: Decoder | None


@dataclass(frozen=True)
class Encoding:
    """How and where to a video is encoded."""

    path: str
    """Local file to write."""
    short_side: int
    """Short side in pixels at most; an even number."""
    gop_s: float
    """Seconds between two key frames."""
    quality: int
    """Constant rate factor of libx264."""
    speed: str
    """Preset of libx264."""
    fps: float
    """Mean frame rate of the video."""
    num_frames: int
    """Frames of the video."""


@dataclass(frozen=True)
class VideoRequest:
    """A video, and what is done with it: its clips are read, it is re-encoded, or None for its facts."""

    uri: str
    work: Clips | Encoding | None
    timeout_s: float


@dataclass(frozen=True)
class VideoReply:
    """What the child found: facts, the shapes of the clips, or the reason why there are neither."""

    facts: VideoFacts | None = None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    reason: str = ""
    unwritable: str = ""
    """Why the new video cannot be written: no fault of the old one."""
