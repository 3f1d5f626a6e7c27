"""Measured rates of nodes, from which a dry run reckons hours and memory; all are of docs/benchmarks.md.

A decoder's time and memory are taken as proportional to the number of tokens, from the measured shape whose length is
closest; a backbone's time as proportional to its FLOPs. Both are extrapolations, and so is every figure made of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """A decoder's step, measured: a batch of sequences of `length` tokens of width 1024, three blocks."""

    batch: int
    length: int
    train_s: float
    forward_s: float
    memory_mib: float
    """Memory at the peak of training."""

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.batch * self.length


@dataclass(frozen=True)
class Node:
    """A machine whose rates were measured."""

    description: str
    cores: int
    """CPU cores."""
    encoder_flops: float
    """FLOP/s of a frozen backbone's forward pass."""
    decoded_s: float
    """Seconds of video that all of its decode tasks read in a second, at 224 pixels."""
    shared_cores: bool
    """Whether decoding takes the cores that the model runs on, so that their times add up."""
    probes_s: float
    """Videos a second that `index` probes."""
    features_bytes_s: float
    """Bytes a second that cached features are read at, from memory."""
    decoders: dict[str, tuple[Timing, ...]]
    sources: dict[str, str]
    """Where each rate comes from."""

    def timing(self, decoder: str, length: int) -> Timing | None:
        """Return the measured step that is closest in length; None where that decoder was not measured."""
        known = self.decoders.get(decoder, ())
        return min(known, key=lambda timing: abs(math.log(timing.length / max(1, length)))) if known else None


def _on_gpu(*figures: float) -> tuple[Timing, ...]:
    coin, lvu = figures[:3], figures[3:]
    return (
        Timing(16, 3136, coin[0] / 1e3, coin[1] / 1e3, coin[2]),
        Timing(8, 11820, lvu[0] / 1e3, lvu[1] / 1e3, lvu[2]),
    )


def _on_cpu(*figures: float) -> tuple[Timing, ...]:
    lvu, coin = figures[:3], figures[3:]
    # Measured in samples a second; the tokens themselves, 92 and 49 MiB, come on top of what is saved.
    return (
        Timing(4, 3136, 4 / coin[0], 4 / coin[1], coin[2] + 49),
        Timing(2, 11820, 2 / lvu[0], 2 / lvu[1], lvu[2] + 92),
    )


DECODING = (
    "0.47 s on one core for clips of 60 s and of 15 s, of a 768x576 MS-MPEG4 v3 video of 80 s, at 224 pixels "
    "(Decoding, 2026-11-23, beside other work); other codecs and sizes take another time"
)
DECODED_S_A_CORE = (60 + 15) / 0.47
FEATURES = "4.8 GB/s from the page cache on 2 CPU cores (Decoding, 2026-11-23, beside other work); a disk is slower"
NODES = {
    "h200": Node(
        description="one NVIDIA H200 and 16 CPU cores, bf16",
        cores=16,
        encoder_flops=0.31 * 989e12,
        decoded_s=14 * DECODED_S_A_CORE,
        shared_cores=False,
        probes_s=16 / 2 * 240 / 10,
        features_bytes_s=4.8e9,
        decoders={
            "s5": _on_gpu(43.3, 13.6, 990, 36.7, 12.5, 1298),
            "vis4mer": _on_gpu(35.2, 6.7, 1117, 38.9, 13.0, 1806),
            "vtm": _on_gpu(30.8, 7.1, 1316, 34.9, 12.4, 2038),
            "lst": _on_gpu(14.8, 3.3, 1395, 48.0, 12.8, 2611),
            "performer": _on_gpu(25.2, 10.6, 2881, 45.1, 19.1, 5381),
        },
        sources={
            "backbone": "MFU 0.31 of 989 TFLOP/s, ViT-L/16, 4 pairs of 60 frames (GPU: pretraining, 2026-11-27)",
            "decoder": "16 x 3,136 and 8 x 11,820 tokens, S4D (GPU: decoders, 2026-11-27)",
            "decoding": f"14 tasks at {DECODING}",
            "features": FEATURES,
            "index": "240 rendered videos in 10 s on 2 cores (End to end, 2026-11-22), times 8",
        },
    ),
    "cpu-2": Node(
        description="2 CPU cores, fp32",
        cores=2,
        encoder_flops=64 * 9.2e9 / 2.73,
        decoded_s=2 * DECODED_S_A_CORE,
        shared_cores=True,
        probes_s=240 / 10,
        features_bytes_s=4.8e9,
        decoders={
            "s5": _on_cpu(1.43, 4.18, 154, 6.32, 17.0, 75),
            "vis4mer": _on_cpu(0.975, 2.90, 305, 4.16, 12.4, 147),
            "vtm": _on_cpu(1.14, 1.91, 431, 6.76, 13.4, 222),
            "lst": _on_cpu(0.092, 0.31, 820, 0.938, 3.09, 435),
            "performer": _on_cpu(0.357, 0.929, 1351, 1.30, 3.61, 727),
            "orthoformer": _on_cpu(0.313, 0.519, 823, 1.22, 2.35, 442),
        },
        sources={
            "backbone": "an LSMCL step of ViT-S/16 on 2 pairs of 4 frames without masking, 64 passes of 9.2 GFLOP in "
            "2.73 s (CPU: training, 2026-11-23, beside other work)",
            "decoder": "2 x 11,820 and 4 x 3,136 tokens, S4D (CPU: decoders, 2026-11-22)",
            "decoding": f"2 cores at {DECODING}",
            "features": FEATURES,
            "index": "240 rendered videos in 10 s on 2 cores (End to end, 2026-11-22)",
        },
    ),
}
"""Nodes by their names. Training three passes and a moving average one: four of each frame in an LSMCL step."""
