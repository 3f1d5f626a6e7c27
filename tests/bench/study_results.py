"""What the study found: tables with intervals over seeds, where the kept tokens lie, and a figure.

Shapes: V videos, U time steps, N tokens of a step, L = U x N, K kept, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipelines.data.features.reader import FeatureReader
from pipelines.data.rendering import VideoPlan, step_pixels
from pipelines.running.intervals import interval
from pipelines.stages.sample import draw_videos
from s5 import load_model
from s5.config import ClipConfig
from s5.video.clip_times import protocol_times
from tests.bench.record import commit, machine

if TYPE_CHECKING:
    from tests.bench.study import Study

FRAMES = 60
"""Frames of the clips, of all sweeps but those over frames."""
VIDEOS = 120
"""Held-out videos of which the kept tokens are looked at."""
TELLS = 1 / 16
"""Share of a token's pixels that show the object of a step, from which on the token counts as informative."""
DROPPED = (0.0, 0.1, 0.3, 0.6)
SWEEPS = (
    "decoders",
    "attention",
    "selection",
    "backbone-features",
    "scratch",
    "from-lsmcl",
    "from-no-masking",
    "from-same-stride",
    "frames",
    "frames-learned",
)


def write_results(study: Study) -> None:
    """Write study.json, study.md and study.png below the study's folder, and print the tables."""
    sweeps = {name: trials(study, name) for name in SWEEPS if Path(study.path(name, "sweep.parquet")).exists()}
    names = [name for name in ("selection", "backbone-features") if name in sweeps]
    rows = {name: settings(sweeps[name]) for name in sweeps}
    kept = {name: where_kept(study, sweeps[name]) for name in names}
    robust = {
        name: dropped(study, [trial for trial in sweeps[name] if trial["setting"] == "labels=100"])
        for name in ("scratch", "from-lsmcl")
        if name in sweeps
    }
    found = {
        "machine": machine(torch.device("cpu")),
        "commit": commit(),
        "seconds": json.loads(Path(study.path("seconds.json")).read_text()),
        "training_seconds": sum(t["train/seconds"] for each in sweeps.values() for t in each),
        "settings": rows,
        "kept": kept,
        "probes": {path.parent.name: probes(path) for path in sorted(study.out.glob("pretrained/*/result.json"))},
        "dropped": robust,
    }
    Path(study.path("study.json")).write_text(json.dumps(found, indent=2) + "\n")
    text = "\n\n".join(tables(found))
    Path(study.path("study.md")).write_text(text + "\n")
    draw(found).savefig(study.path("study.png"), dpi=110)
    print(f"\n{text}\n\nwrote {study.path('study.md')}")


def trials(study: Study, name: str) -> list[dict[str, Any]]:
    """Return the finished trials of a sweep, as `sweep.parquet` has them; a manifest by its share of the labels."""
    rows = pq.read_table(study.path(name, "sweep.parquet")).to_pylist()
    named = [row | {"setting": f"labels={Path(row['manifest']).name}"} if "manifest" in row else row for row in rows]
    return [row for row in named if row["status"] == "finished"]


def settings(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by setting the held-out accuracy of each seed, its mean and interval, and the mean seconds of training."""
    found: dict[str, dict[str, Any]] = {}
    for setting in sorted({row["setting"] for row in rows}):
        of = sorted((row for row in rows if row["setting"] == setting), key=lambda row: row["seed"])
        accuracy = [row["val/accuracy"] for row in of]
        found[setting] = summary(accuracy) | {"seconds": fmean(row["train/seconds"] for row in of)}
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return values with their mean and its 95 % interval by Student's t."""
    return {"values": list(values), "mean": fmean(values), "interval": interval(values)}


def probes(path: Path) -> dict[str, float]:
    """Return the accuracies of the probes of a pretraining."""
    metrics = json.loads(path.read_text())["metrics"]
    return {name: metrics[name] for name in ("knn/top1", "linear/top1", "train/embedding_spread") if name in metrics}


# --- tokens ---------------------------------------------------------------------------------------------------------


@cache
def held_out(study: Study) -> tuple[Tensor, Tensor, Tensor]:
    """Return of the first held-out videos the tokens (V, U, N, D), the labels (V,), and which tokens (V, L) tell."""
    reader = FeatureReader(study.path("features"))
    plans = {plan.path: plan for plan in draw_videos(study.sample)}
    table = pq.read_table(study.path("index", "manifest.parquet"))
    videos = [row for row in table.to_pylist() if row["split"] == "val"][:VIDEOS]
    config = ClipConfig(frames=FRAMES)
    tokens, tells = [], []
    for row in videos:
        (times_U,) = protocol_times("whole", config, row["start_s"], row["end_s"], row["fps"], 1)
        frames_U = reader.frames(row["video_id"], times_U)
        own = np.empty((FRAMES, reader.meta.tokens, reader.meta.width), np.float16)
        reader.read(row["video_id"], frames_U, own)
        tokens.append(torch.from_numpy(own))
        plan = next(plan for path, plan in plans.items() if path.startswith(row["video_id"]))
        tells.append(torch.from_numpy(telling(plan, frames_U / reader.meta.frames_per_second, reader.meta.tokens)))
    return torch.stack(tokens), torch.tensor([row["label"] for row in videos]), torch.stack(tells)


def telling(plan: VideoPlan, times_U: Any, tokens: int) -> Any:
    """Return (L,): which tokens of the frames at these times show the object of a step."""
    at = np.clip(np.rint(times_U * plan.fps).astype(int), 0, plan.frames - 1)
    side = round(tokens**0.5)
    patch = plan.size // side
    shares = step_pixels(plan)[at].reshape(len(at), side, patch, side, patch).mean((2, 4))
    return shares.reshape(-1) >= TELLS


@torch.no_grad()
def where_kept(study: Study, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by setting, of trials that select: the share of kept tokens that tell, of telling tokens that are kept,
    and both for a random choice."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        model = load_model(row["trained_checkpoint"]).model
        clips, _, tells_VL = held_out(study)
        kept = [model.encode(part.float()).kept for part in clips.split(30)]
        if not kept[0]:
            continue
        kept_VK = torch.cat([each[0] for each in kept])
        kept_VL = torch.zeros_like(tells_VL).scatter_(1, kept_VK, True)
        both_V = (kept_VL & tells_VL).sum(1)
        each = found.setdefault(row["setting"], {"precision": [], "recall": [], "telling": [], "keep": []})
        each["precision"].append((both_V / kept_VL.sum(1)).mean().item())
        each["recall"].append((both_V / tells_VL.sum(1)).mean().item())
        each["telling"].append(tells_VL.float().mean().item())
        each["keep"].append(kept_VL.float().mean().item())
    return {setting: {key: summary(values) for key, values in each.items()} for setting, each in sorted(found.items())}


@torch.no_grad()
def dropped(study: Study, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the accuracy where so large a share of the tokens, drawn at random, is missing in evaluation."""
    clips, labels_V, tells_VL = held_out(study)
    found = {}
    for share in DROPPED:
        accuracies = []
        for row in rows:
            model = load_model(row["trained_checkpoint"]).model
            generator = torch.Generator().manual_seed(0)
            order_VL = torch.rand(tells_VL.shape, generator=generator).argsort(1)
            keep_VK = order_VL[:, round(share * order_VL.shape[1]) :].sort(1).values
            assert model.head is not None
            hits = 0
            for part in torch.arange(len(clips)).split(30):
                tokens = model.tokens(clips[part].float(), keep_BK=keep_VK[part])
                out = model.decode(tokens, None, clips.shape[1], keep_VK[part])
                hits += int((model.head(out.features_BD).argmax(1) == labels_V[part]).sum())
            accuracies.append(hits / len(clips))
        found[str(share)] = summary(accuracies)
    return found


# --- showing --------------------------------------------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> list[str]:
    """Return the tables in Markdown, each with a heading."""
    parts = []
    for name, rows in found["settings"].items():
        kept = found["kept"].get(name, {})
        lines = [
            [setting, cell(row), f"{row['seconds']:.1f}"]
            + ([cell(kept[setting]["precision"]), cell(kept[setting]["recall"])] if setting in kept else ["", ""])
            for setting, row in rows.items()
        ]
        header = ["setting", "accuracy", "training s", "kept that tell", "telling kept"]
        parts.append(f"### {name}\n\n" + markdown(header, lines))
    if found["kept"]:
        share = fmean(v for name in found["kept"].values() for row in name.values() for v in row["telling"]["values"])
        parts.append(f"Share of tokens that tell: {share:.3f}.")
    probes = [[name, *(f"{row.get(key, float('nan')):.3f}" for key in PROBES)] for name, row in found["probes"].items()]
    parts.append("### probes\n\n" + markdown(["pretraining", *PROBES], probes))
    lines = [[name, *(cell(row[str(share)]) for share in DROPPED)] for name, row in found["dropped"].items()]
    parts.append("### tokens dropped\n\n" + markdown(["all labels", *(f"{share:g}" for share in DROPPED)], lines))
    seconds = found["seconds"]
    parts.append(
        f"{sum(seconds.values()) / 60:.0f} minutes ({', '.join(f'{k} {v:.0f} s' for k, v in seconds.items())}); "
        f"{found['training_seconds'] / 60:.0f} minutes of training in the sweeps' trials, {found['machine']['cores']} "
        f"cores of {found['machine']['cpu']}, commit {found['commit']}"
    )
    return parts


PROBES = ("knn/top1", "linear/top1", "train/embedding_spread")


def cell(row: Mapping[str, Any]) -> str:
    """Return a mean with its interval."""
    bounds = row["interval"]
    return f"{row['mean']:.3f}" + (f" ({bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else "")


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def draw(found: Mapping[str, Any]) -> Figure:
    """Draw accuracy against training time of all decoders, and where the kept tokens lie."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    decoders = found["settings"].get("decoders", {}) | found["settings"].get("attention", {})
    for setting, row in decoders.items():
        low, high = row["interval"] or (row["mean"], row["mean"])
        left.errorbar(row["seconds"], row["mean"], [[row["mean"] - low], [high - row["mean"]]], fmt="o", capsize=3)
        left.annotate(setting.partition("=")[2], (row["seconds"], row["mean"]), (6, 6), textcoords="offset points")
    left.axhline(1 / 6, color="grey", linestyle=":")
    left.set(xscale="log", xlabel="seconds of training, one core", ylabel="accuracy, held-out videos", ylim=(0, 1.05))
    for name, rows in found["kept"].items():
        for setting, row in rows.items():
            label = f"{name}: {setting.replace('generator=', '').replace('keep_ratio=', 'keep ')}"
            right.plot(row["recall"]["mean"], row["precision"]["mean"], "o")
            at = (row["recall"]["mean"], row["precision"]["mean"])
            right.annotate(label, at, (5, 4), textcoords="offset points", fontsize=7)
            right.axhline(row["telling"]["mean"], color="grey", linestyle=":")
    right.set(xlabel="telling tokens kept", ylabel="kept tokens that tell", xlim=(0, 1.3), ylim=(0, 1))
    return figure
