"""Captions: what is said in which video, from when to when. Files are read piece by piece and never held whole.

.jsonl, .ndjson    a caption a line: {"video": "dQw4w9WgXcQ", "start": 12.5, "end": 16.0, "text": "whisk the eggs"}
.json              HowTo100M's: {"dQw4w9WgXcQ": {"start": [12.5, ...], "end": [16.0, ...], "text": ["whisk ...", ...]}}

Times are seconds after the first frame of the video.
"""

from __future__ import annotations

import codecs
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipelines import storage
from pipelines.errors import UserError

LINES = (".jsonl", ".ndjson")
OBJECT = ".json"
COLUMNS = ("start", "end", "text")
READ = 1 << 20
"""Bytes of a .json file that are read at a time."""
LONGEST = 64 << 20
"""Characters that the captions of one video may take in a .json file."""
SHOWN = 40
"""Characters of a wrong value that a reason shows."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A sentence of a video's narration, or why it is none."""

    video: str
    """Video as the file names it; empty where it names none."""
    location: str
    """Where it stands, such as `captions.jsonl line 12`."""
    start_s: float = 0.0
    end_s: float = 0.0
    text: str = ""
    reason: str = ""
    """Why it cannot be used; empty where it can."""


def read_captions(path: str) -> Iterator[Caption]:
    """Yield the captions of a file in its order, those that cannot be used with their reasons.

    Raises:
        UserError: the file is missing, of another kind, or no JSON.
    """
    short = path.rpartition("/")[2]
    if not path.endswith((*LINES, OBJECT)):
        raise UserError(f"narration is {path!r}: give a file that ends in {', '.join(LINES)} or {OBJECT}")
    return _from_lines(path, short) if path.endswith(LINES) else _from_object(path, short)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Yield an open file of bytes, on this machine or an object store."""
    if not storage.exists(path) or storage.is_folder(path):
        raise UserError(f"narration is {path!r}: there is no such file")
    system, inner = storage.filesystem(storage.absolute(path))
    with system.open_input_stream(inner) as stream:
        yield stream


def _from_lines(path: str, short: str) -> Iterator[Caption]:
    # Lines end in \n alone: JSON allows other ends of lines inside a text.
    with _opened(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            location = f"{short} line {number}"
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Caption("", location, reason=f"the line is no JSON: {error}")
                continue
            if isinstance(found, dict):
                start, end, text = (found.get(name) for name in COLUMNS)
                yield _caption(found.get("video"), start, end, text, location)
            else:
                reason = f"the line is {_shown(found)}, no object with video, start, end, text"
                yield Caption("", location, reason=reason)


def _from_object(path: str, short: str) -> Iterator[Caption]:
    with _opened(path) as stream:
        for video, found in _members(stream, path):
            location = f"{short}, video {video!r}"
            lists: list[Any] = [found.get(name) for name in COLUMNS] if isinstance(found, dict) else [None]
            if not all(isinstance(values, list) for values in lists):
                yield Caption(video, location, reason=f"it is {_shown(found)}, no object with lists start, end, text")
            elif len({len(values) for values in lists}) > 1:
                counts = ", ".join(f"{len(values)} {name}" for name, values in zip(COLUMNS, lists, strict=True))
                yield Caption(video, location, reason=f"its lists have different lengths: {counts}")
            else:
                for number, (start, end, text) in enumerate(zip(*lists, strict=True), 1):
                    yield _caption(video, start, end, text, f"{location} caption {number}")


def _caption(video: Any, start: Any, end: Any, text: Any, location: str) -> Caption:
    name = video if isinstance(video, str) else ""
    start_s, end_s = _seconds(start), _seconds(end)
    reason = ""
    if not name:
        reason = f"video is {_shown(video)}: it names no video"
    elif not isinstance(text, str) or not text.strip():
        reason = "it has no text"
    elif start_s is None or end_s is None:
        which, value = ("start", start) if start_s is None else ("end", end)
        reason = f"{which} is {_shown(value)}: no finite number of seconds"
    elif end_s <= start_s:
        reason = f"it ends at {end_s:g} s, not after its start at {start_s:g} s"
    if reason or start_s is None or end_s is None:
        return Caption(name, location, reason=reason)
    return Caption(name, location, start_s, end_s, " ".join(text.split()))


def _seconds(value: Any) -> float | None:
    """Return a finite number as it is, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        seconds = float(value)
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _members(stream: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield key and value of each member of one large JSON object, which is never in memory as a whole."""
    text = _JsonText(stream, path)
    text.take("{")
    more = text.next() != "}"
    while more:
        if (found := text.next()) != '"':
            raise text.error(f"{found!r} stands where the name of a video should")
        key = text.value()
        text.take(":")
        yield key, text.value()
        if more := text.next() != "}":
            text.take(",")
    text.take("}")
    if found := text.peek():
        raise text.error(f"{found!r} stands after the end of the object, as where files were joined")


class _JsonText:
    """The text of a JSON file from where reading stands, as far as it has been fetched."""

    def __init__(self, stream: Any, path: str) -> None:
        self._reader = codecs.getreader("utf-8-sig")(stream)
        self._path = path
        self._text, self._place = "", 0
        self._before = 0
        self._decoder = json.JSONDecoder()

    def error(self, what: str) -> UserError:
        """Return the error for a fault of the file."""
        place = f"character {self._before + self._place + 1:,}"
        return UserError(f"narration is {self._path!r}: {what} ({place}); give HowTo100M's json, whole, or a .jsonl")

    def peek(self) -> str:
        """Return the next character that is no space, without taking it; nothing at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place].isspace():
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._fetch():
                return ""

    def next(self) -> str:
        """Return the next character that is no space, without taking it; there has to be one."""
        if not (found := self.peek()):
            raise self.error("it ends in the middle")
        return found

    def take(self, expected: str) -> None:
        """Take the next character, which has to be the expected one."""
        if (found := self.next()) != expected:
            raise self.error(f"{found!r} stands where {expected!r} should")
        self._place += 1

    def value(self) -> Any:
        """Take the next value."""
        self.next()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._place)
            except (json.JSONDecodeError, RecursionError) as error:
                # Perhaps only its beginning has been fetched.
                if len(self._text) - self._place > LONGEST:
                    raise self.error(f"it is no JSON: {error}") from None
                if not self._fetch():
                    raise self.error(f"it ends in the middle, or is no JSON: {error}") from None
                continue
            self._place = end
            return found

    def _fetch(self) -> bool:
        """Fetch more text; return whether there was any."""
        try:
            more = self._reader.read(READ)
        except UnicodeDecodeError:
            raise self.error("it is not a text file in UTF-8") from None
        self._before += self._place
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(more)


def check_captions(path: str) -> None:
    """Check that a file has captions, and that all of a .json file is one object.

    Raises:
        UserError: it is missing, of another kind, empty, cut short, or more than one object.
    """
    if next(read_captions(path), None) is None:
        raise UserError(f"narration is {path!r}: there are no captions in it")
    if path.endswith(OBJECT):
        # A fault at its end would be found only after all before it has been compared.
        with _opened(path) as stream:
            for _ in _members(stream, path):
                pass
