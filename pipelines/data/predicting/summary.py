"""What stage `predict` prints of its rows, and what they come to."""

from __future__ import annotations

from typing import IO, Any

from tqdm import tqdm

from pipelines.data.predicting.rows import json_line, table_head, table_lines
from pipelines.errors import UserError
from s5.errors import Failure

FIRST_REASONS = 3
"""Reasons that the error names where no video can be read."""
SECONDS = ("seconds", "decode_s", "model_s", "rest_s")


class Printer:
    """Prints rows: as lines of JSON, or as a table where the stream is a terminal."""

    def __init__(self, stream: IO[str]) -> None:
        self.classes: list[str] = []
        """Names of the classes, in the order of the scores."""
        self._stream, self._begun = stream, False

    def show(self, row: dict[str, Any]) -> None:
        """Print a row."""
        lines = list(table_lines(row)) if self._stream.isatty() else [json_line(row, self.classes)]
        if self._stream.isatty() and not self._begun:
            lines = [table_head(), *lines]
        self._begun = True
        with tqdm.external_write_mode(self._stream):
            print(*lines, sep="\n", file=self._stream, flush=True)


class Summary:
    """Counts rows, and adds up the seconds that their videos last and took."""

    def __init__(self) -> None:
        self.videos = 0
        self.rejects: list[Failure] = []
        self.seconds = dict.fromkeys(SECONDS, 0.0)

    def add(self, row: dict[str, Any]) -> None:
        """Count a row."""
        if row["reason"]:
            self.rejects.append(Failure(row["video"], row["video"], row["reason"]))
            return
        self.videos += 1
        for name in SECONDS:
            self.seconds[name] += row[name]

    @property
    def counts(self) -> dict[str, int]:
        """Videos that were predicted, and those that cannot be read."""
        return {"videos": self.videos, "rejects": len(self.rejects)}

    @property
    def metrics(self) -> dict[str, float]:
        """The seconds by name."""
        return {f"predict/{name}": value for name, value in self.seconds.items()}

    def in_words(self) -> str:
        """Return what the rows come to.

        Raises:
            UserError: no video can be read.
        """
        if not self.videos:
            reasons = "; ".join(f"{each.uri!r}: {each.reason}" for each in self.rejects[:FIRST_REASONS])
            raise UserError(f"none of the {len(self.rejects)} videos can be read ({reasons})")
        length, decode, model, rest = self.seconds.values()
        took = decode + model + rest
        counted = f"{self.videos} video{'' if self.videos == 1 else 's'}, {length:.0f} s long, "
        counted += f"and {len(self.rejects)} reject{'' if len(self.rejects) == 1 else 's'}"
        shares = f"decoding {decode / took:.0%}, model {model / took:.0%}, the rest {rest / took:.1%}"
        return f"{counted}; {took:.1f} s, of which {shares}"
