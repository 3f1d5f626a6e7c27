"""The written steps of tasks. A step's id is its place in the file, from 0; steps without text keep theirs.

.csv     columns `task`, `text` and perhaps `step` (its place in the task), a line a step
.json    a list of tasks, as arXiv 2201.10990 has wikiHow's: [[{"headline": "Whisk the eggs", ...}, ...], ...]
         or tasks by their titles: {"Make an omelette": ["Whisk the eggs", ...], ...}

In both json forms a step is a text, or an object's `headline`, or its `text` where that is missing or empty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.data.annotations.shared import AnnotationFile
from pipelines.errors import UserError


@dataclass(frozen=True, slots=True)
class Step:
    """A written step of a task."""

    task: str
    text: str
    """Empty where it has none: no segment is labelled with it."""
    location: str
    """Where it stands, such as `steps.csv line 12`."""

    @property
    def name(self) -> str:
        """Task and text, as a class is named."""
        return f"{self.task}: {self.text}"


def read_steps(path: str) -> list[Step]:
    """Return the steps of a file by their ids.

    Raises:
        UserError: the file is missing, of another kind or malformed, or none of its steps has a text.
    """
    file = AnnotationFile(path, option="steps")
    if path.endswith(".csv"):
        steps = [
            Step(row.required("task"), row.text["text"], row.location) for row in file.rows(["task", "text"], ["step"])
        ]
    elif path.endswith(".json"):
        try:
            found = json.loads(file.read())
        except ValueError as error:
            raise file.error(f"it is no JSON: {error}") from None
        steps = list(_from_tasks(found, file))
    else:
        raise file.error("give a file that ends in .csv or .json")
    if not any(step.text for step in steps):
        raise file.error(f"none of its {len(steps)} steps has a text")
    return steps


def _from_tasks(found: Any, file: AnnotationFile) -> Iterator[Step]:
    if not isinstance(found, list | dict):
        raise file.error("it is neither a list of tasks nor an object of tasks by their titles")
    # wikiHow's list has no titles: the place of a task stands for its title.
    tasks = found.items() if isinstance(found, dict) else enumerate(found)
    for task, steps in tasks:
        if not isinstance(steps, list):
            raise file.error(f"task {task!r} is {type(steps).__name__}, not a list of steps")
        for number, step in enumerate(steps, 1):
            location = f"{file.short}, task {task!r} step {number}"
            if isinstance(step, dict):
                headline = step.get("headline")
                blank = headline is None or (isinstance(headline, str) and not headline.strip())
                step = step.get("text") if blank else headline
            if step is not None and not isinstance(step, str):
                raise file.error(f"task {task!r} step {number} is {step!r}: give a text, or an object with a headline")
            yield Step(str(task), " ".join((step or "").split()), location)


def digest(steps: list[Step]) -> str:
    """Return a digest of steps: of their order, tasks and texts."""
    content = json.dumps([[values["task"], values["text"]] for values in map(asdict, steps)])
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


def text_ids(steps: list[Step]) -> list[int]:
    """Return the ids of the steps that have a text."""
    return [number for number, step in enumerate(steps) if step.text]


def check_count(steps: list[Step], top_k: int) -> None:
    """Raise `UserError` where a label has more steps than there are."""
    if top_k > (count := len(text_ids(steps))):
        raise UserError(f"top_k is {top_k}: there are {count} steps with text; give at most {count}")
