"""What README and docs say can be done: commands are parsed, examples run, links and paths lead somewhere."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.scripts.scripts import cli as ray_cli

import pipelines
from clusters import doctor, jobs, submit
from pipelines.command_line import parse, take_dry_run
from pipelines.config import STAGES, RunConfig, flatten, override
from pipelines.config.presets import preset
from pipelines.running import stage
from tests.s5.evaluation.test_prediction import trained

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "findings/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
README_LINES, GLOSSARY_TERMS = 130, 15
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = ("s5/", "pipelines/", "clusters/", "tests/", "docs/", "findings/")
# Options of other programs, and of benchmarks, whose own parsers stand inside their main functions.
FOREIGN = {"--allowed-hosts", "--artifacts-destination", "--help", "--preset", "--config"}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language; "" for those without one."""
    return [body for name, body in BLOCK.findall(text_of(page)) if name == language]


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return BLOCK.sub("", text_of(page))


def commands() -> list[str]:
    """Return every command of the sh blocks: lines that end in a backslash are joined, comments removed."""
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    found = dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in lines)
    return [command for command in found if command]


def make_commands() -> list[str]:
    """Return the make commands that the text names beside the sh blocks."""
    codes = [code for page in PAGES for code in CODE.findall(prose(page)) if code.startswith("make ")]
    return list(dict.fromkeys(codes))


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- commands -------------------------------------------------------------------------------------------------------


def save_run(folder: Path, name: str) -> None:
    """Write the run.json that a command with --config reads."""
    path = folder / "run.json"
    path.write_text(json.dumps(stage.to_json(name, getattr(RunConfig(), name))))


def check_stage(words: list[str], tmp_path: Path) -> None:
    """Parse a stage's words; a file named by --config is one of the stage's defaults."""
    if "--config" in words:
        save_run(tmp_path, words[0])
        words[words.index("--config") + 1] = str(tmp_path / "run.json")
    _, words = take_dry_run(words)
    name, config = parse(words)
    assert name == words[0]
    assert type(config) is type(getattr(RunConfig(), name))


def check_job(words: list[str], tmp_path: Path) -> None:
    options = submit.parser().parse_args(words)
    name, config = parse(options.stage)
    assert name in STAGES
    submit.check_paths(config)
    submit.check_tracking(config)


def check_module(module: str, words: list[str], tmp_path: Path) -> None:
    """Parse the words of `python -m MODULE` by the module's own parser."""
    if module == "pipelines":
        check_stage(words, tmp_path)
    elif module == "clusters.doctor":
        doctor.check_places(doctor.asked_by(doctor.parser().parse_args(words)))
    elif module == "clusters.submit":
        check_job(words, tmp_path)
    elif module == "clusters.jobs":
        jobs.parser().parse_intermixed_args(words)
    else:
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"there is no module {module}"
        assert spec.origin is not None
        known = set(re.findall(r'"(--[a-z-]+)"', Path(spec.origin).read_text()))
        assert {word for word in words if word.startswith("--")} <= known


def check_make(words: list[str]) -> None:
    """Have make plan a target, and for a benchmark check that it exists and has the options in ARGS."""
    result = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    name = next((word.removeprefix("bench-") for word in words if word.startswith("bench-")), "NAME")
    if name != "NAME":
        arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
        check_module(f"tests.bench.{name}", shlex.split(" ".join(arguments)), ROOT)


def check_ray(words: list[str]) -> None:
    """Parse the words of `ray COMMAND` by Ray's own command line; a file that it names is there."""
    parameters = ray_cli.commands[words[0]].make_context(words[0], words[1:]).params
    assert all((ROOT / value).is_file() for name, value in parameters.items() if name == "cluster_config_file")


def check_files(words: list[str]) -> None:
    """Check that the files of this repository that another program is given are there."""
    named = [word for word in words if word.startswith(FOLDERS)]
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("command", make_commands())
def test_make_command_in_prose(command: str) -> None:
    check_make(shlex.split(command))


@pytest.mark.parametrize("command", commands())
def test_command_is_parsed(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    match words:
        case ["python", "-m", module, *rest]:
            check_module(module, rest, tmp_path)
        case ["ray", "job", "submit", *rest]:
            script = rest[rest.index("--") + 1 :]
            assert script[:4] == ["sh", "clusters/python.sh", "-m", "pipelines"]
            check_stage(script[4:], tmp_path)
        case ["make", *_]:
            check_make(words)
        case ["export", *settings]:
            assert all("=" in setting for setting in settings)
        case ["ray", *rest]:
            check_ray(rest)
        case ["docker" | "kubectl" | "sbatch" | "chmod", *rest]:
            check_files(rest)
        case [script] if script.startswith("findings/"):
            assert (ROOT / script).is_file()
        case _:
            pytest.fail(f"{command!r} is of no known kind: teach this test to check it")


@pytest.mark.parametrize("name", STAGES)
def test_readme_describes_every_stage(name: str) -> None:
    assert f"\n| `{name}` |" in text_of(ROOT / "README.md")


def known_options() -> set[str]:
    """Return the options of all stages, of clusters.submit and of the benchmarks, with dashes."""
    stages = {f"--{key}" for name in STAGES for key in flatten(getattr(RunConfig(), name))}
    negated = {re.sub(r"(\.|^--)(\w+)$", r"\1no-\2", option) for option in stages}
    parsers: list[argparse.ArgumentParser] = [submit.parser(), doctor.parser()]
    jobs = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    sources = [path.read_text() for path in (*ROOT.glob("tests/bench/*.py"), *ROOT.glob("docs/figures/*.py"))]
    benchmarks = {option for source in sources for option in re.findall(r'"(--[a-z-]+)"', source)}
    # A keyword of Python has an underscore behind it as a setting, and none as an option.
    return {option.removesuffix("_").replace("_", "-") for option in stages | negated | jobs | benchmarks} | FOREIGN


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_options_in_prose_exist(page: Path) -> None:
    known = known_options()
    named = {
        option
        for code in CODE.findall(prose(page))
        for option in re.findall(r"(?<!\S|\")--[a-z][\w.-]*", code)
        if not option.startswith("--a.b")
    }
    assert sorted(option for option in named if option.replace("_", "-") not in known) == []


# --- examples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_python_block_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", [ROOT / "docs/methods.md"], ids=identifier)
def test_library_example_runs(page: Path) -> None:
    (block,) = blocks(page, "python")
    # A narrow model does the same as a wide one.
    names = run_block(block.replace("1024", "64"))
    assert names["out"].features_BD.shape == (1, 8)
    assert names["out"].kept[0].shape == (1, 480)


@pytest.mark.slow
@pytest.mark.cluster
def test_notebook_example_runs(ray_local: None, tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "README.md", "python")
    out = tmp_path / "out/quickstart"
    config = preset("quickstart")
    off = {"tracking.uri": "off"}
    sample = override(config.sample, {"out": str(out / "videos"), "videos": 10} | off)
    pipelines.run("sample", sample)
    pipelines.run("index", override(config.index, {"out": str(out / "index"), "videos": str(out / "videos")} | off))
    video = next((out / "videos").rglob("*.mp4"))
    checkpoint = trained(out / "finetune" / "checkpoints")
    (out / "finetune" / "result.json").write_text(json.dumps({"checkpoint": str(checkpoint)}))
    assert block.count('"out/') == 3
    names = run_block(block.replace('"out/', f'"{tmp_path}/out/').replace("my/video.mp4", str(video)))
    assert names["meta"].kind == "lsmcl"
    assert names["features_BD"].shape == (1, names["model"].decoder.out_width)
    assert names["kept_BK"].shape == (2, 60 * 49 // 2)
    assert names["found"].label in ("a", "b", "c")


def run_block(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block, "<example>", "exec"), names)
    return names


# --- links, paths and sizes -----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def paths(page: Path) -> Iterator[str]:
    """Yield what a page names as a path of this repository, in code or in a tree."""
    trees = [line.split() for block in blocks(page, "") for line in block.splitlines()]
    words = [word for line in trees for word in line]
    words += [word for code in CODE.findall(prose(page)) for word in code.split()]
    for word in words:
        name = word.rstrip(",;:").partition("::")[0]
        if name.startswith(FOLDERS):
            yield name


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_named_paths_exist(page: Path) -> None:
    patterns = [re.sub(r"[A-Z]{2,}", "*", name) for name in paths(page)]
    assert [name for name in patterns if not any(ROOT.glob(name.rstrip("/")))] == []


def test_readme_shows_every_room() -> None:
    rooms = {f"{folder.relative_to(ROOT)}/" for name in ("s5", "pipelines") for folder in (ROOT / name).glob("[a-z]*/")}
    shown = set(paths(ROOT / "README.md"))
    assert {room for room in rooms if (ROOT / room / "__init__.py").is_file()} <= shown


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(LINK.findall(text_of(ROOT / "README.md")))
    assert {identifier(page) for page in PAGES} - {"README.md"} <= linked


def test_every_finding_is_executable_and_listed() -> None:
    listed = set(LINK.findall(text_of(ROOT / "findings/README.md")))
    scripts = sorted((ROOT / "findings").glob("*.sh"))
    assert scripts
    for script in scripts:
        assert script.stat().st_mode & 0o111
        assert script.name in listed
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_sizes() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= README_LINES
    terms = re.findall(r"^\| \*\*", text_of(ROOT / "docs/glossary.md"), re.MULTILINE)
    assert 0 < len(terms) <= GLOSSARY_TERMS
    for picture in ROOT.glob("docs/*.[ps][nv]g"):
        assert picture.stat().st_size <= 150_000
