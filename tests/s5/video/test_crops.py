"""Random resized crops: the boxes, and reading them, against torchvision's boxes and whole pictures cut by Pillow."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from s5.errors import VideoError
from s5.video.crops import Box, random_box, stored_box
from s5.video.pictures import Turn
from s5.video.pyav_reader import PyAVReader
from s5.video.reader import FloatArray, FrameArray
from s5.video.reading import probe, read_clips
from tests.s5.videos import write_coded

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SIZE = 48
TIMES = np.array([0.2, 1.48, 3.0])


@pytest.mark.parametrize("size", [(224, 224), (640, 272), (90, 160)])
@pytest.mark.parametrize(("scale", "ratio"), [(SCALE, RATIO), ((0.5, 0.9), (1.0, 2.0))])
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int], scale: Any, ratio: Any) -> None:
    rng, (width, height) = np.random.default_rng(0), size
    blank = torch.empty(1, height, width)
    ours = np.array([random_box(size, scale, ratio, rng) for _ in range(1500)])
    drawn = np.array([RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(1500)])
    theirs = drawn[:, [1, 0, 3, 2]]
    whole = np.array([width, height, width, height])
    for found in (ours, theirs):
        assert (found[:, :2] >= 0).all()
        assert (found[:, :2] + found[:, 2:] <= whole[:2]).all()
    for measured in (lambda b: b / whole, lambda b: b[:, 2:].prod(1) / width / height, lambda b: b[:, 2] / b[:, 3]):
        a, b = (np.quantile(measured(found.astype(float)), [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
                for found in (ours, theirs))  # fmt: skip
        np.testing.assert_allclose(a, b, atol=0.07)


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 1), (3, 500)])
def test_a_picture_that_no_box_fits_has_torchvisions_box_at_the_centre(size: tuple[int, int]) -> None:
    box = random_box(size, (0.99, 1.0), RATIO, np.random.default_rng(0))
    blank = torch.empty(1, size[1], size[0])
    top, left, height, width = RandomResizedCrop.get_params(blank, [0.99, 1.0], list(RATIO))
    assert abs(box.left - left) <= 1
    assert abs(box.top - top) <= 1
    assert box[2:] == (max(1, width), max(1, height))


@pytest.mark.parametrize("turn", [Turn(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)])
def test_a_box_of_the_stored_picture_shows_what_the_box_of_the_displayed_one_shows(turn: Turn) -> None:
    stored = np.arange(5 * 8).reshape(5, 8)[:, :, None].astype(np.uint8)
    shown = turn.applied(stored)
    height, width = shown.shape[:2]
    box = Box(1, 2, 3, 2)
    (left, top, wide, high), of = stored_box(box, (width, height), turn)
    assert of == (8, 5)
    cut = turn.applied(stored[top : top + high, left : left + wide])
    np.testing.assert_array_equal(cut, shown[2:4, 1:4])


def wholes(path: str, times_T: FloatArray) -> list[FrameArray]:
    """Decode whole pictures, as displayed."""
    facts = probe(path)
    reader = PyAVReader(path, (facts.width, facts.height))
    pictures = reader.read(times_T)
    reader.close()
    return pictures


def cut(pictures: list[FrameArray], box: Box) -> FrameArray:
    """Cut a box out of whole pictures and scale it with Pillow."""
    left, top, width, height = box
    parts = [Image.fromarray(np.ascontiguousarray(p[top : top + height, left : left + width])) for p in pictures]
    return np.stack([np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for part in parts])


VIDEOS: dict[str, dict[str, Any]] = {
    "a.mp4": {"size": (160, 120)},
    "b.avi": {"codec": "mpeg4", "size": (120, 160)},
    "bframes.ts": {"bframes": 2, "size": (160, 120)},
    "turned 90.mp4": {"size": (160, 120), "rotation": 90},
    "turned 180.mp4": {"size": (160, 120), "rotation": 180},
    "turned -90.mkv": {"size": (160, 120), "rotation": -90},
    "wide pixels.mp4": {"size": (96, 128), "pixel_aspect": Fraction(2)},
    "wide pixels, turned.mp4": {"size": (96, 128), "pixel_aspect": Fraction(3, 2), "rotation": 90},
    "odd.avi": {"codec": "mjpeg", "size": (161, 119)},
    "ten bits.mov": {"codec": "prores_ks", "size": (160, 120)},
}


@pytest.mark.parametrize("name", list(VIDEOS))
def test_crops_are_those_of_whole_pictures(tmp_path: Path, name: str) -> None:
    path = write_coded(tmp_path / name, **VIDEOS[name])
    facts = probe(path)
    size, decoders = (facts.width, facts.height), {facts.decoder, "pyav"}
    # Of multiples of twelve pixels, which are even numbers of stored ones.
    drawn = [random_box(size, (0.2, 0.8), RATIO, np.random.default_rng(seed)) for seed in range(4)]
    boxes = [Box(*(12 * max(1, side // 12) for side in box)) for box in drawn]
    pictures = wholes(path, TIMES)
    for box in [*boxes, Box(0, 0, *size)]:
        right = cut(pictures, box).astype(int)
        near = Box((box.left + 8) % (size[0] - box.width + 1), box.top, box.width, box.height)
        for decoder in decoders:
            (frames,) = read_clips(path, [TIMES], SIZE, size, decoder, [box])
            assert frames.shape == (3, SIZE, SIZE, 3)
            difference = np.abs(frames - right).mean()
            assert difference < 6, (box, decoder)
            if near != box:
                # A box eight pixels beside it shows something else.
                (beside,) = read_clips(path, [TIMES], SIZE, size, decoder, [near])
                assert np.abs(beside - right).mean() > 1.5 * difference


@pytest.mark.parametrize("name", ["a.mp4", "turned 90.mp4", "turned 180.mp4", "odd.avi", "ten bits.mov"])
def test_a_crop_starts_and_ends_at_a_sample_of_colour(tmp_path: Path, name: str) -> None:
    """Formats store colours for every second pixel: a crop may lie a pixel beside its box, and be one smaller."""
    path = write_coded(tmp_path / name, **VIDEOS[name])
    facts = probe(path)
    size, box = (facts.width, facts.height), Box(33, 27, 51, 43)
    (frames,) = read_clips(path, [TIMES[:1]], SIZE, size, facts.decoder, [box])
    near = [Box(33 + x, 27 + y, 51 - w, 43 - h) for x in (-1, 0, 1) for y in (-1, 0, 1) for w in (0, 1) for h in (0, 1)]
    pictures = wholes(path, TIMES[:1])
    differences = [np.abs(cut(pictures, one).astype(int) - frames).mean() for one in near]
    assert min(differences) < 4


def test_decord_and_pyav_give_the_same_crops(tmp_path: Path) -> None:
    path, box = write_coded(tmp_path / "a.mp4", size=(160, 120)), Box(11, 20, 90, 80)
    assert probe(path).decoder == "decord"
    first, second, third = (
        read_clips(path, [TIMES], SIZE, *known, boxes=[box])[0]
        for known in (((160, 120), "decord"), ((160, 120), "pyav"), (None, None))
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)


def test_a_pair_of_boxes_is_what_two_reads_give(tmp_path: Path) -> None:
    """The clips share frames; times repeat and fall."""
    path = write_coded(tmp_path / "a.mp4", size=(160, 120), bframes=2)
    clips = [np.array([0.4, 3.0, 0.4, 1.0]), np.array([1.0, 0.4])]
    boxes = [Box(0, 0, 100, 100), Box(40, 30, 64, 50)]
    with Path(path).open("rb") as file:
        pair = read_clips(file, clips, SIZE, (160, 120), "pyav", boxes)
    for frames, times, box in zip(pair, clips, boxes, strict=True):
        np.testing.assert_array_equal(frames, read_clips(path, [times], SIZE, (160, 120), "pyav", [box])[0])
        np.testing.assert_array_equal(frames, np.stack([alone(path, time, box) for time in times]))
    assert not np.array_equal(pair[0][3], pair[1][0])


def alone(path: str, time: float, box: Box) -> FrameArray:
    """Read one frame by itself."""
    return read_clips(path, [np.array([time])], SIZE, (160, 120), "pyav", [box])[0][0]


@pytest.mark.parametrize("box", [Box(0, 0, 1, 1), Box(63, 63, 1, 1), Box(31, 0, 1, 64), Box(0, 63, 64, 1)])
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_boxes_of_a_pixel(tmp_path: Path, box: Box, suffix: str) -> None:
    path = write_coded(tmp_path / f"a.{suffix}", "libx264" if suffix == "mp4" else "prores_ks", frames=2)
    assert read_clips(path, [np.zeros(2)], 32, (64, 64), "decord", [box])[0].shape == (2, 32, 32, 3)


def test_a_damaged_frame_fails_in_a_crop_too(tmp_path: Path) -> None:
    path = Path(write_coded(tmp_path / "a.mp4"))
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = next(packet for packet in container.demux(video=0) if packet.pts == 50 * packet.duration)
        content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(content)
    with pytest.raises(VideoError, match="fails to decode"):
        read_clips(str(path), [np.arange(90) / 25], 32, (64, 64), "pyav", [Box(0, 0, 32, 32)])
