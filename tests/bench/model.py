"""Benchmark of the model library: speed and memory of the decoders and of the state-space layers.

    make bench-model [ARGS="--rounds 5 --device cuda --only layers"]

Every comparison alternates its cases in one process and takes medians over rounds of ratios. Bytes saved for backward
are counted by hooks and do not depend on the machine, plain attention's on fake tensors where it does not fit. Peak
memory is that of a process that does nothing else. All models have width 1024 and three blocks, and take the same
random tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from s5.config import AttentionConfig, DecoderConfig, SelectionConfig
from s5.models.decoders import Consensus, Pyramid, build_decoder
from tests.bench.plain import WIDTH, call, kept_storages, layers
from tests.bench.record import Row, alternate, ratio, table, write


@dataclass(frozen=True)
class Shape:
    """Tokens of a batch of clips."""

    name: str
    batch: int
    length: int
    frames: int


# Tokens of LVU: 60 frames of 14 x 14 patches and a class token; of COIN: 64 frames of 7 x 7.
SHAPES = (Shape("LVU", 2, 11_820, 60), Shape("COIN", 4, 3_136, 64))

MODELS = {
    "s5 keep 0.5": DecoderConfig(name="s5"),
    "s5 keep 0.25": DecoderConfig(name="s5", selection=SelectionConfig(keep_ratio=(0.25,))),
    "vis4mer": DecoderConfig(name="vis4mer"),
    "vtm keep 0.5": DecoderConfig(name="vtm"),
    "lst fused": DecoderConfig(name="lst"),
    "lst plain": DecoderConfig(name="lst", attention=AttentionConfig(implementation="plain")),
    "performer": DecoderConfig(name="performer"),
    "orthoformer": DecoderConfig(name="orthoformer"),
    "tsn": DecoderConfig(name="tsn"),
}
# Memory of the plain (L, L) attention matrices that this machine is not asked for.
PLAIN_LIMIT_BYTES = 4 << 30
PLAIN_LENGTHS = (1_500, 3_000, 4_500)


def model(name: str, device: torch.device) -> Pyramid | Consensus:
    """Return a model from a fixed seed."""
    torch.manual_seed(0)
    return build_decoder(MODELS[name], WIDTH).to(device)


def train(decoder: Pyramid | Consensus, x_BLD: Tensor, frames: int) -> None:
    """Forward and backward. Tokens need no gradient, as those of a frozen backbone."""
    decoder.train().zero_grad()
    features_BD = decoder(x_BLD, torch.arange(len(x_BLD), device=x_BLD.device), frames).features_BD
    if features_BD.requires_grad:
        features_BD.square().sum().backward()


def infer(decoder: Pyramid | Consensus, x_BLD: Tensor, frames: int) -> None:
    """Forward in evaluation."""
    with torch.no_grad():
        decoder.eval()(x_BLD, None, frames)


def saved_bytes(config: DecoderConfig, shape: Shape, width: int = WIDTH, fake: bool = False) -> dict[str, int]:
    """Return the bytes that autograd keeps between forward and backward: `input`, the tokens; `step`, all else.

    Each storage counts once, parameters and buffers not at all. On fake tensors nothing is computed.
    """
    torch.manual_seed(0)
    decoder = build_decoder(config, width)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    with mode or nullcontext():
        x_BLD = torch.randn(shape.batch, shape.length, width)
        storages = kept_storages(lambda: decoder.decode(x_BLD, torch.arange(shape.batch), shape.frames))
    weights = [mode.from_tensor(w) if mode else w for w in (*decoder.parameters(), *decoder.buffers())]
    own = {value.untyped_storage()._cdata for value in weights}
    tokens = storages.pop(x_BLD.untyped_storage()._cdata, 0)
    return {"input": tokens, "step": sum(size for key, size in storages.items() if key not in own)}


def peak_bytes(case: str, shape: Shape, device: torch.device) -> int | None:
    """Return the most memory that two training steps take in a fresh process, without what was there before them."""
    command = [sys.executable, "-m", "tests.bench.model", "--device", str(device), "--peak", case, shape.name]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(json.loads(done.stdout)) if done.returncode == 0 else None


def measure_peak(case: str, shape: Shape, device: torch.device) -> int:
    """Measure `peak_bytes` in this process."""
    decoder = model(case, device)
    x_BLD = torch.randn(shape.batch, shape.length, WIDTH, device=device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident_bytes("VmRSS")
    for _ in range(2):
        train(decoder, x_BLD, shape.frames)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    """Read a line of Linux's status of this process; getrusage's peak would be that of the parent before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def fits(case: str, shape: Shape) -> bool:
    """Return whether a model is run at that shape rather than traced."""
    config = MODELS[case]
    matrix = 4 * config.attention.heads * shape.batch * shape.length**2
    return case != "lst plain" or matrix <= PLAIN_LIMIT_BYTES


def decoders(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure every decoder at a shape."""
    x_BLD = torch.randn(shape.batch, shape.length, WIDTH, device=device)
    built = {name: model(name, device) for name in MODELS if fits(name, shape)}
    found: dict[str, Any] = {"batch": shape.batch, "length": shape.length}
    for kind, run in (("train", train), ("forward", infer)):
        cases = {name: call(run, decoder, x_BLD, shape.frames) for name, decoder in built.items()}
        found[f"{kind}_seconds"] = alternate(cases, rounds, device)
    del built
    found["saved_bytes"] = {name: saved_bytes(c, shape, fake=not fits(name, shape)) for name, c in MODELS.items()}
    found["peak_bytes"] = {name: peak_bytes(name, shape, device) for name in MODELS if fits(name, shape)}
    return found


def plain_law(rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure the training step of plain attention at growing lengths and fit seconds = linear L + square L^2."""
    seconds = {}
    decoder = model("lst plain", device)
    for length in PLAIN_LENGTHS:
        x_BLD = torch.randn(1, length, WIDTH, device=device)
        seconds[length] = median(alternate({"step": call(train, decoder, x_BLD, 60)}, rounds, device)["step"])
    lengths = torch.tensor(list(seconds), dtype=torch.float64)
    terms = torch.stack([lengths, lengths**2], dim=1)
    values = torch.tensor(list(seconds.values()), dtype=torch.float64)[:, None]
    # Relative errors count alike at every length.
    linear, square = torch.linalg.lstsq(terms / values, torch.ones_like(values)).solution[:, 0].tolist()
    fitted = {length: linear * length + square * length**2 for length in seconds}
    return {"seconds": seconds, "linear": linear, "square": square, "fitted": fitted}


def growth(rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time the S5 step from 1k to 32k tokens."""
    decoder = model("s5 keep 0.5", device)
    cases = {}
    for length in (1_024, 2_048, 4_096, 8_192, 16_384, 32_768):
        cases[str(length)] = call(train, decoder, torch.randn(1, length, WIDTH, device=device), 64)
    return alternate(cases, rounds, device)


def branch(rounds: int, device: torch.device) -> dict[str, Any]:
    """Time the S5 step and that of the same pyramid on the kept tokens alone: the rest is what selection costs."""
    found = {}
    for shape in SHAPES:
        torch.manual_seed(0)
        x_BLD = torch.randn(shape.batch, shape.length, WIDTH, device=device)
        kept_BKD = x_BLD[:, : shape.length // 2].contiguous()
        cases = {
            "s5": call(train, model("s5 keep 0.5", device), x_BLD, shape.frames),
            "kept tokens only": call(train, model("vis4mer", device), kept_BKD, 1),
        }
        found[shape.name] = alternate(cases, rounds, device)
    return found


def limits(device: torch.device) -> dict[str, Any]:
    """Compare the S5 step with the least time that its matrix products take at the machine's best measured rate."""
    from torch.utils.flop_counter import FlopCounterMode

    side = 2_048 if device.type == "cpu" else 8_192
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    big = torch.randn(1 << 26, device=device)
    best = alternate({"product": lambda: a @ b, "copy": lambda: big.clone()}, 7, device)
    peak, bandwidth = 2 * side**3 / min(best["product"]), 2 * big.nbytes / min(best["copy"])
    found: dict[str, Any] = {"flops_per_second": peak, "bytes_per_second": bandwidth}
    for shape in SHAPES:
        for case in ("s5 keep 0.5", "vis4mer"):
            decoder, x_BLD = model(case, device), torch.randn(shape.batch, shape.length, WIDTH, device=device)
            with FlopCounterMode(display=False) as counter:
                train(decoder, x_BLD, shape.frames)
            step = median(alternate({"step": call(train, decoder, x_BLD, shape.frames)}, 3, device)["step"])
            least = counter.get_total_flops() / peak
            found[f"{shape.name} {case}"] = {
                "product_flops": counter.get_total_flops(),
                "least_seconds": least,
                "seconds": step,
                "share": least / step,
                "where": where(decoder, x_BLD, shape.frames),
            }
    return found


GROUPS = {
    "matrix products": ("mm", "addmm", "bmm", "addmv", "matmul", "_flash"),
    "FFT": ("_fft",),
    "copies and zeros": ("copy_", "fill_", "cat", "index", "clone"),
    "LayerNorm, GELU": ("layer_norm", "gelu"),
}


def where(decoder: Pyramid | Consensus, x_BLD: Tensor, frames: int) -> dict[str, float]:
    """Return the share of a step's operator time by kind of operator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if x_BLD.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        train(decoder, x_BLD, frames)
    seconds: dict[str, float] = dict.fromkeys([*GROUPS, "other arithmetic"], 0.0)
    for event in profile.key_averages():
        own = event.self_device_time_total if x_BLD.device.type == "cuda" else event.self_cpu_time_total
        group = next((g for g, words in GROUPS.items() if any(word in event.key for word in words)), "other arithmetic")
        seconds[group] += own
    total = sum(seconds.values())
    return {group: round(value / total, 3) for group, value in seconds.items()}


def decoder_rows(shape: Shape, found: dict[str, Any], law: dict[str, Any]) -> list[Row]:
    """Return the figures of the decoders at a shape."""
    seconds, saved = found["train_seconds"], found["saved_bytes"]

    def memory(first: str, second: str, with_input: bool = False) -> float:
        sizes = [saved[name]["step"] + with_input * saved[name]["input"] for name in (first, second)]
        return sizes[0] / sizes[1]

    rows = []
    for keep, speed, size in (("0.5", 1.4, 0.55), ("0.25", 2.0, 0.35)):
        ours = f"s5 keep {keep}"
        versus = f"{shape.name}: S5 keep {keep} / vis4mer"
        rows += [
            Row(f"{versus}, training throughput", ratio(seconds["vis4mer"], seconds[ours]), speed),
            Row(f"{versus}, saved bytes beyond the tokens", memory(ours, "vis4mer"), size, "lower"),
            Row(f"{versus}, saved bytes with the tokens", memory(ours, "vis4mer", True), None, "lower"),
        ]
    ours, versus = "s5 keep 0.5", f"{shape.name}: S5 keep 0.5"
    lvu = shape.name == "LVU"
    fused = ratio(seconds["lst fused"], seconds[ours])
    rows.append(Row(f"{versus} / lst fused, training throughput", fused, 2.6 if lvu else 1.0))
    if "lst plain" in seconds:
        plain, how = ratio(seconds["lst plain"], seconds[ours]), ""
    else:
        least = law["linear"] * shape.length + law["square"] * shape.length**2
        plain, how = shape.batch * least / median(seconds[ours]), " (extrapolated)"
    rows.append(Row(f"{versus} / lst plain, training throughput{how}", plain, 5.0 if lvu else None))
    size = memory(ours, "lst plain", True)
    rows.append(Row(f"{versus} / lst plain, saved bytes with the tokens", size, 0.08 if lvu else None, "lower"))
    return rows


def show(shape: Shape, found: dict[str, Any]) -> None:
    """Print what each decoder does at a shape."""
    print(f"\n{shape.name}: {shape.batch} x {shape.length} tokens of width {WIDTH}")
    lines = []
    for name in MODELS:
        times = [found[f"{kind}_seconds"].get(name) for kind in ("train", "forward")]
        saved, peak = found["saved_bytes"][name], found["peak_bytes"].get(name)
        lines.append(
            [
                name,
                *("" if t is None else f"{shape.batch / median(t):.3g}" for t in times),
                f"{saved['step'] / 2**20:.0f}",
                f"{saved['input'] / 2**20:.0f}",
                "" if peak is None else f"{peak / 2**20:.0f}",
            ]
        )
    table(["decoder", "train samples/s", "forward samples/s", "saved MiB", "tokens MiB", "peak MiB"], lines)


def other_rows(raw: dict[str, Any]) -> list[Row]:
    """Return the figures of layers, momentum branch and growth, as far as they were measured."""
    rows = []
    if "layers" in raw:
        for kind, target in (("s4d", 5.0), ("s4", 3.0)):
            seconds = raw["layers"][kind]["seconds"]
            name = {"s4d": "S4D layer / einsum + FFT(2L)", "s4": "S4 layer / Cauchy einsum"}[kind]
            rows.append(Row(f"{name}, training, L = 2,048", ratio(seconds["plain"], seconds["ours"]), target))
        sizes = raw["layers"]["s4_saved_bytes"]
        rows.append(Row("S4 layer, saved bytes, state 128 / state 32", sizes[128] / sizes[32], 1.1, "lower"))
    for name, seconds in raw.get("branch", {}).items():
        shares = [1 - b / a for a, b in zip(seconds["s5"], seconds["kept tokens only"], strict=True)]
        rows.append(Row(f"{name}: momentum branch and mask generator, share of the step", median(shares), 0.3, "lower"))
    if "growth" in raw:
        short, long = median(raw["growth"]["4096"]), median(raw["growth"]["32768"])
        law = 32_768 * math.log(32_768) / (4_096 * math.log(4_096))
        rows.append(Row("S5 step, 4k to 32k tokens, growth / that of L log L", long / short / law, 1.15, "lower"))
    return rows


def run(parts: list[str], rounds: int, device: torch.device) -> None:
    """Measure the parts, print them and write out/bench/model.json."""
    raw: dict[str, Any] = {"rounds": rounds}
    rows: list[Row] = []
    measures = {"layers": layers, "branch": branch, "growth": growth}
    for name, measure in measures.items():
        if name in parts:
            raw[name] = measure(rounds, device)
    if "decoders" in parts:
        law = raw["lst_plain_law"] = plain_law(rounds, device)
        for shape in SHAPES:
            found = raw[shape.name] = decoders(shape, rounds, device)
            show(shape, found)
            rows += decoder_rows(shape, found, law)
    if "limits" in parts:
        raw["limits"] = limits(device)
        for name, value in raw["limits"].items():
            if isinstance(value, dict):
                rows.append(
                    Row(f"{name}: matrix products at the best measured rate, share of the step", value["share"])
                )
    write("model", device, rows + other_rows(raw), raw)


def main() -> None:
    """Read the options and run."""
    parts = ["layers", "branch", "growth", "decoders", "limits"]
    parser = argparse.ArgumentParser(description="Benchmark of the decoders and the state-space layers.")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of every comparison")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="torch's threads; default: as many as cores")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to measure")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak:
        case, name = options.peak
        print(measure_peak(case, next(s for s in SHAPES if s.name == name), options.device))
    else:
        run(options.only, options.rounds, options.device)


if __name__ == "__main__":
    main()
