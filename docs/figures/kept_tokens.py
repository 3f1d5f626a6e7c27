"""Draw which tokens of a video a fine-tuned S5 keeps: `python -m docs.figures.kept_tokens --checkpoint FOLDER`.

Renders a video of the sample data set, whose informative stretches are known, and writes docs/kept_tokens.png: the
frames of a clip, the same frames with the tokens that the first block drops blanked out, and the share kept of each
frame against what is on screen.

Shapes: T frames of a clip, R and C rows and columns of patches of a frame, S height and width of a frame in pixels.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

import s5
from pipelines.data.rendering import STEP_NAMES, Stretch, VideoPlan, render_video
from pipelines.plots.curves import COLOURS, DPI, STYLE
from pipelines.storage.weights import local_checkpoint
from s5.config import ClipConfig
from s5.video.clip_times import evaluation_times
from s5.video.reading import read_frames

STEPS = (4, 5, 6, 2)
"""The activity `four-five-six-two`."""
LENGTHS_S = (11, 8, 5, 8, 5, 8, 5, 9, 9)
"""Lengths of the stretches; the first and every second one hold a distractor, the others a step."""
FPS = 8


def sample_plan(size: int) -> VideoPlan:
    """Return the plan of one video of the test split, whose handwriting no training video shows."""
    ends = [FPS * second for second in accumulate(LENGTHS_S)]
    stretches = tuple(
        Stretch(start, end, STEPS[number // 2] if number % 2 else None)
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    )
    return VideoPlan(
        video_id="figure",
        class_name="-".join(STEP_NAMES[step] for step in STEPS),
        label=0,
        split="test",
        stretches=stretches,
        difficulty="easy",
        fps=FPS,
        size=size,
        seed=(1,),
    )


def draw_kept_tokens(checkpoint: Path, size: int = 64) -> bytes:
    """Return the picture as PNG.

    Raises:
        SystemExit: the checkpoint's model selects no tokens of single frames, or has no head.
    """
    model, meta = s5.load_model(checkpoint)
    backbone = model.backbone
    if model.head is None or model.config.decoder.name != "s5" or backbone.config.tubelet != 1:
        raise SystemExit(f"{checkpoint}: give a checkpoint of `finetune` with --model.decoder.name s5, tubelet 1")
    plan = sample_plan(size)
    clips = s5.ClipConfig(**{key: meta.settings["clips"][key] for key in ("frames", "long_stride", "too_short")})
    times_T, frames_TSSC = read_clip(plan, clips, backbone.config.frame_size)
    with torch.no_grad():
        prediction = model(torch.from_numpy(frames_TSSC)[None])
    kept_L = np.zeros(len(times_T) * backbone.tokens, bool)
    kept_L[prediction.kept[0][0].numpy()] = True
    # A class token, where there is one, comes before the patches of its frame.
    side = int(backbone.patches**0.5)
    kept_TRC = kept_L.reshape(len(times_T), -1)[:, -backbone.patches :].reshape(-1, side, side)
    predicted = meta.classes[int(prediction.logits_BC[0].argmax())]
    return figure(plan, times_T, frames_TSSC, kept_TRC, predicted)


def read_clip(plan: VideoPlan, clips: ClipConfig, size: int) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Return the times (T,) of the centred long clip of a rendered video, and its frames."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(render_video(plan))
        file.flush()
        times_T = evaluation_times(clips, 0.0, plan.seconds, plan.fps, 1)[0]
        return times_T, read_frames(file.name, times_T, size)


def figure(
    plan: VideoPlan,
    times_T: NDArray[np.float64],
    frames_TSSC: NDArray[np.uint8],
    kept_TRC: NDArray[np.bool_],
    predicted: str,
) -> bytes:
    """Draw frames, kept tokens, and the share kept over time."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(9, 2.6), dpi=DPI, layout="constrained")
        FigureCanvasAgg(drawn)
        above, below = drawn.subplots(2, 1, height_ratios=(2, 1.3))
        rows = [row_of(frames_TSSC), row_of(blank(frames_TSSC, kept_TRC))]
        above.imshow(np.concatenate(rows), interpolation="nearest")
        height = frames_TSSC.shape[1]
        above.set_yticks([height / 2, height * 1.6], ["frames", "tokens kept"], fontsize=8)
        above.set_xticks([])
        above.tick_params(length=0)
        above.spines[:].set_visible(False)
        truth = "right" if predicted == plan.class_name else "wrong"
        above.set_title(f"{plan.class_name}; predicted: {predicted} ({truth})", loc="left")
        draw_share(below, plan, times_T, kept_TRC.mean((1, 2)))
        return compact(drawn)


def row_of(frames_TSSC: NDArray[np.uint8], gap: int = 3) -> NDArray[np.uint8]:
    """Return the frames side by side on white."""
    padded = np.pad(frames_TSSC, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255)
    row: NDArray[np.uint8] = np.concatenate(list(padded), axis=1)
    return row


def blank(frames_TSSC: NDArray[np.uint8], kept_TRC: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the frames with the patches that are not kept almost white."""
    patch = frames_TSSC.shape[1] // kept_TRC.shape[1]
    shown_TSS1 = kept_TRC.repeat(patch, 1).repeat(patch, 2)[..., None]
    return np.where(shown_TSS1, frames_TSSC, 245 + frames_TSSC // 32).astype(np.uint8)


def draw_share(axes: Any, plan: VideoPlan, times_T: NDArray[np.float64], share_T: NDArray[np.float64]) -> None:
    """Draw the share of each frame's tokens that is kept as bars, over a shade where a step is on screen."""
    stride = float(times_T[1] - times_T[0]) if len(times_T) > 1 else plan.seconds
    for stretch in plan.stretches:
        if stretch.step is not None:
            start, length = stretch.start / plan.fps, (stretch.end - stretch.start) / plan.fps
            axes.add_patch(Rectangle((start, 0), length, 1, color=COLOURS[4], alpha=0.25, linewidth=0))
            axes.text(start + length / 2, 1.03, STEP_NAMES[stretch.step], ha="center", va="bottom", fontsize=7)
    axes.bar(times_T, share_T, 0.6 * stride, color=COLOURS[0])
    axes.axhline(share_T.mean(), color=COLOURS[1], linewidth=0.8, linestyle="--")
    axes.set(xlim=(times_T[0] - stride / 2, times_T[-1] + stride / 2), ylim=(0, 1))
    axes.set_yticks([0, 0.5, 1])
    axes.set_xlabel("seconds (shaded: a step of the activity is on screen; dashed: mean share kept)")
    axes.set_ylabel("share kept")


def compact(drawn: Figure) -> bytes:
    """Return a figure as PNG with a palette of 256 colours."""
    full, small = io.BytesIO(), io.BytesIO()
    drawn.savefig(full, format="png")
    Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="out/quickstart/finetune", help="checkpoint, or the --out of finetune")
    parser.add_argument("--out", default="docs/kept_tokens.png", help="where the picture goes")
    options = parser.parse_args()
    with local_checkpoint(options.checkpoint) as folder:
        Path(options.out).write_bytes(draw_kept_tokens(folder))


if __name__ == "__main__":
    main()
