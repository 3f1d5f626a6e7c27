"""Completion: what bash offers for the words of a command line."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from pathlib import Path

import pytest

from pipelines import command_line
from pipelines.config import STAGES


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "s5.bash"
    with path.open("w") as file, contextlib.redirect_stdout(file), pytest.raises(SystemExit) as ended:
        command_line.main(["completion", "bash"])
    assert ended.value.code in (0, None)
    return path


def offered(script: Path, *words: str) -> list[str]:
    """Return what bash offers for the last word."""
    typed = shlex.join(["s5", *words])
    complete = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _tyro_s5"
    run = f"source {script}; {complete}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


def test_bash_completes_stages_settings_and_values(script: Path) -> None:
    assert {*offered(script, "")} - {"-h", "--help"} == {*STAGES}
    assert offered(script, "pretrain", "--lsmcl.mask") == ["--lsmcl.mask-ratio", "--lsmcl.mask-on"]
    assert offered(script, "pretrain", "--lsmcl.mask-on", "") == ["patches", "tokens"]
    assert offered(script, "finetune", "--preset", "quick") == ["quickstart"]
    assert offered(script, "features", "--imp") == ["--import"]
    assert offered(script, "evaluate", "--dry") == ["--dry-run"]
    assert offered(script, "recipe", "--nod") == ["--node"]


def test_what_is_documented_is_where_a_shell_looks(capsys: pytest.CaptureFixture[str]) -> None:
    page = " ".join((Path(__file__).parents[2] / "docs/training.md").read_text().split())
    with pytest.raises(SystemExit):
        command_line.main(["completion", "zsh"])
    # Zsh reads this line of a file that its path of functions has, and nowhere else.
    assert capsys.readouterr().out.startswith("#compdef s5\n")
    assert "`s5 completion zsh > ~/.zfunc/_s5`, where `~/.zshrc` has `fpath+=~/.zfunc` before `compinit`" in page
    # Fish has no process substitution.
    assert "`s5 completion fish > ~/.config/fish/completions/s5.fish`" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "completion takes the name of a shell"), (["bahs"], "unknown shell 'bahs': did you mean bash")],
)
def test_another_shell_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["completion", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
