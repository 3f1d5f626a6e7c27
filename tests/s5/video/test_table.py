"""The table of docs/data.md: which decoder reads which codec in which container and structure, each cell proven.

    python -m tests.s5.video.test_table    # writes the table into docs/data.md

A cell is proven by frames that show their number: plain decoding from the start finds all of them in order, and so do
reads of single frames and of clips at random times.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pytest

from s5.errors import VideoError
from s5.video.reading import VideoFacts, probe, read_clips
from tests.s5.odd_videos import REFRESH, write_hidden
from tests.s5.videos import code, write_coded

DOCS = Path(__file__).parents[3] / "docs" / "data.md"
FRAMES, FPS = 75, 25
COLUMNS = {
    "mp4, mov": "mp4",
    "mkv, webm": "mkv",
    "avi": "avi",
    "ts": "ts",
    "mpg": "mpg",
    "flv": "flv",
    "wmv": "wmv",
}
X265 = "log-level=none:keyint=30:min-keyint=30:scenecut=0"


@dataclass(frozen=True)
class Structure:
    """A line of the table: a codec and how its groups of pictures are built."""

    codec: str
    structure: str
    encoder: str
    containers: str
    """Endings of the files, apart from which there is none."""
    bframes: int = 0
    options: dict[str, str] = field(default_factory=dict)


def _x265(more: str) -> dict[str, str]:
    return {"x265-params": f"{X265}:{more}", "preset": "ultrafast"}


STRUCTURES = [
    Structure("H.264", "closed", "libx264", "mp4 mkv avi ts mpg flv"),
    Structure("H.264", "closed, B-frames", "libx264", "mp4 mkv avi ts mpg flv", 3),
    Structure(
        "H.264",
        "open, B-frames",
        "libx264",
        "mp4 mkv avi ts flv",
        3,
        {"x264-params": "open-gop=1:keyint=30:min-keyint=30:bframes=3:b-adapt=0:scenecut=0"},
    ),
    Structure("H.264", "refresh", "libx264", "mp4 mkv avi ts flv", 0, REFRESH),
    Structure("HEVC", "closed", "libx265", "mp4 mkv ts", 0, _x265("open-gop=0:bframes=0")),
    Structure("HEVC", "closed, B-frames", "libx265", "mp4 mkv ts", 3, _x265("open-gop=0:bframes=3")),
    Structure("HEVC", "open, B-frames", "libx265", "mp4 mkv ts", 3, _x265("open-gop=1:bframes=3")),
    Structure("HEVC", "refresh", "libx265", "mp4 mkv", 0, _x265("intra-refresh=1:bframes=0")),
    Structure("VP8", "closed", "libvpx", "mkv avi"),
    Structure("VP8", "hidden", "", "mkv"),
    Structure("VP9", "closed", "libvpx-vp9", "mp4 mkv"),
    Structure("AV1", "open, hidden", "libsvtav1", "mp4 mkv"),
    Structure("MPEG-4", "closed", "mpeg4", "mp4 mkv avi ts"),
    Structure("MPEG-4", "open, B-frames", "mpeg4", "mp4 mkv avi ts", 2),
    Structure("MPEG-2", "closed", "mpeg2video", "mp4 mkv avi ts mpg"),
    Structure("MPEG-2", "open, B-frames", "mpeg2video", "mp4 mkv avi ts mpg", 2),
    Structure("MPEG-1", "open, B-frames", "mpeg1video", "mkv avi ts mpg", 2),
    Structure("MS-MPEG-4", "closed", "msmpeg4v3", "mkv avi wmv"),
    Structure("WMV 8", "closed", "wmv2", "avi wmv"),
    Structure("MJPEG", "key frames alone", "mjpeg", "mp4 mkv avi"),
    Structure("ProRes", "key frames alone", "prores_ks", "mp4 mkv"),
]


def write(line: Structure, suffix: str, folder: Path) -> str:
    """Write a file of a cell."""
    if line.structure == "hidden":
        return write_hidden(folder / "a.webm", FRAMES, 14)
    suffix = {"libvpx": "webm", "libvpx-vp9": "webm"}.get(line.encoder, suffix) if suffix == "mkv" else suffix
    suffix = "mov" if line.encoder == "prores_ks" and suffix == "mp4" else suffix
    options = line.options
    return write_coded(folder / f"a.{suffix}", line.encoder, FRAMES, FPS, bframes=line.bframes, options=options)


def cell(line: Structure, suffix: str, folder: Path) -> str:
    """Return the decoder of a cell after proving that it is right, `rejected`, or nothing."""
    if suffix not in line.containers.split():
        return ""
    path = write(line, suffix, folder)
    with av.open(path) as container:
        assert [code(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)] == list(range(FRAMES))
    try:
        facts = probe(path)
    except VideoError:
        return "rejected"
    assert facts.num_frames == FRAMES
    assert facts.fps == pytest.approx(FPS, rel=1e-3)
    for decoder in {facts.decoder, "pyav"}:
        _prove(path, facts, decoder)
    return {"decord": "decord", "pyav": "PyAV"}[facts.decoder]


def _prove(path: str, facts: VideoFacts, decoder: str) -> None:
    rng = np.random.default_rng(0)
    # One frame alone at its very time; clips in the middle of frames, as containers round times to milliseconds.
    clips = [(np.array([index]), 0.0) for index in rng.permutation(FRAMES)[:12]]
    clips += [(np.sort(rng.permutation(FRAMES)[:6]), 0.5) for _ in range(3)] + [(np.arange(FRAMES), 0.5)]
    for indices, part in clips:
        (frames,) = read_clips(path, [(indices + part) / FPS], 64, (facts.width, facts.height), decoder)
        assert [code(frame) for frame in frames] == indices.tolist(), (path, decoder)


def markdown(cells: Iterable[list[str]]) -> str:
    """Return the lines of the table."""
    head = ["codec", "groups of pictures", *COLUMNS]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(("| " + " | ".join(line) + " |").replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def _in_docs(line: Structure) -> list[str]:
    """Return the cells that the docs state for a line."""
    start = re.escape(f"| {line.codec} | {line.structure} |")
    found = re.search(rf"^{start}(.*)\|$", DOCS.read_text(), re.MULTILINE)
    return [text.strip() for text in found[1].split("|")] if found else []


@pytest.mark.parametrize("line", STRUCTURES, ids=lambda line: f"{line.codec} {line.structure}")
def test_the_table_in_the_docs_is_true(tmp_path: Path, line: Structure) -> None:
    cells = [cell(line, suffix, tmp_path) for suffix in COLUMNS.values()]
    assert _in_docs(line) == cells, "run `python -m tests.s5.video.test_table`"


def _write_docs() -> None:
    cells = []
    for line in STRUCTURES:
        with tempfile.TemporaryDirectory() as folder:
            found = [cell(line, suffix, Path(folder)) for suffix in COLUMNS.values()]
        cells.append([line.codec, line.structure, *found])
    text = DOCS.read_text()
    table = re.compile(r"^\| codec \|.*?(?=\n\n)", re.MULTILINE | re.DOTALL)
    DOCS.write_text(table.sub(lambda _: markdown(cells), text))


if __name__ == "__main__":
    _write_docs()
