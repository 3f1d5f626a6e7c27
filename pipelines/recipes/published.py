"""The tables that recipes are compared with: top-1 in percent, or mean squared error.

Source: read in the tables of later papers, not in those of the methods themselves. LVU: all videos of its test split,
frozen ViT-L/16 tokens of ImageNet-21k.
"""

from __future__ import annotations

from pipelines.config.paper import CLASS_TASKS, REGRESSION_TASKS

LVU_TASKS = (*CLASS_TASKS, *REGRESSION_TASKS)
LVU: dict[str, tuple[float | None, ...]] = {
    "LST": (52.38, 37.31, 62.79, 56.07, 52.70, 42.26, 39.16, 0.31, 3.83),
    "Performer": (50.00, 38.80, 60.46, 58.87, 49.45, 48.21, 41.25, 0.31, 3.93),
    "Orthoformer": (50.00, 38.30, 66.27, 55.14, 55.79, 47.02, 43.35, 0.29, 3.86),
    "ViS4mer": (57.14, 40.79, 67.44, 62.61, 54.71, 48.80, 44.75, 0.26, 3.63),
    "S5": (61.98, 41.75, 69.88, 66.40, 58.80, 50.60, 47.70, 0.25, 3.51),
    "S5 + LSMCL": (61.98, 41.75, 72.53, 66.40, 61.34, 50.60, 47.70, 0.24, 3.51),
    "S5 + LSMCL, 100 frames": (67.1, 42.1, 73.5, 67.3, 65.4, 51.3, 48.0, None, None),
    "Learnable VTM": (64.28, 42.12, 75.58, 70.09, 59.77, 53.57, 48.55, 0.21, 4.01),
}
"""A method's results in the order of `LVU_TASKS`; 60 frames where the name says nothing else."""
WHOLE: dict[str, dict[str, float]] = {
    "breakfast": {
        "Distant Supervision": 89.9,
        "ViS4mer": 88.17,
        "S5": 90.14,
        "S5 + LSMCL": 90.70,
    },
    "coin": {
        "TSN": 73.40,
        "Distant Supervision": 90.0,
        "ViS4mer": 88.41,
        "S5": 90.42,
        "S5 + LSMCL": 90.81,
    },
}
"""64 frames, features of a Swin-B trained on Kinetics-600."""


def published(benchmark: str, task: str) -> dict[str, float]:
    """Return each method's published result, best at 60 frames last but for later papers; empty where there is none."""
    if benchmark != "lvu":
        return dict(WHOLE.get(benchmark, {}))
    column = LVU_TASKS.index(task)
    return {method: value for method, row in LVU.items() if (value := row[column]) is not None}
