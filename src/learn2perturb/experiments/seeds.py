"""Several seeds to one number: the deviation over seeds is kept apart from the interval over images. Knows no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from learn2perturb.evaluation.intervals import Interval
from learn2perturb.experiments.view import Bounds

CONFIDENCE = 0.95


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation over seeds (ddof = 1); None for one."""
    return statistics.stdev(values) if len(values) > 1 else None


def over_seeds(values: Sequence[float]) -> Bounds | None:
    """Return Student's interval of the mean over seeds; None for one seed, which tells nothing of others."""
    if len(values) < 2:
        return None
    from scipy import stats

    mean, std = statistics.fmean(values), statistics.stdev(values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return Bounds(mean - half, mean + half)


def over_images(intervals: Sequence[Interval | None]) -> Bounds | None:
    """Return an interval over images and draws of the mean over these very seeds.

    The seeds are scored on the same images, so their errors go together, and no more can be said than that the
    deviation of a mean is at most the mean of the deviations: the ends are the means of the ends.
    """
    found = [interval for interval in intervals if interval is not None]
    if not found or len(found) < len(intervals):
        return None
    return Bounds(statistics.fmean(one.low for one in found), statistics.fmean(one.high for one in found))
