"""Settings in files: YAML words are texts until their setting gives them a type."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.command_line import parse
from pipelines.config import STAGES, RunConfig
from pipelines.config.presets import preset
from pipelines.config.settings_files import in_yaml
from pipelines.errors import UserError

WRITTEN = """
tracking: {uri: off}
lsmcl.mask-ratio: 5e-1
loop:
  epochs: 3
  compile: yes
optim.betas: [0.5, 0.9]
model:
  backbone:
    depth: null
    embed_dim: ~
  decoder.selection.keep_ratio: 0.25
clips.unit: frames
"""


def test_words_are_of_their_settings_types(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(WRITTEN)
    words = "--tracking.uri off --lsmcl.mask-ratio 0.5 --loop.epochs 3 --loop.compile --optim.betas 0.5 0.9"
    words += " --model.backbone.depth None --model.decoder.selection.keep-ratio 0.25 --clips.unit frames"
    assert parse(["pretrain", "--config", str(path)]) == parse(["pretrain", *words.split()])
    # What stands on the command line changes what the file says.
    _, config = parse(["pretrain", "--config", str(path), "--loop.epochs", "4"])
    assert config == parse(["pretrain", *words.split(), "--loop.epochs", "4"])[1]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["base", "quickstart", "paper-lvu-genre"])
def test_what_is_written_is_read_back(stage: str, name: str, tmp_path: Path) -> None:
    config = getattr(preset(name), stage)
    lines = list(in_yaml(stage, config))
    path = tmp_path / "run.yml"
    path.write_text("\n".join(lines))
    assert parse([stage, "--config", str(path)]) == (stage, config)
    # It is YAML to other readers too.
    assert len(yaml.safe_load(path.read_text())) == len(lines)
    changed = sum("  # default " in line for line in lines)
    assert (changed == 0) == (config == getattr(RunConfig(), stage))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"not YAML: while parsing a flow sequence"),
        ("- a\n- b", "it is no mapping of settings to their values; write some"),
        ("just words", "it is no mapping of settings to their values; write some"),
        ("", "it holds no settings; write some"),
        ("# loop.epochs: 3", "it holds no settings; write some"),
        ("[loop.epochs]: 3", "not YAML: a key is no word"),
        ("stage: finetune", "it is not of stage 'pretrain'"),
        ("lsmcl.mask_ration: 1", "unknown setting 'lsmcl.mask_ration': did you mean lsmcl.mask_ratio"),
        ("loop.epochs: many", "loop.epochs is 'many': input should be a valid integer"),
        ("loop.epochs: [1, 2]", "--loop.epochs is given several values: give one"),
        ("loop.epochs:", "loop.epochs is '': input should be a valid integer"),
        ("loop:\n  # epochs: 3", "loop is a group of settings: write one of them, as in loop.epochs"),
        ("loop: {}", "loop is a group of settings: write one of them, as in loop.epochs"),
        (
            "model.backbone: [name]",
            "model.backbone is a group of settings: write one of them, as in model.backbone.name",
        ),
        ("out: {}", "out is {}: input should be a valid string"),
        ("out: null", "out is null: leave it out"),
        ("loop: {epochs: ~}", "loop.epochs is null: leave it out"),
        ("optim.betas: NULL", "optim.betas is null: leave it out"),
        ("model.backbone.depth: '~'", "model.backbone.depth is '~': input should be a valid integer"),
        ("seed: 1\nseed: 2", "seed is given twice: leave one of them out"),
        ("loop: {epochs: 3}\nloop.epochs: 7", "loop.epochs is given twice: leave one of them out"),
        ("loop: {epochs: 3, epochs: 4}", "epochs is given twice: leave one of them out"),
        ("lsmcl.mask-ratio: 0.5\nlsmcl.mask_ratio: 0.6", "lsmcl.mask_ratio is given twice: leave one of them out"),
        ("lsmcl.jitter: 0.5\nviews.jitter: 0.6", "views.jitter is given twice: leave one of them out"),
        ("lsmcl.mask_ratio: 1.5", "lsmcl.mask_ratio is 1.5: give a value in"),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        parse(["pretrain", "--config", str(path)])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "it holds no settings; write some"),
        ("[]", "it is no mapping of settings to their values; write some"),
        ('{"loop": 3}', "loop is a group of settings: write one of them, as in loop.epochs"),
        ('{"out": null}', "out is None: input should be a valid string"),
        ('{"loop": {"epochs": 3, "epochs": 4}}', "epochs is given twice: leave one of them out"),
        ('{"loop": {"epochs": 3}, "loop.epochs": 4}', "loop.epochs is given twice: leave one of them out"),
    ],
)
def test_mistakes_in_json_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        parse(["pretrain", "--config", str(path)])


@pytest.mark.parametrize("word", ["'~'", '"null"', "null-run", "off"])
def test_quoted_words_are_texts(word: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"tracking.run_name: {word}")
    assert parse(["pretrain", "--config", str(path)])[1].tracking.run_name == word.strip("'\"")
