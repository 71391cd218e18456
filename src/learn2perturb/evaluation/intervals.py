"""Intervals and means for accuracies: Wilson for one scoring, bootstrap over images for means over draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learn2perturb.errors import ConfigError, InputError

# Bounds the memory of one block of resamples: 2 ** 21 weights, as int64 and as float64, are 32 MiB.
_BLOCK = 2**21
_ROUNDING = 1e-9
# In widths, times the root of the number of resamples: five standard deviations of the difference of two bootstraps.
_SCATTER = 5.0


@dataclass(frozen=True)
class Interval:
    """A confidence interval and how it was found; ``resamples`` is 0 where nothing was resampled."""

    low: float
    high: float
    confidence: float
    method: Literal["wilson", "bootstrap"]
    resamples: int = 0

    def agrees(self, other: Interval) -> bool:
        """Tell whether both can come from the same data.

        A bootstrap is drawn, and what a seed draws depends on numpy and on the machine's arithmetic: its ends scatter
        by about a fiftieth of the width for 2,000 resamples, and differ by no more than a few times that.
        """
        if (self.method, self.resamples, self.confidence) != (other.method, other.resamples, other.confidence):
            return False
        allowed = _ROUNDING
        if self.method == "bootstrap":
            width = max(other.high - other.low, self.high - self.low)
            allowed += min(1.0, _SCATTER / self.resamples**0.5) * width
        return abs(self.low - other.low) <= allowed and abs(self.high - other.high) <= allowed


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its bootstrap standard error and interval."""

    mean: float
    standard_error: float
    interval: Interval


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for ``k`` successes in ``n`` trials (Wilson 1927), by ``scipy.stats.binomtest``.

    Raises:
        ConfigError: ``n < 1``, ``k`` outside 0..n, or a confidence outside (0, 1).
    """
    from scipy import stats

    _check_confidence(confidence)
    if n < 1 or not 0 <= k <= n:
        raise ConfigError(f"{k} successes in {n} trials: n must be >= 1 and k in 0..n; count again")
    interval = stats.binomtest(int(k), int(n)).proportion_ci(confidence, method="wilson")
    return Interval(float(interval.low), float(interval.high), confidence, "wilson")


def bootstrap_mean(per_image: ArrayLike, resamples: int = 2000, seed: int = 0, confidence: float = 0.95) -> Estimate:
    """Percentile bootstrap of the mean of ``per_image`` (N) over images (Efron 1979).

    Resampling images with replacement draws multinomial weights.  Equal values are pooled first, which leaves the
    distribution of the mean unchanged: a mean over D draws takes D + 1 values at most, so that 2,000 resamples of
    10,000 images cost 2,000 x (D + 1) weights.  A function of ``seed``; memory is bounded for distinct values too.

    Raises:
        InputError: ``per_image`` is empty, not one-dimensional, or not finite.
        ConfigError: ``resamples < 1`` or a confidence outside (0, 1).
    """
    values = _vector("per_image", per_image)
    _check_confidence(confidence)
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}, must be >= 1; 2000 is usual")
    distinct, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(seed)
    share = counts / len(values)
    block = max(1, _BLOCK // len(distinct))
    means = np.concatenate(
        [
            generator.multinomial(len(values), share, size=min(block, resamples - start)) @ distinct
            for start in range(0, resamples, block)
        ]
    ) / len(values)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    error = float(means.std(ddof=1)) if resamples > 1 else 0.0
    return Estimate(float(values.mean()), error, Interval(float(low), float(high), confidence, "bootstrap", resamples))


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Bootstrap the mean of ``first - second``, both per image (N) on the same images in the same order.

    Raises:
        InputError: the two differ in length, or either is empty, not one-dimensional, or not finite.
    """
    left, right = _vector("first", first), _vector("second", second)
    if left.shape != right.shape:
        raise InputError(f"first has {len(left)} images, second {len(right)}; a paired difference needs the same ones")
    return bootstrap_mean(left - right, resamples, seed, confidence)


def accuracy_interval(
    correct: NDArray[np.bool_], *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Interval of the mean accuracy of ``correct`` (scorings, N): over images, not over scorings.

    Wilson where each image is scored once, or alike in all scorings (a bootstrap of 0 % or 100 % would have no width);
    bootstrap of the per-image means elsewhere.
    """
    per_image = correct.mean(axis=0)
    if np.isin(per_image, (0.0, 1.0)).all():
        return wilson(int(per_image.sum()), len(per_image), confidence)
    return bootstrap_mean(per_image, resamples, seed, confidence).interval


def mean_and_std(correct: NDArray[np.bool_]) -> tuple[float, float | None]:
    """Mean and standard deviation (ddof = 1; None for one scoring) over scorings of ``correct`` (S, N)."""
    accuracies = correct.mean(axis=1)
    return float(accuracies.mean()), float(accuracies.std(ddof=1)) if len(accuracies) > 1 else None


def worst_of(correct: NDArray[np.bool_], n: int) -> float:
    """Accuracy against an adversary who needs one wrong answer in ``n`` fresh draws, from ``correct`` (S, N), S >= n.

    Mean over images of ``C(c, n) / C(S, n)``, c the number of correct scorings: the mean over all choices of n of the
    S scorings, so unbiased, where taking the first n would waste the others.

    Raises:
        ConfigError: ``n`` outside 1..S.
    """
    scorings = len(correct)
    if not 1 <= n <= scorings:
        raise ConfigError(f"worst of {n} draws cannot be told from {scorings}; score with draws >= {n}")
    counts = correct.sum(axis=0).astype(np.float64)
    survives = np.ones_like(counts)
    for taken in range(n):
        survives *= np.maximum(counts - taken, 0) / (scorings - taken)
    return float(survives.mean())


def majority(predictions: NDArray[np.integer[Any]], num_classes: int) -> NDArray[np.int64]:
    """Majority vote (N) of ``predictions`` (M, N); ties go to the smallest class index."""
    images = predictions.shape[1]
    flat = predictions.astype(np.int64) + np.arange(images) * num_classes
    votes = np.bincount(flat.reshape(-1), minlength=images * num_classes).reshape(images, num_classes)
    winners: NDArray[np.int64] = votes.argmax(axis=1)  # numpy's argmax returns the first maximum
    return winners


def _vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or len(vector) == 0 or not np.isfinite(vector).all():
        raise InputError(f"{name} has shape {vector.shape}, must be one finite number per image, at least one")
    return vector


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}, must lie in (0, 1); 0.95 is usual")
