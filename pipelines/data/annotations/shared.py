"""What all annotation formats share: annotated videos, and reading of files with errors that name file and line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pipelines import storage
from pipelines.config import unknown
from pipelines.data.manifest import BenchmarkProtocol
from pipelines.errors import UserError


@dataclass(frozen=True, slots=True)
class AnnotatedVideo:
    """What annotations or a folder say about a video; empty or None where they say nothing."""

    video_id: str
    name: str
    """Path below the folder of videos; for benchmarks without file extension, until the file is found."""
    location: str = ""
    """Where it is listed, such as `test.csv line 12`."""
    split: str = ""
    class_name: str | None = None
    label: int | None = None
    target: float | None = None
    start_s: float | None = None
    end_s: float | None = None
    stated_s: float | None = None
    """Length of the file, where the annotations state it; `index` measures its own."""
    uri: str = ""
    group: str = ""
    """What it shares with others that may not be on another side of a split, such as the person on it."""
    reason: str = ""
    """Why it is rejected before it is probed."""


@dataclass(frozen=True)
class Annotations:
    """All that annotations say, about videos and classes."""

    videos: list[AnnotatedVideo]
    """Videos of all splits, each id once but for rejected ones."""
    classes: list[str]
    """Names of all classes in the order of their labels, those without videos too."""
    dataset: str = ""
    """Benchmark; empty for own data."""
    task: str = ""
    """Task of a benchmark that has several."""
    protocol: BenchmarkProtocol = ""
    """How the benchmark is evaluated."""
    warnings: list[str] = field(default_factory=list)
    """Sentences about what the annotations say and the program takes in another way."""

    def __post_init__(self) -> None:
        places: dict[str, str] = {}
        again = [v for v in self.videos if not v.reason and places.setdefault(v.video_id, v.location) != v.location]
        if again:
            video = again[0]
            raise UserError(
                f"annotations list {len(again)} videos more than once, such as {video.video_id!r} ({video.location} "
                f"lists it again after {places[video.video_id]}): leave each only once, in one split"
            )


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: the text of each column, stripped."""

    file: AnnotationFile
    line: int
    text: dict[str, str]

    @property
    def location(self) -> str:
        """File and line, such as `test.csv line 12`."""
        return f"{self.file.short} line {self.line}"

    def error(self, column: str, remedy: str) -> UserError:
        """Return the error for the value of a column."""
        return self.file.error(f"{self.location} has {column} {self.text[column]!r}; {remedy}")

    def required(self, column: str) -> str:
        """Return a text that must not be empty."""
        if not self.text[column]:
            raise self.error(column, "it must not be empty")
        return self.text[column]

    def integer(self, column: str, low: int = 0, high: int | None = None) -> int:
        """Return a whole number from `low` to `high`."""
        text = self.text[column]
        value = int(text) if text.isdecimal() else -1
        if value < low or (high is not None and value > high):
            raise self.error(column, f"give a whole number {f'>= {low}' if high is None else f'from {low} to {high}'}")
        return value


@dataclass(frozen=True)
class AnnotationFile:
    """An annotation file: the path `given` as a setting (`option`), or `name` below it."""

    given: str
    name: str = ""
    option: str = "annotations"

    @property
    def path(self) -> str:
        """The file's path or URI."""
        return storage.join(self.given, self.name) if self.name else self.given

    @cached_property
    def short(self) -> str:
        """The name of the file without folders."""
        return self.path.rstrip("/").rpartition("/")[2]

    def error(self, what: str) -> UserError:
        """Return the error for a fault of the file."""
        return UserError(f"{self.option} is {self.given!r}: {what}")

    def read(self) -> str:
        """Return its text.

        Raises:
            UserError: it is missing or not a text file.
        """
        if not storage.exists(self.path):
            raise self.error(f"there is no {self.name} in it" if self.name else "there is no such file")
        if storage.is_folder(self.path):
            other = ", or with --source the data set whose folder it is" if self.option == "annotations" else ""
            raise self.error(f"it is a folder; give a file{other}")
        try:
            return storage.read_bytes(self.path).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise self.error(f"{self.short} is not a text file in UTF-8") from None

    def rows(self, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
        """Yield the lines of a csv file whose first line names the columns; blank lines are skipped.

        Raises:
            UserError: a column is missing or unknown, or a line has more or fewer fields than the header.
        """
        reader = csv.reader(io.StringIO(self.read(), newline=""))
        try:
            header = [name.strip() for name in next(reader, [])]
            self._check_header(header, required, optional)
            for fields in reader:
                if len(fields) == len(header):
                    text = dict(zip(header, map(str.strip, fields), strict=True))
                    yield Row(self, reader.line_num, text)
                elif fields:
                    what = f"has {len(fields)} fields, not as many fields as the header ({len(header)})"
                    raise self.error(f"{self.short} line {reader.line_num} {what}")
        except csv.Error as error:
            raise self.error(f"{self.short} line {reader.line_num} is no csv: {error}") from None

    def _check_header(self, header: list[str], required: Sequence[str], optional: Sequence[str]) -> None:
        expected = f"the first line must name the columns, with commas: {', '.join(required)}"
        expected += f" and perhaps {', '.join(optional)}" if optional else ""
        if not any(header):
            raise self.error(f"{self.short} has no column {required[0]}; {expected}")
        known = (*required, *optional)
        for name in header:
            if name not in known:
                raise self.error(
                    f"{self.short} has an {unknown('column', name[:80], known)}; separate them with commas"
                )
        for name in required:
            if name not in header:
                raise self.error(f"{self.short} has no column {name}; {expected}")
        if len(set(header)) < len(header):
            raise self.error(f"{self.short} names a column twice; {expected}")


def annotation_files(given: str, names: Sequence[str], what: str) -> list[AnnotationFile]:
    """Return the files of a folder of annotations.

    Raises:
        UserError: it is no folder, or a file is missing from it; `what` says what the folder should be.
    """
    folder = AnnotationFile(given)
    if not storage.is_folder(given):
        fault = "it is a file" if storage.exists(given) else "there is no such folder"
        raise folder.error(f"{fault}; give {what}")
    files = [AnnotationFile(given, name) for name in names]
    for file in files:
        if not storage.exists(file.path):
            raise folder.error(f"there is no {file.name} in it; give {what}")
    return files


def class_list(names: dict[int, str], count: int) -> list[str]:
    """Return the names of `count` classes; the number stands for the name of a class without videos."""
    return [names.get(label, str(label)) for label in range(count)]
