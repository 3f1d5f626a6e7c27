"""The row of a table that a recipe ends with: the published results, and ours with mean and interval over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pipelines.config import RecipeConfig
from pipelines.data.annotations.benchmarks import NAMES
from pipelines.recipes.published import published
from pipelines.running.intervals import interval

ROW = "row.json"
DECODERS = {"s5": "S5", "vis4mer": "ViS4mer", "lst": "LST", "performer": "Performer", "orthoformer": "Orthoformer"}
DECODERS |= {"tsn": "TSN", "vtm": "Learnable VTM"}


def method_of(config: RecipeConfig) -> str:
    """Return what is run in the words of the tables, such as `S5 + LSMCL`."""
    pretrained = "pretrain" in config.stages or bool(config.finetune.checkpoint)
    return method_in_words(config.finetune.model.decoder.name, pretrained)


def method_in_words(decoder: str, pretrained: bool) -> str:
    """Return a decoder's name in the tables, and that it was pretrained."""
    name = DECODERS.get(decoder, decoder)
    return f"{name} + LSMCL" if pretrained else name


def row_of(config: RecipeConfig, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what row.json holds.

    Args:
        config: the recipe.
        results: what `evaluate` returned for each seed, in order.
    """
    split, regression = config.evaluate.split, config.finetune.task == "regression"
    key, factor = ("mse", 1.0) if regression else ("accuracy", 100.0)
    values = [factor * result["metrics"][f"{split}/{key}"] for result in results]
    listed = int(results[0]["metrics"][f"{split}/listed"])
    videos = [int(result["metrics"][f"{split}/videos"]) for result in results]
    bounds = interval(values)
    return {
        "recipe": config.name,
        "benchmark": config.benchmark,
        "task": config.task,
        "metric": "mean squared error" if regression else "top-1 %",
        "split": split,
        "method": method_of(config),
        "mean": fmean(values),
        "interval": list(bounds) if bounds else None,
        "seeds": dict(zip(map(str, range(len(values))), values, strict=True)),
        "listed": listed,
        "videos": min(videos),
        "rejects": listed - min(videos),
        "published": published(config.benchmark, config.task),
    }


def in_words(row: Mapping[str, Any]) -> str:
    """Return the row as lines: a published result each, and ours last."""
    where = " ".join(filter(None, (NAMES[row["benchmark"]], row["task"])))
    ours = f"{row['method']}, here"
    width = max(map(len, (*row["published"], ours)))
    lines = [f"{where}, {row['split']}, {row['metric']}"]
    lines += [f"  {method:<{width}}  {value:6.2f}" for method, value in row["published"].items()]
    spread = "one seed"
    if row["interval"]:
        low, high = row["interval"]
        spread = f"mean of {len(row['seeds'])} seeds of fine-tuning, 95 % interval {low:.2f} to {high:.2f}"
    lines.append(f"  {ours:<{width}}  {row['mean']:6.2f}  ({spread}; {coverage(row)})")
    return "\n".join(lines)


def coverage(row: Mapping[str, Any]) -> str:
    """Return how many of the listed videos our result is on, and whether it can be compared."""
    if not row["rejects"]:
        return f"on all {row['listed']} listed videos"
    return f"on {row['videos']} of {row['listed']} listed videos, so not comparable: {row['rejects']} rejects"
