"""What the study found: tables with intervals over seeds, where the kept tokens lie, and figures.

Shapes: V videos, U time steps, N tokens of a step, L = U x N, K kept, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipelines.config import SampleConfig
from pipelines.data.features.reader import FeatureReader
from pipelines.data.rendering import VideoPlan, step_pixels
from pipelines.plots.drawing import Drawing
from pipelines.plots.sweeps import tradeoff
from pipelines.reporting.table import Table, markdown
from pipelines.running.intervals import interval
from pipelines.stages.sample import draw_videos
from pipelines.tuning.ready_spaces import KEEP_RATIO
from s5 import load_model
from s5.config import ClipConfig
from s5.models.video_model import VideoModel
from s5.video.clip_times import protocol_times
from tests.bench.record import commit, machine
from tests.bench.selection import highest_logits

FRAMES = 60
"""Frames of the clips, of all sweeps but those over frames."""
EVERY = 4
"""Of each so many held-out videos, which are listed class by class, the tokens of one are looked at."""
TELLS = 1 / 16
"""Share of a token's pixels that show the object of a step, from which on the token counts as informative."""
DROPPED = (0.0, 0.1, 0.3, 0.6)
"""Shares of the tokens that are missing in evaluation."""
BATCH = 30
"""Videos that a model sees at once."""
FEATURES = "model.decoder.selection.features"
PROBES = ("knn/top1", "linear/top1", "train/embedding_spread")
DECODERS = ("decoders", "attention")
KEPT = {
    "precision": "kept ones that tell",
    "recall": "telling ones kept",
    "accuracy": "accuracy, some videos",
    "highest logits": "of the highest logits",
}
"""What is shown of trials that select."""
SELECTING = {"masking": "random", "selection": "linear", "transformer": "transformer"}
"""Sweeps whose trials select, and the generator they have."""
SWEEPS = (
    "masking",
    "selection",
    "transformer",
    "scratch",
    "from-lsmcl",
    "from-no-masking",
    "from-same-stride",
    "decoders",
    "attention",
)


def write_results(out: Path, sample: SampleConfig) -> None:
    """Write study.json, study.md and figures below the study's folder, and print the tables.

    Args:
        out: the study's folder.
        sample: what its videos were rendered from.
    """
    sweeps = {name: trials(out, name) for name in SWEEPS if (out / name / "sweep.parquet").exists()}
    videos = held_out(out, sample)
    robust = {
        name: dropped(videos, of_all)
        for name in ("scratch", "from-lsmcl")
        if (of_all := [trial for trial in sweeps.get(name, ()) if trial["setting"] == "labels=100"])
    }
    found = {
        "machine": machine(torch.device("cpu")),
        "commit": commit(),
        "seconds": json.loads((out / "seconds.json").read_text()),
        "training_seconds": sum(trial["train/seconds"] for rows in sweeps.values() for trial in rows),
        "settings": {name: settings(rows) for name, rows in sweeps.items()},
        "telling": videos.tells_VL.float().mean().item(),
        "kept": {name: where_kept(videos, whole(sweeps[name])) for name in SELECTING if name in sweeps},
        "probes": {path.parent.name: probes(path) for path in sorted(out.glob("pretrained/*/result.json"))},
        "dropped": robust,
    }
    (out / "study.json").write_text(json.dumps(found, indent=2) + "\n")
    text = markdown("Study", in_words(found), tables(found))
    (out / "study.md").write_text(text)
    for name, drawing in drawings(found).items():
        (out / f"{name}.png").write_bytes(drawing.png)
    print(f"\n{text}\nwrote study.json, study.md, costs.png and kept.png in {out}")


def trials(out: Path, name: str) -> list[dict[str, Any]]:
    """Return the finished trials of a sweep, as `sweep.parquet` has them; a manifest by its share of the labels."""
    rows = pq.read_table(out / name / "sweep.parquet").to_pylist()
    named = [row | {"setting": f"labels={Path(row['manifest']).name}"} if "manifest" in row else row for row in rows]
    return [row for row in named if row["status"] == "finished"]


def whole(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the trials on clips of all frames that do not keep all tokens."""
    return [row for row in rows if row.get("clips.frames", FRAMES) == FRAMES and row.get(KEEP_RATIO, [0.0]) != [1.0]]


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
    return {name: metrics[name] for name in PROBES}


# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Videos:
    """Held-out videos, as the models see them."""

    clips: Tensor
    """Cached tokens (V, U, N, D)."""
    labels_V: Tensor
    tells_VL: Tensor
    """Which tokens tell."""


def held_out(out: Path, sample: SampleConfig) -> Videos:
    """Return some held-out videos of every class."""
    reader = FeatureReader(str(out / "features"))
    plans = {plan.path.removesuffix(".mp4"): plan for plan in draw_videos(sample)}
    table = pq.read_table(out / "index" / "manifest.parquet")
    rows = [row for row in table.to_pylist() if row["split"] == "val"][::EVERY]
    tokens, tells = [], []
    for row in rows:
        (times_U,) = protocol_times("whole", ClipConfig(frames=FRAMES), row["start_s"], row["end_s"], row["fps"], 1)
        frames_U = reader.frames(row["video_id"], times_U)
        own = np.empty((FRAMES, reader.meta.tokens, reader.meta.width), np.float16)
        reader.read(row["video_id"], frames_U, own)
        tokens.append(torch.from_numpy(own))
        shown_U = frames_U / reader.meta.frames_per_second
        tells.append(torch.from_numpy(telling(plans[row["video_id"]], shown_U, reader.meta.tokens)))
    return Videos(torch.stack(tokens), torch.tensor([row["label"] for row in rows]), torch.stack(tells))


def telling(plan: VideoPlan, times_U: Any, tokens: int) -> Any:
    """Return (L,): which tokens of the frames at these times show the object of a step."""
    at = np.clip(np.rint(times_U * plan.fps).astype(int), 0, plan.frames - 1)
    side = round(tokens**0.5)
    patch = plan.size // side
    shares = step_pixels(plan)[at].reshape(len(at), side, patch, side, patch).mean((2, 4))
    return shares.reshape(-1) >= TELLS


@torch.no_grad()
def where_kept(videos: Videos, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by setting, of trials that select, the share of kept tokens that tell (`precision`), of telling tokens
    that are kept (`recall`), the accuracy with noise as in training and of the highest logits, and what guides."""
    found: dict[str, dict[str, list[float]]] = {}
    features: dict[str, str] = {}
    for row in rows:
        model = load_model(row["trained_checkpoint"]).model
        accuracy, kept_VK = answers(model, videos)
        with highest_logits(model) as is_learned:
            plain = {"highest logits": answers(model, videos)[0]} if is_learned else {}
        hits_V = videos.tells_VL.gather(1, kept_VK).sum(1)
        shares = {"precision": hits_V / kept_VK.shape[1], "recall": hits_V / videos.tells_VL.sum(1)}
        values = {key: share_V.mean().item() for key, share_V in shares.items()}
        each = found.setdefault(row["setting"], {})
        features[row["setting"]] = row.get(FEATURES) or ""
        for key, value in (values | {"accuracy": accuracy} | plain).items():
            each.setdefault(key, []).append(value)
    return {
        setting: {key: summary(values) for key, values in each.items()} | {"features": features[setting]}
        for setting, each in sorted(found.items())
    }


def answers(model: VideoModel, videos: Videos) -> tuple[float, Tensor]:
    """Return the accuracy on videos, and the tokens (V, K) that the first block keeps."""
    found = [model(part.float()) for part in videos.clips.split(BATCH)]
    hits_V = torch.cat([each.logits_BC.argmax(1) for each in found]) == videos.labels_V
    return hits_V.float().mean().item(), torch.cat([each.kept[0] for each in found])


@torch.no_grad()
def dropped(videos: Videos, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the accuracy where so large a share of the tokens, drawn at random, is missing in evaluation."""
    order_VL = torch.rand(videos.tells_VL.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    accuracies: dict[float, list[float]] = {share: [] for share in DROPPED}
    for row in rows:
        model = load_model(row["trained_checkpoint"]).model
        assert model.head is not None
        for share, reached in accuracies.items():
            keep_VK = order_VL[:, round(share * order_VL.shape[1]) :].sort(1).values
            hits = 0
            for part in torch.arange(len(keep_VK)).split(BATCH):
                tokens = model.tokens(videos.clips[part].float(), keep_BK=keep_VK[part])
                out = model.decode(tokens, None, FRAMES, keep_VK[part])
                hits += int((model.head(out.features_BD).argmax(1) == videos.labels_V[part]).sum())
            reached.append(hits / len(keep_VK))
    return {str(share): summary(reached) for share, reached in accuracies.items()}


# --- showing --------------------------------------------------------------------------------------------------------


def in_words(found: Mapping[str, Any]) -> str:
    """Return what the study took, and the share of tokens that tell."""
    seconds, machine = found["seconds"], found["machine"]
    return (
        f"{sum(seconds.values()) / 60:.0f} minutes ({', '.join(f'{k} {v:.0f} s' for k, v in seconds.items())}), "
        f"{found['training_seconds'] / 60:.0f} minutes of training in the sweeps' trials, {machine['cores']} cores of "
        f"{machine['cpu']}, commit {found['commit']}. {found['telling']:.3f} of the tokens tell."
    )


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the accuracies, of what is kept, of the probes, and of dropped tokens."""
    parts = []
    for name, rows in found["settings"].items():
        lines = [(setting, cell(row), f"{row['seconds']:.1f}") for setting, row in rows.items()]
        parts.append(Table(name, ("setting", "accuracy", "seconds of training"), tuple(lines)))
    for name, rows in found["kept"].items():
        lines = [(setting, *(cell(row[key]) if key in row else "" for key in KEPT)) for setting, row in rows.items()]
        parts.append(Table(f"{name}: tokens", ("setting", *KEPT.values()), tuple(lines)))
    probes = [(name, *(f"{row[key]:.3f}" for key in PROBES)) for name, row in found["probes"].items()]
    parts.append(Table("probes", ("pretraining", *PROBES), tuple(probes)))
    robust = [(name, *(cell(row[str(share)]) for share in DROPPED)) for name, row in found["dropped"].items()]
    parts.append(Table("tokens dropped", ("all labels", *(f"{share:g}" for share in DROPPED)), tuple(robust)))
    return parts


def cell(row: Mapping[str, Any]) -> str:
    """Return a mean with its interval."""
    bounds = row["interval"]
    return f"{row['mean']:.3f}" + (f" ({bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else "")


def drawings(found: Mapping[str, Any]) -> dict[str, Drawing]:
    """Draw, with a point a seed, the accuracy of all decoders against their seconds, and where kept tokens lie."""
    decoders = [pair for name in DECODERS for pair in found["settings"].get(name, {}).items()]
    costs = {
        setting.partition("=")[2]: [(row["seconds"], accuracy) for accuracy in row["values"]]
        for setting, row in decoders
    }
    kept: dict[str, list[tuple[float, float]]] = {}
    for name, rows in found["kept"].items():
        for row in rows.values():
            group = f"{SELECTING[name]} on {row['features']} features" if row["features"] else SELECTING[name]
            pairs = zip(row["recall"]["values"], row["precision"]["values"], strict=True)
            kept.setdefault(group, []).extend(pairs)
    drawn = {}
    if costs:
        drawn["costs"] = tradeoff(costs, "Seconds of training, one core", "Accuracy, held-out videos")
    if kept:
        drawn["kept"] = tradeoff(kept, "Telling tokens kept", "Kept tokens that tell")
    return drawn
