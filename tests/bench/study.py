"""The study: does the method do on videos what it claims? Through the project's own stages and sweeps.

    make study                       # an hour on 2 CPU cores
    make study ARGS="--quick"        # two seeds, and fewer settings

Videos of six classes that are the six orders of the same three steps, half of each without any step. A small frame
encoder is pretrained on them by LSMCL, without labels, and frozen; its tokens are computed once. All decoders learn
from these tokens, with the same number of steps. A trial evaluates the held-out third once, at its end: nothing is
chosen by it. Settings were found on videos of another seed than `--data-seed`.

The same command resumes. `OUT/study.json` and `study.md` hold what was found, by `tests.bench.study_results`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from safetensors.torch import save_file

import pipelines
from pipelines.config import SampleConfig, override
from pipelines.config.presets import preset
from pipelines.errors import StageError, UserError
from pipelines.tuning.ready_spaces import KEEP_RATIO
from s5 import load_model
from s5.errors import CheckpointError
from tests.bench.study_results import FEATURES, FRAMES, write_results

GENERATOR = "model.decoder.selection.generator"
SHARES = {"5": 0.05, "10": 0.1, "100": 1.0}
"""Per cent of the labels, by the names of their manifests."""
SIZES = ("name", "frame_size", "depth", "embed_dim", "num_heads")
"""What says how large the frame encoder is."""
PRETRAININGS: dict[str, dict[str, Any]] = {
    "lsmcl": {},
    "no-masking": {"lsmcl.mask_ratio": 0.0},
    "same-stride": {"clips.short_stride": 2.0},
}
"""What each pretraining of the pyramid changes of LSMCL."""
UNTRAINED = {"loop.steps": 1, "optim.lr": 1e-9}
"""What leaves the pyramid as it was drawn, for the probes to be compared with."""
ATTENTION = {
    "optim.lr": 1e-3,
    "model.decoder.attention.features": 64,
    "model.decoder.attention.prototypes": 32,
}
"""What the decoders with attention have of their own."""


@dataclass(frozen=True)
class Study:
    """Where the study is, and its size."""

    out: Path
    seeds: int
    steps: int
    data_seed: int
    quick: bool

    def path(self, *parts: str) -> str:
        """Return a path below the study's folder."""
        return str(self.out.joinpath(*parts))

    @property
    def sample(self) -> SampleConfig:
        """Settings of the videos, of which a third is held out."""
        return SampleConfig(
            out=self.path("videos"),
            videos=1440,
            classes="order-only",
            seconds=64.0,
            empty_share=0.5,
            val_share=1 / 3,
            test_share=0.0,
            seed=self.data_seed,
        )


def backbone(study: Study) -> dict[str, Any]:
    """Return the changes that read the frozen encoder's tokens in place of videos."""
    found = {"backbone.frozen": True, "backbone.weights": study.path("backbone.safetensors")}
    return {f"model.{key}": value for key, value in found.items()} | {"features": study.path("features")}


def prepare(study: Study) -> None:
    """Render the videos, pretrain the frame encoder, compute its tokens, and make manifests with fewer labels."""
    config, index = preset("quickstart"), study.path("index")
    pipelines.run("sample", study.sample)
    pipelines.run("index", override(config.index, {"videos": study.path("videos"), "out": index}))
    changes = {"manifest": index, "out": study.path("encoder"), "loop.epochs": 5, "loop.evaluate_every": 0}
    pipelines.run("pretrain", override(config.pretrain, changes | {"scale.num_workers": 0}))
    weights = Path(study.path("backbone.safetensors"))
    state = load_model(study.path("encoder")).model.backbone.vit.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, weights.with_suffix(".part"))
    weights.with_suffix(".part").replace(weights)
    settings = {f"model.backbone.{key}": getattr(config.pretrain.model.backbone, key) for key in SIZES}
    settings |= {"model.backbone.weights": str(weights), "manifest": index, "out": study.path("features")}
    pipelines.run("features", override(config.features, settings | {"data.cpus_per_decode": 0.5}))
    table = pq.read_table(study.path("index", "manifest.parquet"))
    for name, share in SHARES.items():
        folder = Path(study.path("labels", name))
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(with_labels(table, share), folder / "manifest.parquet")


def with_labels(table: pa.Table, share: float) -> pa.Table:
    """Return a manifest with that share of each class's training videos, at least one, and all others."""
    rows = table.select(["split", "label"]).to_pylist()
    training = Counter(row["label"] for row in rows if row["split"] == "train")
    seen: Counter[int] = Counter()
    kept = []
    for row in rows:
        if row["split"] == "train":
            seen[row["label"]] += 1
        kept.append(row["split"] != "train" or seen[row["label"]] <= math.ceil(share * training[row["label"]]))
    return table.filter(pa.array(kept))


def sweep(study: Study, name: str, space: list[str], **changes: Any) -> None:
    """Run a sweep of fine-tuning on cached tokens: 10 % of the labels, clips of 60 frames over the whole video."""
    settings = {
        "manifest": study.path("labels", "10"),
        "protocol": "whole",
        "clips.frames": FRAMES,
        "optim.lr": 3e-3,
        "loop.batch_size": 16,
        "loop.steps": study.steps,
        "loop.log_every": 50,
        "loop.evaluate_every": 0,
        "scale.cpus_per_worker": 1.0,
    }
    settings |= backbone(study) | changes
    config = override(preset("quickstart").sweep, {f"finetune.{key}": value for key, value in settings.items()})
    found = {"stages": "finetune", "seeds": study.seeds, "space": tuple(space), "out": study.path(name)}
    pipelines.run("sweep", override(config, found))


def pretrain(study: Study) -> None:
    """Pretrain the pyramid on cached tokens, in each of the forms that are compared; a quick study in one."""
    config = preset("quickstart").pretrain
    settings = {
        "manifest": study.path("index"),
        "clips.frames": FRAMES // 2,
        "clips.long_stride": 2.0,
        "clips.short_stride": 1.0,
        "clips.too_short": "shrink",
        "lsmcl.mask_on": "tokens",
        "loop.epochs": 10,
        "loop.evaluate_every": 0,
        "loop.batch_size": 32,
        "probe": "both",
        "scale.num_workers": 0,
    }
    forms = {"lsmcl": {}} if study.quick else {"untrained": UNTRAINED, **PRETRAININGS}
    for name, changes in forms.items():
        own = {"out": study.path("pretrained", name)}
        pipelines.run("pretrain", override(config, settings | backbone(study) | own | changes))


def parts(study: Study) -> dict[str, Callable[[], None]]:
    """Return what the study does, in order, by name; a quick one leaves out the last two, and most settings."""
    frames = [FRAMES] if study.quick else [FRAMES // 4, FRAMES // 2, FRAMES]
    shares = {"scratch": list(SHARES), **{f"from-{name}": ["5"] for name in PRETRAININGS}, "from-lsmcl": list(SHARES)}
    if study.quick:
        shares = {"scratch": ["10"], "from-lsmcl": ["10"]}
    lengths = f"clips.frames={','.join(map(str, frames))}"

    def labels() -> None:
        for name, of in shares.items():
            folder = study.path("pretrained", name.removeprefix("from-"))
            manifests = ",".join(study.path("labels", share) for share in of)
            checkpoint = "" if name == "scratch" else folder
            sweep(study, name, [f"manifest={manifests}"], checkpoint=checkpoint, **{GENERATOR: "none"})

    def decoders(name: str, of: str, **changes: Any) -> None:
        sweep(study, name, [f"model.decoder.name={of}"], **{"clips.frames": FRAMES // 2} | changes)

    all_parts: dict[str, Callable[[], None]] = {
        "prepare": lambda: prepare(study),
        "masking": lambda: sweep(
            study, "masking", [lengths, f"{KEEP_RATIO}=[1.0],[0.5],[0.25]"], **{GENERATOR: "random"}
        ),
        "selection": lambda: sweep(
            study, "selection", [lengths, f"{KEEP_RATIO}=[0.5],[0.25]", f"{FEATURES}=backbone,s4"]
        ),
        "pretrain": lambda: pretrain(study),
        "labels": labels,
        "decoders": lambda: decoders("decoders", "tsn,vis4mer,s5,vtm"),
        # Minutes a trial. Attention learns nothing at the others' learning rate.
        "attention": lambda: decoders("attention", "lst,performer,orthoformer", **ATTENTION),
        "transformer": lambda: sweep(study, "transformer", [f"{FEATURES}=backbone,s4"], **{GENERATOR: "transformer"}),
    }
    left_out = ("attention", "transformer") if study.quick else ()
    return {name: part for name, part in all_parts.items() if name not in left_out}


def run(study: Study) -> None:
    """Do what is left of the study, and note the seconds of each part, all starts together."""
    study.out.mkdir(parents=True, exist_ok=True)
    notes = study.out / "seconds.json"
    seconds: dict[str, float] = json.loads(notes.read_text()) if notes.exists() else {}
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, logging_level=logging.WARNING)
    try:
        for name, part in parts(study).items():
            began = time.monotonic()
            try:
                part()
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began
                notes.write_text(json.dumps(seconds, indent=2) + "\n")
            print(f"==> {name}: {seconds[name]:.0f} s", flush=True)
    finally:
        ray.shutdown()


def main() -> None:
    """Run the study and write what it found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="out/study", help="folder; the same one resumes")
    parser.add_argument("--seeds", type=int, default=0, help="seeds of each setting; 0 for 3, quick 2")
    parser.add_argument("--steps", type=int, default=300, help="steps of each fine-tuning")
    parser.add_argument("--data-seed", type=int, default=2026, help="seed of the videos")
    parser.add_argument("--quick", action="store_true", help="fewer settings")
    options = parser.parse_args()
    out = Path(options.out).absolute()
    seeds = options.seeds or (2 if options.quick else 3)
    study = Study(out, seeds, options.steps, options.data_seed, options.quick)
    try:
        if options.steps < 1:
            raise UserError(f"--steps is {options.steps}: give 1 or more")
        run(study)
        write_results(study.out, study.sample)
    except (UserError, StageError, CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
