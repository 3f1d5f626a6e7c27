"""The interval of a mean over few runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of results over seeds (Student's t); None for a single one."""
    if len(values) < 2:
        return None
    # Its import takes a second, and most commands need none.
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half
