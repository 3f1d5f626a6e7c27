"""A dry run: what each stage of a recipe would read, train and write, and the hours that it would take on a node."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.config import EvaluateConfig, FeaturesConfig, FinetuneConfig, PretrainConfig, RecipeConfig
from pipelines.recipes import steps
from pipelines.recipes.costs import Cost, Work, backbone_of, costs_of
from pipelines.recipes.counts import Listing, listing_of
from pipelines.recipes.facts import facts_of
from pipelines.recipes.rates import NODES, Node

GIB = 2**30
HEADER = ("stage", "input", "clips", "steps", "tokens", "device memory", "host memory", "disk", "hours")


def plan_of(config: RecipeConfig) -> str:
    """Return the text of a recipe's dry run; nothing is written, and no video is read.

    Raises:
        UserError: the recipe, its annotations or settings are wrong.
    """
    steps.check(config)
    listing = listing_of(config)
    cached = bool(config.features) or "features" in config.stages
    work = Work(NODES[config.node], facts_of(backbone_of(config)), cached)
    costs = list(costs_of(config, listing, work))
    return "\n".join([*_head(config, listing, work), *table([*costs, total("all", costs)]), *_notes(config, work.node)])


def _head(config: RecipeConfig, listing: Listing, work: Work) -> list[str]:
    facts, hours = work.facts, sum(listing.all_seconds) / 3600
    lines = [
        f"recipe {config.name}, dry run on node {config.node}: {work.node.description}",
        f"{len(listing.all_seconds):,} videos are listed, {hours:,.1f} hours; a frame has {facts.tokens} tokens of "
        f"width {facts.width} and takes {facts.flops / 1e9:,.1f} GFLOP",
    ]
    if listing.assumed:
        lines.append(f"the lengths of {listing.assumed:,} are not stated: the mean of the others stands in for them")
    if config.features:
        lines.append(f"features are ready in {config.features}")
    return [*lines, ""]


def table(costs: Sequence[Cost]) -> list[str]:
    """Return the lines of a table of costs."""
    rows = [HEADER, *(_cells(cost) for cost in costs)]
    used = [i for i, title in enumerate(HEADER) if title in ("stage", "input", "hours") or any(r[i] for r in rows[1:])]
    rows = [tuple(row[i] for i in used) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(_aligned, row, widths, range(len(row)))).rstrip() for row in rows]


def total(stage: str, costs: Sequence[Cost], input: str = "", times: float = 1) -> Cost:
    """Return what stages cost that run one after another, or so many `times` as much."""
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    return Cost(
        stage=stage,
        input=input,
        memory=max(cost.memory for cost in costs),
        host=max(cost.host for cost in costs),
        disk=times * sum(cost.disk for cost in costs),
        seconds=times * sum(known) if len(known) == len(costs) else None,
    )


def _aligned(cell: str, width: int, column: int) -> str:
    return f"{cell:<{width}}" if column < HEADER.index("clips") else f"{cell:>{width}}"


def _cells(cost: Cost) -> tuple[str, ...]:
    def number(value: float, text: str) -> str:
        return text if value else ""

    hours = "not measured" if cost.seconds is None else f"~{cost.seconds / 3600:,.2f}"
    return (
        cost.stage,
        cost.input,
        number(cost.clips, f"{cost.clips:,}"),
        number(cost.steps, f"{cost.steps:,}"),
        number(cost.tokens, f"{cost.tokens / 1e6:,.1f} M"),
        number(cost.memory, f"~{cost.memory / GIB:,.1f} GiB"),
        number(cost.host, f"~{cost.host / GIB:,.1f} GiB"),
        number(cost.disk, f"{cost.disk / 1e9:,.1f} GB" if cost.disk >= 1e8 else f"{cost.disk / 1e6:,.1f} MB"),
        hours,
    )


def rates_used(node: Node) -> list[str]:
    """Return where the rates of a node come from."""
    return [
        "~ marks extrapolations, by tokens of a decoder and FLOPs of a backbone, from these rates of "
        "docs/benchmarks.md; memory is without a backbone's buffers while it encodes:",
        *(f"  {name}: {source}" for name, source in node.sources.items()),
    ]


def _notes(config: RecipeConfig, node: Node) -> list[str]:
    lines = ["", "Nothing was written.", *rates_used(node)]
    settings = steps.settings_of(steps.steps_of(config))
    kinds = {
        each.model.decoder.ssm.kind for each in settings.values() if isinstance(each, PretrainConfig | FinetuneConfig)
    }
    if "s4" in kinds:
        lines.append("  The recipe's state spaces are S4 (DPLR), whose rates are taken to be those of S4D.")
    working = (FeaturesConfig, PretrainConfig, FinetuneConfig, EvaluateConfig)
    scales = [each.scale for each in settings.values() if isinstance(each, working)]
    if config.node == "h200" and not all(scale.gpus_per_worker for scale in scales):
        lines.append(
            "  These are rates of bf16 on a GPU: run it with --scale.gpus-per-worker 1 --loop.precision bf16 "
            "--encode.precision bf16."
        )
    return lines
