"""The report as one page of HTML that needs nothing else: figures, styles and pictures are in it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.reporting.table import Table

TEMPLATE = "page.html"


def page(title: str, sentence: str, tables: Sequence[Table], pictures: Mapping[str, bytes], made: str) -> str:
    """Return the page; all texts are escaped, as names come from users.

    Args:
        title: of the report.
        sentence: which runs it is of.
        tables: in order.
        pictures: PNG files by what they show.
        made: by what it was made and when.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sources = [
        (name, f"data:image/png;base64,{base64.b64encode(content).decode()}") for name, content in pictures.items()
    ]
    return environment.get_template(TEMPLATE).render(
        title=title, sentence=sentence, tables=tables, pictures=sources, made=made
    )
