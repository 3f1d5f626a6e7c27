"""What a dry run counts, against slow counts of the same annotations; and that it touches nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import command_line
from pipelines.config import RecipeConfig, override
from pipelines.config.presets import preset
from pipelines.data.annotations import benchmarks
from pipelines.data.clip_order import ClipOrder
from pipelines.data.features.cache import IMPORTED, FeatureMeta
from pipelines.errors import UserError
from pipelines.recipes import counts, dry_run
from pipelines.recipes.costs import Cost, Work, backbone_of, costs_of
from pipelines.recipes.facts import Facts, facts_of
from pipelines.recipes.rates import NODES
from s5.config import BackboneConfig
from s5.models.backbone import Backbone

DOCS = Path(__file__).parents[3] / "docs/benchmarks.md"
TINY: dict[str, Any] = {
    f"{stage}.model.backbone.{key}": value
    for stage in ("encode", "pretrain", "finetune")
    for key, value in (("name", "vit_tiny_patch16_224"), ("depth", 1), ("frame_size", 64))
}
BATCHES = {"pretrain.loop.batch_size": 4, "finetune.loop.batch_size": 4}
LENGTHS = {f"v{number}": 20 + 7 * number for number in range(30)}


@pytest.fixture
def year(tmp_path: Path) -> RecipeConfig:
    """Write an LVU of 30 videos: 12 to train on, 8 to validate, 10 to test."""
    folder = tmp_path / "lvu_1.0/year"
    folder.mkdir(parents=True)
    header, names = "class_id class_name youtube_id imdb_id\n", list(LENGTHS)
    for split, videos in (("train", names[:12]), ("val", names[12:20]), ("test", names[20:])):
        (folder / f"{split}.csv").write_text(header + "".join(f"0 1930 {name} tt1\n" for name in videos))
    rows = "".join(f"{name},{length}\n" for name, length in LENGTHS.items())
    (tmp_path / "lvu_1.0/lvu_durations.csv").write_text(f"videoid,duration\n{rows}")
    changes = {"annotations": str(tmp_path / "lvu_1.0"), "out": str(tmp_path / "out"), "dry_run": True}
    return override(preset("paper-lvu-year").recipe, changes | TINY | BATCHES)


def costs(config: RecipeConfig) -> dict[str, Cost]:
    facts = facts_of(backbone_of(config))
    work = Work(NODES[config.node], facts, "features" in config.stages)
    return {cost.stage: cost for cost in costs_of(config, counts.listing_of(config), work)}


def slow_windows(seconds: float) -> int:
    """Count the starts of windows of 60 s, one a second, that fit; one for a video that is shorter."""
    starts = [start for start in range(10_000) if start + 60 <= seconds]
    return max(1, len(starts))


def test_clips_windows_frames_and_steps_are_those_of_a_slow_count(year: RecipeConfig) -> None:
    found = costs(override(year, {"seeds": 3, "pretrain.probe_videos": 5}))
    train, val, test = (list(LENGTHS.values())[part] for part in (slice(12), slice(12, 20), slice(20, None)))
    frames = sum(len([second for second in range(10_000) if second < each]) for each in (*train, *val, *test))
    tokens = 16 + 1
    assert (found["features"].input, found["features"].tokens) == (f"{frames:,} frames", frames * tokens)
    assert found["features"].disk == frames * tokens * 192 * 2
    # 100 epochs of 3 steps; probes every 10 epochs, on 5 videos of train and of val.
    assert found["pretrain"].steps == 300
    assert found["pretrain"].clips == 2 * 4 * 300 + 10 * (5 + 5)
    assert found["pretrain"].tokens == 2400 * 60 * tokens // 2 + 100 * 60 * tokens
    # 50 epochs of 3 steps; validation every 5.
    validated = 10 * sum(map(slow_windows, val))
    assert found["finetune"].steps == 3 * 150
    assert found["finetune"].clips == 3 * (150 * 4 + validated)
    assert found["evaluate"].clips == 3 * sum(map(slow_windows, test))
    assert found["evaluate"].tokens == found["evaluate"].clips * 60 * tokens


@pytest.mark.parametrize(("epochs", "every", "expected"), [(10, 5, 2), (10, 3, 4), (10, 0, 1), (10, 20, 1), (1, 1, 1)])
def test_evaluations_come_every_so_many_epochs_and_at_the_end(epochs: int, every: int, expected: int) -> None:
    order = ClipOrder(num_videos=9, batch_size=2, epochs=epochs, seed=0)
    due = [
        step
        for step in range(1, order.total_steps + 1)
        if step == order.total_steps or (every and step % (every * order.steps_per_epoch) == 0)
    ]
    assert counts.evaluations(order, every) == len(due) == expected


def test_videos_are_held_out_as_index_does(tmp_path: Path) -> None:
    entry = {"class": "Tea", "recipe_type": 3, "start": 5.0, "end": 45.0}
    subsets = ["training"] * 40 + ["testing"] * 7
    database = {f"v{number}": entry | {"subset": subset} for number, subset in enumerate(subsets)}
    (tmp_path / "COIN.json").write_text(json.dumps({"database": database}))
    config = override(preset("paper-coin").recipe, {"annotations": str(tmp_path)} | TINY | BATCHES)
    listing = counts.listing_of(config)
    assert {split: len(seconds) for split, seconds in listing.seconds.items()} == {"train": 36, "val": 4, "test": 7}
    assert set(listing.all_seconds) == {40.0}
    assert costs(override(config, {"seeds": 2}))["evaluate"].clips == 2 * 7


def test_lengths_that_are_not_stated_are_said(year: RecipeConfig) -> None:
    path = Path(year.annotations) / benchmarks.LVU_DURATIONS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-2], ""]))
    listing = counts.listing_of(year)
    assert listing.assumed == 2
    mean = sum(list(LENGTHS.values())[:-2]) / 28
    assert listing.seconds["test"][-2:] == pytest.approx([mean, mean])
    assert "the lengths of 2 are not stated" in dry_run.plan_of(year)
    path.unlink()
    for given in (year.annotations, f"{year.annotations}/year/"):
        with pytest.raises(UserError, match=rf"annotations is '{given}\S*': a dry run needs lvu_durations\.csv beside"):
            dry_run.plan_of(override(year, {"annotations": given}))


def test_what_a_stage_would_refuse_is_refused(year: RecipeConfig) -> None:
    with pytest.raises(UserError, match=r"pretrain\.loop\.batch_size is 64: split train lists 12 videos"):
        dry_run.plan_of(override(year, {"pretrain.loop.batch_size": 64}))
    with pytest.raises(UserError, match=r"backbone\.name is 'vit_huge': timm has no such model"):
        dry_run.plan_of(override(year, {"pretrain.model.backbone.name": "vit_huge"}))


def test_nothing_is_touched(year: RecipeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    shared = ["--model.backbone.name", "vit_tiny_patch16_224", "--loop.batch-size", "4", "--node", "h200"]
    given = ["--annotations", year.annotations, "--out", year.out, "--dry-run", *shared]
    assert command_line.main(["recipe", "paper-lvu-year", *given]) == 0
    said = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for stage in ("index", "features", "pretrain", "finetune", "evaluate"):
        assert re.search(rf"^{stage} .* ~[\d.,]+$", said, re.MULTILINE), said
    assert "--scale.gpus-per-worker 1" in said


def test_hours_are_proportional_to_tokens_and_unknown_rates_are_said(year: RecipeConfig) -> None:
    once, twice = (costs(override(year, {"seeds": seeds}))["finetune"].seconds for seeds in (1, 2))
    assert once is not None
    assert twice == pytest.approx(2 * once)
    unmeasured = {f"{stage}.model.decoder.name": "tsn" for stage in ("pretrain", "finetune")}
    assert costs(override(year, unmeasured))["finetune"].seconds is None
    assert "not measured" in dry_run.plan_of(override(year, unmeasured))
    # Decoding shares the cores with the model on CPUs, and runs beside it on a GPU's node.
    frames, facts = 1000, Facts(tokens=10, width=8, flops=1e9, parameters=1)
    for node in NODES.values():
        parts = 700.0 / node.decoded_s, frames * facts.flops / node.encoder_flops
        whole = Work(node, facts, cached=False).clips_s(frames, 700.0, passes=1)
        assert whole == pytest.approx(sum(parts) if node.shared_cores else max(parts))


def test_decoding_takes_time_by_the_seconds_of_video_that_clips_span(year: RecipeConfig) -> None:
    node, train, val, test = (
        NODES["cpu-2"],
        *(list(LENGTHS.values())[p] for p in (slice(12), slice(12, 20), slice(20, None))),
    )
    stages = ("index", "finetune", "evaluate")
    # 0.47 s a core for a clip of 60 s and one of 15 s.
    assert node.decoded_s == pytest.approx(2 * 75 / 0.47)
    changes = {"stages": stages, "seeds": 1, "finetune.loop.evaluate_every": 0, "finetune.model.backbone.depth": 1}
    config = override(year, changes)
    work = Work(node, replace(facts_of(backbone_of(config)), flops=0.0), cached=False)
    found = {cost.stage: cost.seconds for cost in costs_of(config, counts.listing_of(config), work)}
    timing = node.timing("s5", 60 * 17)
    assert timing is not None
    windows_s = {each: slow_windows(each) * min(60, each) for each in LENGTHS.values()}
    clips = sum(map(slow_windows, test))
    decoding_s = sum(windows_s[each] for each in test) / node.decoded_s
    assert found["evaluate"] == pytest.approx(decoding_s + clips * 60 * 17 * timing.forward_s / timing.tokens)
    trained, validated = 50 * 3 * 4, sum(map(slow_windows, val))
    decoding_s = trained * sum(min(60, each) for each in train) / 12 + sum(windows_s[each] for each in val)
    model_s = 60 * 17 * (trained * timing.train_s + validated * timing.forward_s) / timing.tokens
    assert found["finetune"] == pytest.approx(decoding_s / node.decoded_s + model_s)


def test_batches_of_cached_tokens_are_counted_on_device_and_host(year: RecipeConfig) -> None:
    # Pairs of clips of 4 videos, 60 frames of 17 tokens of width 192, fp16.
    pairs = 2 * 4 * 60 * 17 * 192 * 2
    for prefetch in (0, 3):
        found = costs(override(year, {"pretrain.data.prefetch_batches": prefetch, "seeds": 1}))
        assert found["pretrain"].host == (prefetch + 2) * pairs
        assert found["finetune"].host == 4 * pairs / 2
    facts, listing = facts_of(backbone_of(year)), counts.listing_of(year)
    cached, decoded = (
        {cost.stage: cost.memory for cost in costs_of(year, listing, Work(NODES["h200"], facts, cached))}
        for cached in (True, False)
    )
    assert cached["pretrain"] - decoded["pretrain"] == 2 * pairs


def test_a_stage_that_does_not_run_says_nothing(year: RecipeConfig) -> None:
    alone = {"stages": ("index", "features", "finetune", "evaluate"), "node": "h200"}
    alone |= {"pretrain.model.backbone.name": "vit_huge", "pretrain.model.decoder.ssm.kind": "s4"}
    alone |= {"finetune.model.decoder.ssm.kind": "s4d", "pretrain.scale.gpus_per_worker": 1.0}
    said = dry_run.plan_of(override(year, alone))
    assert "S4 (DPLR)" not in said
    assert "a frame has 17 tokens of width 192" in said
    assert "--scale.gpus-per-worker 1" in said
    gpus = {f"{group}.scale.gpus_per_worker": 1.0 for group in ("encode", "finetune", "evaluate")}
    gpus["pretrain.scale.gpus_per_worker"] = 0.0
    assert "--scale.gpus-per-worker 1" not in dry_run.plan_of(override(year, alone | gpus))


def test_imported_features_may_be_of_any_backbone(year: RecipeConfig, tmp_path: Path) -> None:
    meta = FeatureMeta(
        backbone={"name": "videomae"},
        weights=f"{IMPORTED}digest",
        mean=[],
        std=[],
        precision="",
        frames_per_second=1.0,
        manifest="m",
        tokens=5,
        width=32,
        chunk_frames=64,
    )
    (tmp_path / "ready").mkdir()
    (tmp_path / "ready/features.json").write_text(json.dumps(asdict(meta)))
    names: dict[str, Any] = {f"{stage}.model.backbone.name": "videomae" for stage in ("pretrain", "finetune")}
    names |= {f"{stage}.model.backbone.cls_token": False for stage in ("pretrain", "finetune")}
    config = override(year, {"features": str(tmp_path / "ready"), "seeds": 1} | names)
    said = dry_run.plan_of(config)
    assert "a frame has 5 tokens of width 32" in said
    assert "features  " not in said
    with pytest.raises(UserError, match=r"imported from 'videomae', not 'vit_tiny_patch16_224'"):
        dry_run.plan_of(override(config, {"finetune.model.backbone.name": "vit_tiny_patch16_224"}))


def test_facts_are_those_of_the_model() -> None:
    config = BackboneConfig(name="vit_tiny_patch16_224", depth=1, frame_size=64, cls_token=True)
    facts, backbone = facts_of(config), Backbone(config)
    assert (facts.tokens, facts.width) == (backbone.tokens, backbone.width)
    assert facts.parameters == sum(weight.numel() for weight in backbone.parameters())
    # A block multiplies each of 17 tokens with 12 matrices of 192 x 192, and the tokens with each other twice.
    block = 2 * 17 * 12 * 192**2 + 2 * 2 * 17**2 * 192
    assert facts.flops == pytest.approx(block + 2 * 16 * 192 * 768)


def test_rates_are_those_of_the_benchmarks() -> None:
    text = DOCS.read_text()
    for decoder, timings in NODES["h200"].decoders.items():
        for timing in timings:
            figures = f"{timing.train_s * 1e3:.1f} | {timing.forward_s * 1e3:.1f} | {timing.memory_mib:,.0f} |"
            assert re.search(rf"`{decoder}`.*{re.escape(figures)}", text), (decoder, figures)
    for decoder, timings in NODES["cpu-2"].decoders.items():
        row = next(
            line
            for line in text.splitlines()
            if re.match(rf"\| `{decoder}`( keep 0.5|, fused attention)? \| [01]\.", line)
        )
        cells = [float(cell.replace(",", "")) for cell in row.split("|")[2:-1]]
        expected = []
        for timing, tokens_mib in zip(timings[::-1], (92, 49), strict=True):
            expected += [timing.batch / timing.train_s, timing.batch / timing.forward_s, timing.memory_mib - tokens_mib]
        assert cells == pytest.approx(expected)
    assert math.isclose(NODES["h200"].encoder_flops, 0.31 * 989e12)
