"""The page: complete in itself, safe with any name, and readable on a phone, by a parser and in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.reporting.page import page
from tests.pipelines.reporting import study

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ALONE = ["quic", "background-networking", "component-update", "sync", "gpu", "default-apps", "extensions"]
PHONE, DESKTOP = 390, 1280
MEASURE = """
<iframe id="page" width="{width}" height="844" style="border: 0" srcdoc="{page}"></iframe>
<script>
document.getElementById("page").onload = event => {{
  const inside = event.target.contentDocument, root = inside.documentElement;
  const wide = [...inside.querySelectorAll("body *")].filter(e => !e.closest(".table") && !e.closest("svg"));
  const figures = [...inside.querySelectorAll("svg, img")].map(e => e.getBoundingClientRect());
  document.title = JSON.stringify({{
    overflow: root.scrollWidth - root.clientWidth,
    widest: Math.max(...wide.map(e => e.getBoundingClientRect().right)),
    scrolling: [...inside.querySelectorAll(".table")].filter(e => e.scrollWidth > e.clientWidth).length,
    figures: figures.filter(box => box.width > 100 && box.height > 50).length,
    heading: inside.querySelector("h1").textContent,
    page: getComputedStyle(inside.body).backgroundColor,
    ink: getComputedStyle(inside.querySelector("svg text")).fill,
    run: inside.defaultView.ran === true,
  }});
}};
</script>
"""


@pytest.fixture(scope="module")
def made() -> str:
    """A page with all kinds of tables and figures."""
    return page(study.BAD, f"2 runs at {study.BAD}.", study.tables(), {study.BAD: study.picture()}, "Made by a test.")


class References(HTMLParser):
    """Collects the elements of a page, and what their attributes refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.references.append(value or "")
            self.handlers += [name] if name.startswith("on") else []

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_all_it_needs_and_escapes_names(made: str) -> None:
    found = References(made)
    assert {reference[:1] if reference[:1] == "#" else reference[:15] for reference in found.references} == {
        "#",
        "data:image/png;",
    }
    assert not re.search(r"url\((?!#)|@import", made)
    assert not found.handlers
    assert found.tags.count("script") == 0
    assert found.tags.count("img") == 1
    assert found.tags.count("svg") == 6
    cells = [text.strip() for text in found.texts]
    assert cells.count(study.BAD) >= 4
    assert study.BAD not in made
    targets = [reference for reference in found.references if reference.startswith("#table")]
    assert targets
    assert all(f'id="{target[1:]}"' in made for target in targets)


@pytest.fixture(scope="module")
def asked() -> Iterator[tuple[str, list[str]]]:
    """Address of a proxy that answers nothing, and what it was asked for."""
    paths: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(502)

        do_CONNECT = do_POST = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


def opened(content: str, width: int, dark: bool, proxy: str, folder: Path) -> dict[str, object]:
    """Open a page in a frame of that width, and return what a script around it measures."""
    outer = folder / "outer.html"
    outer.write_text(MEASURE.format(width=width, page=html.escape(content, quote=True)))
    command = [str(BROWSER), "--headless", "--no-sandbox", *(f"--disable-{name}" for name in ALONE), "--no-first-run"]
    command += [f"--user-data-dir={folder}/profile", f"--proxy-server={proxy}", "--virtual-time-budget=5000"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    title = re.search(r"<title>(.*?)</title>", done.stdout[-3000:] + done.stdout[:3000], re.DOTALL)
    assert title is not None, done.stderr[-2000:]
    return dict(json.loads(html.unescape(title[1])))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(PHONE, True), (DESKTOP, False)])
def test_in_a_browser(made: str, width: int, dark: bool, asked: tuple[str, list[str]], tmp_path: Path) -> None:
    proxy, paths = asked
    paths.clear()
    found = opened(made, width, dark, proxy, tmp_path)
    assert found["overflow"] == 0
    assert isinstance(found["widest"], int | float)
    assert found["widest"] <= width
    assert found["figures"] == made.count("<figure>")
    assert isinstance(found["scrolling"], int)
    assert found["scrolling"] >= (3 if width == PHONE else 1)
    assert found["heading"] == study.BAD
    pages = ("rgb(13, 17, 23)", "rgb(230, 237, 243)") if dark else ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
    assert (found["page"], found["ink"]) == pages
    assert found["run"] is False
    assert [path for path in paths if "google" not in path] == []  # the browser's own


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_the_browser_would_tell(asked: tuple[str, list[str]], tmp_path: Path) -> None:
    """A page that is too wide, asks for a picture and runs a script is found out."""
    proxy, paths = asked
    bad = (
        '<h1>x</h1><svg width="50" height="9"><text>a</text></svg><p style="width: 999px">x</p>'
        '<img src="http://example.invalid/x.png"><script>ran = true</script>'
    )
    found = opened(bad, PHONE, False, proxy, tmp_path)
    assert isinstance(found["overflow"], int)
    assert found["overflow"] > 500
    assert found["run"] is True
    assert "http://example.invalid/x.png" in paths
