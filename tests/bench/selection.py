"""What the mask generator finds: made tokens of which it is known which ones tell.

    make bench-selection ARGS="--seeds 5 --device cuda --processes 12"

A clip is frames of noise. During a step, three to six frames long, one token a frame holds that step's random vector as
well. A class is the order of three steps; one to three of three other steps, distractors, lie between them and say
nothing of the class. Two blocks are trained from scratch on clips drawn fresh and tested on 300 others. Shown are the
shares that evaluation keeps, in front of the first block, of the tokens that tell (the class's steps) and of the
distractors.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s5.config import DecoderConfig, OptimConfig, SelectionConfig
from s5.models.decoders import build_decoder
from s5.models.selection import Selection
from s5.training import optim
from tests.bench.estimators import ALTERNATIVES, replace_selections
from tests.bench.record import Row, table, write

WIDTH, NOISE = 128, 0.3
STEPS_OF_CLASS, DISTRACTORS = 3, 3
TEST_CLIPS = 300
SHOWN = ("accuracy", "telling", "distractors", "accuracy, highest logits", "telling, highest logits")
"""What is shown of each case, by mean and worst seed; the last two where evaluation draws no noise."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A decoder, the clips, and how it is trained."""

    name: str
    decoder: str = "s5"
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    alternative: str = ""
    """Name among `ALTERNATIVES` of what takes the place of the decoder's selection, if anything."""
    tokens: int = 16
    """Tokens a frame."""
    frames: int = 60
    strength: float = 1.0
    """Factor of the steps' vectors."""
    drift: bool = False
    """The telling token moves to a neighbouring position from frame to frame, rather than anywhere."""
    steps: int = 900
    lr: float = 3e-3
    batch: int = 16


@dataclass(frozen=True)
class Clips:
    """Tokens (B, L, D), classes (B,), and the step that each token holds (B, L): 0 to 5, -1 for noise."""

    x_BLD: Tensor
    label_B: Tensor
    step_BL: Tensor


def draw(case: Case, count: int, vectors_SD: Tensor, generator: torch.Generator) -> Clips:
    """Draw clips."""
    device, frames, tokens = vectors_SD.device, case.frames, case.tokens

    def integers(high: int | Tensor, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, device=device) * high).long()

    orders = torch.tensor(list(permutations(range(STEPS_OF_CLASS))), device=device)
    label_B = integers(len(orders), count)
    # Class steps at the times 0, 2 and 4, distractors at 1 or 3, those that are left out behind all.
    extra_BE = STEPS_OF_CLASS + integers(DISTRACTORS, count, 3)
    key_BE = 1 + 2 * integers(2, count, 3) + torch.rand(count, 3, generator=generator, device=device) / 2
    used_BE = torch.arange(3, device=device) < 1 + integers(3, count, 1)
    key_BO = torch.arange(0, 6, 2, device=device).expand(count, 3)
    key_BS = torch.cat([key_BO, torch.where(used_BE, key_BE, 100.0)], 1)
    length_BS = 3 + integers(4, count, 6)
    length_BS[:, 3:] *= used_BE
    order_BS = key_BS.argsort(1)
    step_BS = torch.cat([orders[label_B], extra_BE], 1).gather(1, order_BS)
    length_BS = length_BS.gather(1, order_BS)
    gap_BS = integers((frames - length_BS.sum(1, keepdim=True) + 1), count, 6).sort(1).values
    start_BS = gap_BS + length_BS.cumsum(1) - length_BS
    time_T = torch.arange(frames, device=device)
    inside_BST = (time_T >= start_BS[..., None]) & (time_T < (start_BS + length_BS)[..., None])
    step_BT = torch.where(inside_BST, step_BS[..., None], -1).amax(1)
    place_BT = integers(tokens, count, frames)
    if case.drift:
        place_BT = (place_BT[:, :1] + (integers(3, count, frames) - 1).cumsum(1)) % tokens
    step_BTN = torch.full((count, frames, tokens), -1, device=device)
    step_BTN.scatter_(2, place_BT[..., None], step_BT[..., None])
    step_BL = step_BTN.flatten(1)
    x_BLD = NOISE * torch.randn(count, frames * tokens, WIDTH, generator=generator, device=device)
    held_BLD = F.embedding(step_BL.clamp_min(0), vectors_SD) * (step_BL >= 0)[..., None]
    return Clips(x_BLD + case.strength * held_BLD, label_B, step_BL)


def share_kept(kept_BK: Tensor, wanted_BL: Tensor) -> float:
    """Return the share of the wanted tokens that are kept."""
    mask_BL = torch.zeros_like(wanted_BL).scatter(1, kept_BK, True)
    return float((mask_BL & wanted_BL).sum() / wanted_BL.sum())


def train(case: Case, seed: int, device: torch.device, watch: Callable[[int, dict[str, float]], None]) -> None:
    """Train one decoder, and call `watch` with what it does on the test clips, at a third, two thirds and the end."""
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    vectors_SD = torch.randn(STEPS_OF_CLASS + DISTRACTORS, WIDTH, generator=generator, device=device)
    config = DecoderConfig(name=case.decoder, blocks=2, dropout=0.0, selection=case.selection)  # type: ignore[arg-type]
    model = nn.ModuleDict({"decoder": build_decoder(config, WIDTH), "head": nn.Linear(WIDTH // 4, 6)})
    decoder: Any = model["decoder"]
    if case.alternative:
        replace_selections(decoder, case.selection, case.alternative)
    model.to(device)
    settings = OptimConfig(lr=case.lr, weight_decay=0.05)
    optimizer = optim.build_optimizer(model, settings)
    test = draw(case, TEST_CLIPS, vectors_SD, torch.Generator(device).manual_seed(10_000 + seed))
    for step in range(1, case.steps + 1):
        optim.set_learning_rate(optimizer, min(1.0, step / (0.1 * case.steps)))
        clips = draw(case, case.batch, vectors_SD, generator)
        seeds_B = torch.arange(case.batch, device=device) + step * case.batch
        decoder.set_progress(step / case.steps)
        features_BD = decoder.train()(clips.x_BLD, seeds_B, case.frames).features_BD
        loss = F.cross_entropy(model["head"](features_BD), clips.label_B)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        decoder.update_momentum()
        if step % max(1, case.steps // 3) == 0:
            watch(step, evaluate(model, case, test))


@contextmanager
def highest_logits(model: nn.Module) -> Iterator[bool]:
    """Have evaluation keep the highest logits, without noise; tells whether there is a learned selection."""
    learned = [part for part in model.modules() if isinstance(part, Selection) and part.generator is not None]
    configs = [selection.config for selection in learned]
    for selection in learned:
        selection.config = replace(selection.config, noise="training")
    try:
        yield bool(learned)
    finally:
        for selection, config in zip(learned, configs, strict=True):
            selection.config = config


@torch.no_grad()
def evaluate(model: nn.ModuleDict, case: Case, test: Clips) -> dict[str, float]:
    """Return accuracy and the shares kept on the test clips, with noise as in training, and of the highest logits."""
    found = judged(model, case, test)
    with highest_logits(model) as is_learned:
        if is_learned:
            found |= {f"{key}, highest logits": value for key, value in judged(model, case, test).items()}
    return found


def judged(model: nn.ModuleDict, case: Case, test: Clips) -> dict[str, float]:
    """Return accuracy and the shares kept on the test clips."""
    hits, kept = 0, []
    for first in range(0, TEST_CLIPS, 50):
        part = slice(first, first + 50)
        out = model["decoder"].eval()(test.x_BLD[part], None, case.frames)
        hits += int((model["head"](out.features_BD).argmax(1) == test.label_B[part]).sum())
        kept += out.kept[:1] if case.decoder == "s5" else []
    found = {"accuracy": hits / TEST_CLIPS}
    if kept:
        kept_BK, step_BL = torch.cat(kept), test.step_BL
        found["telling"] = share_kept(kept_BK, (step_BL >= 0) & (step_BL < STEPS_OF_CLASS))
        found["distractors"] = share_kept(kept_BK, step_BL >= STEPS_OF_CLASS)
        found["noise"] = share_kept(kept_BK, step_BL < 0)
    return found


def cases() -> dict[str, Case]:
    """Return every case by its name."""
    found = [Case(name="all tokens", decoder="vis4mer"), Case(name="vtm keep 0.5", decoder="vtm")]
    found += [Case(name="keep 0.5 random", selection=SelectionConfig(generator="random"))]
    for features in ("s4", "backbone"):
        config = SelectionConfig(features=features)  # type: ignore[arg-type]
        for kind, alternative in (("own", ""), ("relaxed", "relaxed")):
            found += [
                Case(
                    name=f"keep {keep} {kind}, {features}",
                    selection=replace(config, keep_ratio=(keep,)),
                    alternative=alternative,
                )
                for keep in (0.5, 0.25, 0.1)
            ]
            transformer = replace(config, generator="transformer")
            name = f"keep 0.5 {kind}, transformer on {features}"
            found.append(Case(name=name, selection=transformer, alternative=alternative))
        found.append(Case(name=f"keep 0.5 shared, {features}", selection=replace(config, estimator="shared")))
    for label, changes in CLIPS.items():
        found += [replace(case, name=f"{label}: {case.name}", **changes) for case in found[:1]]
        found += [
            Case(name=f"{label}: keep 0.5 own, {features}", selection=SelectionConfig(features=features), **changes)  # type: ignore[arg-type]
            for features in ("s4", "backbone")
        ]
        found += [
            Case(
                name=f"{label}: keep 0.5 {kind}, s4",
                selection=SelectionConfig(features="s4"),
                alternative=kind,
                **changes,
            )
            for kind in ALTERNATIVES
        ]
    found += [Case(name="1 token: lst", decoder="lst", tokens=1)]
    found += [Case(name=f"1 token: lst, lr {lr:g}", decoder="lst", tokens=1, lr=lr) for lr in (1e-3, 3e-4)]
    return {case.name: case for case in found}


CLIPS: dict[str, dict[str, Any]] = {
    "strength 0.5": {"strength": 0.5},
    "strength 0.25": {"strength": 0.25},
    "drift, 0.8": {"strength": 0.8, "drift": True},
    "1 token": {"tokens": 1},
    "64 tokens, 120 frames": {"tokens": 64, "frames": 120},
}


def measure(case: Case, seed: int, device: str, threads: int) -> dict[str, Any]:
    """Train one case with one seed, in a process of its own."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    history: dict[int, dict[str, float]] = {}
    train(case, seed, torch.device(device), history.__setitem__)
    return {"case": case.name, "seed": seed, "seconds": time.perf_counter() - began, "history": history}


def show(found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Print a line a case, and return its figures."""
    lines, rows = [], []
    for name, runs in found.items():
        last = [run["history"][max(run["history"])] for run in runs]
        texts = []
        for key in SHOWN:
            values = [each[key] for each in last if key in each]
            texts.append(f"{mean(values):.3f} ({min(values):.3f})" if values else "")
            rows += (
                [Row(f"{name}: {key}, mean", mean(values)), Row(f"{name}: {key}, worst", min(values))] if values else []
            )
        lines.append([name, str(len(runs)), *texts])
    table(["case", "seeds", *SHOWN], lines)
    return rows


def run(names: list[str], seeds: int, device: str, processes: int, steps: int | None, out: str) -> None:
    """Measure the cases, print them and write out/bench/selection.json."""
    chosen = [replace(case, steps=steps or case.steps) for name, case in cases().items() if name in names]
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in chosen}
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        # Seed by seed, so that a run that is cut short has all cases.
        work = [pool.submit(measure, case, seed, device, threads) for seed in range(seeds) for case in chosen]
        for future in as_completed(work):
            run = future.result()
            found[run["case"]].append(run)
            print(f"{run['case']}, seed {run['seed']}: {run['history'][max(run['history'])]}", flush=True)
            if out:
                with open(out, "a") as file:
                    file.write(json.dumps(run) + "\n")
    raw = {"cases": {case.name: asdict(case) for case in chosen}, "runs": found}
    write("selection", torch.device(device), show({name: runs for name, runs in found.items() if runs}), raw)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(cases()), help="cases, by the beginnings of their names")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="cases that are trained at once")
    parser.add_argument("--steps", type=int, help="training steps in place of each case's own")
    parser.add_argument("--lines", default="", help="file that takes a line of JSON for each run as it ends")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    options = parser.parse_args()
    if options.list:
        print(*cases(), sep="\n")
        sys.exit()
    names = [name for name in cases() if name.startswith(tuple(options.only))]
    run(names, options.seeds, options.device, options.processes, options.steps, options.lines)


if __name__ == "__main__":
    main()
