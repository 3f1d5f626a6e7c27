"""What a long list costs `index` beside the probing of its files: CPU time and memory a row.

    make bench-listing ARGS="--rows 1000000"

The list names stretches of four small videos, as a csv with labels; a tenth is held out.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from pipelines.config import IndexConfig, TrackingConfig
from pipelines.stages import index
from s5.video.reading import probe
from tests.bench.record import Row, write
from tests.s5.videos import write_video

FILES, CLASSES = 4, 400


def make(folder: Path, rows: int) -> IndexConfig:
    """Write the videos and the list, and return the settings that read them."""
    for number in range(FILES):
        write_video(folder / f"videos/v{number}.mp4", 80)
    with (folder / "labels.csv").open("w") as file:
        file.write("video,label,start_s,end_s\n")
        for row in range(rows):
            file.write(f"v{row % FILES}.mp4,{row % CLASSES},{9 * row / rows:.6f},{10 + row / 1000:.3f}\n")
    return IndexConfig(
        videos=str(folder / "videos"),
        annotations=str(folder / "labels.csv"),
        val_share=0.1,
        tracking=TrackingConfig(uri="off"),
    )


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory(prefix="listing-") as folder:
        config = make(Path(folder), rows)
        uris = sorted(str(path) for path in Path(config.videos).iterdir())
        facts = {uri: {"reason": None} | asdict(probe(uri)) for uri in uris}
        before, began = peak_bytes(), time.process_time()
        annotations, _ = index.list_videos(config)
        held = index.hold_out(annotations.videos, index.shares(annotations, config), config.seed)
        videos, _ = index.readable(annotations.videos, facts)
        index.keep_learnable(videos, held)
        table = index.manifest_of(videos, facts, annotations, held, config)
        seconds, held_bytes = time.process_time() - began, peak_bytes() - before
    assert len(table) == rows
    figures = [
        Row("rows a CPU second", rows / seconds),
        Row("bytes a row beside the program", held_bytes / rows, None, "lower"),
        Row("MiB of the program itself", before / 2**20, None, "lower"),
    ]
    write("listing", torch.device("cpu"), figures, {"seconds": [seconds], "bytes": [held_bytes]})


if __name__ == "__main__":
    main()
