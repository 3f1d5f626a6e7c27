"""Captions as stretches of a manifest's videos, in parts of a fixed number of captions."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from pipelines.data.narration.captions import Caption
from s5.errors import Failure

SEGMENTS = pa.schema(
    [
        ("video_id", pa.string()),
        ("row", pa.int64()),
        ("video", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("text", pa.string()),
        ("location", pa.string()),
    ]
)
"""A narrated stretch: its id, row and id of its video in the manifest, times, text, and where it is listed."""


@dataclass
class SegmentPart:
    """Some captions in a row: those that are segments (SEGMENTS), the others with reasons."""

    segments: pa.Table
    rejects: list[Failure]


@dataclass
class Segments:
    """Places captions in videos, and counts what it does to them."""

    manifest: pa.Table
    """The videos."""
    shortest_s: float
    """Shorter segments are widened around their middle, as far as the video allows."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many captions were `clipped` at an end of the video, `widened`, and begin while another is said
    (`overlapping`)."""

    def __post_init__(self) -> None:
        names = self.manifest["video_id"].to_pylist()
        # A file may say `dQw4w9WgXcQ` of the video `train/dQw4w9WgXcQ`.
        short = [name.rpartition("/")[2] for name in names]
        again = {name for name, count in Counter(short).items() if count > 1}
        self._rows: dict[str, int] = {name: row for row, name in enumerate(short) if name not in again}
        self._rows |= {name: row for row, name in enumerate(names)}
        self._several = again - self._rows.keys()
        self._names = names
        self._bounds = list(zip(self.manifest["start_s"].to_pylist(), self.manifest["end_s"].to_pylist(), strict=True))
        self._said: dict[int, tuple[array[float], array[float]]] = {}

    def parts(self, captions: Iterable[Caption], size: int) -> Iterator[SegmentPart]:
        """Yield captions in parts of `size`, the last one smaller."""
        number = 0
        captions = iter(captions)
        while chunk := list(islice(captions, size)):
            rows: list[dict[str, Any]] = []
            rejects: list[Failure] = []
            for caption in chunk:
                placed = caption.reason or self._place(caption, number)
                if isinstance(placed, str):
                    rejects.append(Failure(caption.video, caption.location, placed))
                else:
                    rows.append(placed)
                number += 1
            yield SegmentPart(pa.Table.from_pylist(rows, SEGMENTS), rejects)

    def _place(self, caption: Caption, number: int) -> dict[str, Any] | str:
        """Return the row of SEGMENTS of a caption, whose running number makes its id unique, or why there is none."""
        row = self._rows.get(caption.video)
        if row is None:
            several = caption.video in self._several
            return (
                "several videos of the manifest have that name" if several else "no video of the manifest has that id"
            )
        first_s, last_s = self._bounds[row]
        start_s, end_s = max(caption.start_s, first_s), min(caption.end_s, last_s)
        if end_s <= start_s:
            return (
                f"{caption.start_s:g} to {caption.end_s:g} s lies outside the video, which is used from {first_s:g} to "
                f"{last_s:g} s"
            )
        self.counts["clipped"] += (start_s, end_s) != (caption.start_s, caption.end_s)
        self.counts["overlapping"] += self._joined(row, start_s, end_s)
        if end_s - start_s < self.shortest_s:
            self.counts["widened"] += 1
            start_s, end_s = widened(start_s, end_s, first_s, last_s, self.shortest_s)
        name = f"{self._names[row]}@{_text(start_s)}-{_text(end_s)}#{number}"
        return {
            "video_id": name,
            "row": row,
            "video": self._names[row],
            "start_s": start_s,
            "end_s": end_s,
            "text": caption.text,
            "location": caption.location,
        }

    def _joined(self, row: int, start_s: float, end_s: float) -> int:
        """Add a stretch to those in which a video's captions are said; return how many of these it overlaps.

        Their sum over all captions, listed in any order, is the number of those that begin while another is said.
        """
        starts, ends = self._said.setdefault(row, (array("d"), array("d")))
        first, last = bisect_right(ends, start_s), bisect_left(starts, end_s)
        if first < last:
            start_s, end_s = min(start_s, starts[first]), max(end_s, ends[last - 1])
        starts[first:last], ends[first:last] = array("d", [start_s]), array("d", [end_s])
        return last - first


def widened(start_s: float, end_s: float, first_s: float, last_s: float, length_s: float) -> tuple[float, float]:
    """Return a segment of `length_s` around the middle of another, moved and cut to lie within a video's bounds."""
    start_s = max(first_s, min((start_s + end_s - length_s) / 2, last_s - length_s))
    return start_s, min(last_s, start_s + length_s)


def _text(seconds: float) -> str:
    """Return seconds to the millisecond without zeros at the end."""
    return f"{seconds:.3f}".rstrip("0").rstrip(".")
