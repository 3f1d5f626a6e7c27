"""Draw and encode one video of the sample data set: a pure function of its plan.

Handwritten digits (scikit-learn) are the objects of the steps. Positions, speeds, sizes and backgrounds are drawn from
the plan's seed, so the bytes do not depend on who renders the video or after which other one.
"""

from __future__ import annotations

import colorsys
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

Frames = NDArray[np.uint8]
"""uint8 [T, H, W, 3], RGB."""

# `ultrafast` is not for speed alone: slower presets look ahead at later frames, and x264's decisions there differ
# between runs (for 1 % of the videos of 64 pixels) and processors. With several threads, they depend on the cores too.
ENCODER = {"preset": "ultrafast", "crf": "28", "threads": "1"}

GOP_SECONDS = 8
"""Distance of key frames: seeking costs more than it saves in videos this small, and key frames are large."""

RENDERING_VERSION = 3
"""Part of every digest: raise it when the drawing changes, so that older files are rendered again."""

STEP_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven")
"""The stock of steps; step `i` shows the digit `i`."""

STEP_COLOURS = (
    (235, 45, 45),
    (50, 205, 60),
    (60, 90, 255),
    (240, 225, 40),
    (235, 60, 225),
    (40, 220, 230),
    (250, 140, 20),
    (250, 250, 250),
)
"""RGB of each step where the difficulty is `easy`."""

OBJECT_SIDES = {"easy": (0.36, 0.52), "hard": (0.28, 0.42)}
"""Smallest and largest side of an object, as a share of the frame's."""

# Digits of each split, by their index modulo 5: test videos show no handwriting from training.
HANDWRITING = {"train": (0, 1, 2), "val": (3,), "test": (4,)}


@dataclass(frozen=True)
class Stretch:
    """A segment of a video, half-open in frames: one step, or only a distractor (`step` is None)."""

    start: int
    """First frame."""
    end: int
    """Frame after the last."""
    step: int | None
    """Index into `STEP_NAMES`."""


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """Everything that determines the bytes of one video."""

    video_id: str
    """Name of the file without suffix."""
    class_name: str
    """Name of the activity."""
    label: int
    """Index of the activity in its class set."""
    split: Literal["train", "val", "test"]
    """Split; also decides which handwriting is shown."""
    stretches: tuple[Stretch, ...]
    """Consecutive stretches that cover the video."""
    difficulty: Literal["easy", "hard"]
    """Look of the video."""
    fps: int
    """Frames a second."""
    size: int
    """Height and width in pixels."""
    seed: tuple[int, ...]
    """Seed of the drawing."""

    @property
    def path(self) -> str:
        """Path below the data set's folder."""
        return f"{self.split}/{self.class_name}/{self.video_id}.mp4"

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.stretches[-1].end

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.frames / self.fps

    @property
    def digest(self) -> str:
        """Digest of the plan and the drawing's version; stored in the file."""
        plan = json.dumps({"look": RENDERING_VERSION, **dataclasses.asdict(self)}, sort_keys=True)
        return hashlib.sha256(plan.encode()).hexdigest()


def render_video(plan: VideoPlan) -> bytes:
    """Return the H.264 mp4 of a plan: yuv420p, a key frame a second, index at the front."""
    rng = np.random.default_rng(plan.seed)
    scene = Scene.draw(plan, rng)
    # The muxer reopens its output by name to move the index to the front, which needs a real file.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        with av.open(str(file), "w", options={"movflags": "faststart"}) as container:
            container.metadata["comment"] = plan.digest
            stream = container.add_stream("libx264", rate=plan.fps, options=ENCODER)
            stream.width = stream.height = plan.size
            stream.pix_fmt = "yuv420p"
            stream.codec_context.gop_size = GOP_SECONDS * plan.fps
            for stretch in plan.stretches:
                for frame in draw_stretch(plan, scene, stretch, rng):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        return file.read_bytes()


def stored_digest(file: Path) -> str | None:
    """Return the digest of the plan that a file was rendered from; None if there is no such file or no digest in it."""
    if not file.exists():
        return None
    try:
        with av.open(str(file)) as container:
            return container.metadata.get("comment")
    except av.FFmpegError:
        return None


# --- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Path1D:
    """Motion back and forth between 0 and `span` pixels at a constant speed."""

    span: int
    start: float
    speed: float
    """Pixels a frame."""

    def at(self, times: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position in whole pixels at each frame number."""
        if self.span == 0:
            return np.zeros(len(times), np.int64)
        phase = np.mod(self.start + self.speed * times, 2 * self.span)
        position: NDArray[np.float64] = self.span - np.abs(phase - self.span)
        return np.rint(position).astype(np.int64)

    @classmethod
    def draw(cls, span: int, speed: tuple[float, float], rng: np.random.Generator) -> Path1D:
        """Draw start, direction and speed (a range in pixels a frame)."""
        return cls(span, float(rng.uniform(0, 2 * span)), float(rng.uniform(*speed) * rng.choice([-1, 1])))


@dataclass(frozen=True)
class Scene:
    """Background of one video: a still picture that a slowly drifting camera looks at."""

    picture: Frames
    """uint8 [H, W, 3], at least as large as a frame."""
    y: Path1D
    x: Path1D

    @classmethod
    def draw(cls, plan: VideoPlan, rng: np.random.Generator) -> Scene:
        """Draw a plain grey (`easy`) or a part of a photograph (`hard`)."""
        if plan.difficulty == "easy":
            # Near the mean that frame encoders subtract: the background is about zero to them, and objects stand out.
            grey = rng.integers(95, 140) + rng.integers(-8, 9, size=3)
            picture = np.broadcast_to(grey.astype(np.uint8), (plan.size, plan.size, 3))
            return cls(picture, Path1D(0, 0, 0), Path1D(0, 0, 0))
        margin = plan.size // 2
        photo = photos()[rng.integers(2)]
        side = int(rng.integers(160, 401))
        top, left = int(rng.integers(photo.height - side)), int(rng.integers(photo.width - side))
        part = photo.resize((plan.size + margin,) * 2, Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        mirrored = np.asarray(part)[:, :: int(rng.choice([-1, 1]))]
        picture = (mirrored * rng.uniform(0.4, 1.0)).astype(np.uint8)
        speed = (0.01 * plan.size / plan.fps, 0.05 * plan.size / plan.fps)
        drift = [Path1D.draw(margin, speed, rng) for _ in range(2)]
        return cls(picture, *drift)

    def view(self, times: NDArray[np.int64], size: int) -> Frames:
        """Return uint8 [T, size, size, 3]: what the camera sees at each frame number."""
        windows = sliding_window_view(self.picture, (size, size), axis=(0, 1))
        return np.ascontiguousarray(windows[self.y.at(times), self.x.at(times)].transpose(0, 2, 3, 1))


class Moving(NamedTuple):
    """An object of a stretch: what it covers, its colour, and where its corner is at each frame."""

    mask: NDArray[np.float32]
    """[S, S], 0 to 1."""
    colour: NDArray[np.float32]
    """RGB [3], 0 to 255."""
    y: NDArray[np.int64]
    """Top [T], in pixels."""
    x: NDArray[np.int64]
    """Left [T], in pixels."""


def objects(plan: VideoPlan, stretch: Stretch, rng: np.random.Generator) -> Iterator[Moving]:
    """Draw the two or three moving digits, or distractors, of a stretch; take all before anything else is drawn."""
    times = np.arange(stretch.start, stretch.end)
    for _ in range(rng.integers(2, 4)):
        side = round(plan.size * rng.uniform(*OBJECT_SIDES[plan.difficulty]))
        mask = distractor(side, rng) if stretch.step is None else digit(stretch.step, plan.split, side, rng)
        speed = (0.04 * plan.size / plan.fps, 0.25 * plan.size / plan.fps)
        y, x = (Path1D.draw(plan.size - side, speed, rng).at(times) for _ in range(2))
        yield Moving(mask, object_colour(plan.difficulty, stretch.step, rng), y, x)


def draw_stretch(plan: VideoPlan, scene: Scene, stretch: Stretch, rng: np.random.Generator) -> Frames:
    """Return the frames of a stretch: the background with its objects."""
    frames = scene.view(np.arange(stretch.start, stretch.end), plan.size)
    for moving in objects(plan, stretch, rng):
        paste(frames, *moving)
    return frames


def step_pixels(plan: VideoPlan) -> NDArray[np.bool_]:
    """Return [T, H, W]: which pixels of a plan's video show an object of a step, more than the background behind it."""
    rng = np.random.default_rng(plan.seed)
    # What is drawn for the background comes first.
    Scene.draw(plan, rng)
    covered: Frames = np.zeros((plan.frames, plan.size, plan.size, 3), np.uint8)
    white = np.full(3, 255, np.float32)
    for stretch in plan.stretches:
        for moving in objects(plan, stretch, rng):
            if stretch.step is not None:
                paste(covered[stretch.start : stretch.end], *moving._replace(colour=white))
    return covered[..., 0] > 127


def paste(
    frames: Frames, mask: NDArray[np.float32], colour: NDArray[np.float32], y: NDArray[np.int64], x: NDArray[np.int64]
) -> None:
    """Blend a colour into every frame, in place, through a mask [S, S] in 0..1 whose corner lies at (y, x) [T]."""
    count, height, width, _ = frames.shape
    # Only pixels under the mask, in integers: most of the time of drawing is spent here.
    row, column = np.nonzero(mask)
    opacity = np.rint(mask[row, column, None] * 256).astype(np.uint16)
    added = (colour * opacity).astype(np.uint16)
    corner = (np.arange(count) * height + y) * width + x
    where = corner[:, None] + (row * width + column)
    pixels = frames.reshape(-1, 3)
    pixels[where] = ((pixels[where] * (256 - opacity) + added) >> 8).astype(np.uint8)


def object_colour(
    difficulty: Literal["easy", "hard"], step: int | None, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return RGB [3] in 0..255: the step's own or a free one; distractors are grey where steps have colours."""
    if difficulty == "hard":
        rgb: Any = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 1), rng.uniform(0.6, 1))
        return np.float32(255) * np.asarray(rgb, np.float32)
    if step is None:
        return np.full(3, rng.choice([50, 185]), np.float32)
    return np.asarray(STEP_COLOURS[step], np.float32)


def digit(step: int, split: str, side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a mask [side, side] of a random handwritten instance of a step's digit."""
    images = handwriting(step, split)
    return enlarge(images[rng.integers(len(images))], side)


def distractor(side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a mask [side, side] of something that is no digit: a soft blob or a patch of noise."""
    if rng.uniform() < 0.5:
        return enlarge(rng.integers(0, 17, size=(8, 8)).astype(np.uint8), side)
    line = np.exp(-(np.linspace(-2, 2, side, dtype=np.float32) ** 2))
    return line[:, None] * line


def enlarge(image: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """Return an image [8, 8] with values 0..16 as a mask [side, side] in 0..1, smoothly enlarged."""
    large = Image.fromarray(image * 15).resize((side, side), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(large, np.float32) / 170 - 0.15, 0, 1)


# --- pictures that scikit-learn ships -------------------------------------------------------------------------------


@cache
def handwriting(step: int, split: str) -> NDArray[np.uint8]:
    """Return uint8 [N, 8, 8], values 0..16: the images of a step's digit that a split may show."""
    images, digits = handwritten_digits()
    of_step: NDArray[np.uint8] = images[digits == step]
    return of_step[np.isin(np.arange(len(of_step)) % 5, HANDWRITING[split])]


@cache
def handwritten_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return scikit-learn's digits: uint8 [N, 8, 8], values 0..16, and which digit each is [N]."""
    images, digits = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8).astype(np.uint8), digits


@cache
def photos() -> tuple[Image.Image, ...]:
    """Return the two photographs."""
    return tuple(Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg"))
