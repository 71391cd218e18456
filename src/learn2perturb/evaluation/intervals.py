"""Intervals of accuracies and of their paired differences, over images and over draws that images may share.

A table ``Y`` (S, N) says which of N images were right in each of S scorings; a scoring is made of passes, and the
images of a pass may share the draws of the model's noise. With crossed effects, ``Y_si = mu + a_i + g_s + e_si``, the
variance of the mean is ``(a^2 + e^2 / S) / N + g^2 / passes``: first that of the per-image means, then what the
images of one pass have in common beyond it. This is the two-way variance, ``V_images + V_draws - V_both`` (Cameron,
Gelbach, Miller 2011; Owen 2007), with the degrees of freedom of Satterthwaite 1946.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learn2perturb.errors import ConfigError, InputError

# Bounds the memory of one block of resamples: 2 ** 21 weights, as int64 and as float64, are 32 MiB.
_BLOCK = 2**21
_ROUNDING = 1e-9
# In widths, times the root of the number of resamples: five standard deviations of the difference of two bootstraps.
_SCATTER = 5.0
# Degrees of freedom below which the spread of the draws is hardly known, so that the wider of two estimates is taken;
# and those that a single scoring must have, from the differences of its passes, for its draws to be judged at all.
_FEW, _FEWEST = 4.0, 2.7
_USUAL = 0.95  # confidence at which two estimates are compared
ONE_DRAW = (
    "over images only: one scoring does not tell how far another draw would move it, where the images of a pass share "
    "their draws; score several times (draws)"
)


@final
@dataclass(frozen=True)
class Interval:
    """A confidence interval and how it was found; ``resamples`` is 0 where nothing was resampled.

    ``bootstrap`` is of records of before: over images only. ``note`` says what the interval does not cover, ``freedom``
    of how many degrees of freedom its quantile is.
    """

    low: float
    high: float
    confidence: float
    method: Literal["wilson", "bootstrap", "two-way"]
    resamples: int = 0
    note: str = ""
    freedom: float = math.inf

    @property
    def quantile(self) -> float:
        """How many standard errors each half of it is wide, about."""
        return _quantile(self.confidence, self.freedom)

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


@final
@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error, the error's degrees of freedom, and its interval."""

    mean: float
    standard_error: float
    interval: Interval
    freedom: float = math.inf


@final
@dataclass(frozen=True, eq=False)
class Scores:
    """Which images were right in each scoring, and which of them were scored in one pass.

    Attributes:
        correct: (S, N), a row for each scoring.
        batches: images in each pass of a scoring, in order. Empty where it is not known: then all count as one pass,
            which holds for any, and gives no narrower an interval.
        random: whether another scoring might differ; several scorings tell it themselves.
    """

    correct: NDArray[np.bool_]
    batches: tuple[int, ...] = ()
    random: bool = False

    def __post_init__(self) -> None:
        if self.correct.ndim != 2 or not self.correct.size:
            raise InputError(f"correct has shape {self.correct.shape}, must be (scorings, images), one at least")
        if self.batches and (min(self.batches) < 1 or sum(self.batches) != self.correct.shape[1]):
            raise InputError(f"passes of {self.batches} images are not those of {self.correct.shape[1]} images")

    @property
    def per_image(self) -> NDArray[np.float64]:
        """Share of scorings that were right, for each image."""
        shares: NDArray[np.float64] = self.correct.mean(axis=0)
        return shares

    @property
    def n(self) -> int:
        """Number of images."""
        return self.correct.shape[1]

    def mean(self) -> float:
        """Return the mean over scorings and images."""
        return float(self.correct.mean())

    def first(self, n: int) -> Scores:
        """Return the scores of the first ``n`` images."""
        ends = np.minimum(np.cumsum(self.batches), n)
        sizes = np.diff(ends, prepend=0)
        return Scores(self.correct[:, :n], tuple(int(size) for size in sizes if size), self.random)


def passes_of(n: int, batch_size: int) -> tuple[int, ...]:
    """Return the images in each pass where ``n`` are scored ``batch_size`` at a time."""
    return tuple(min(batch_size, n - start) for start in range(0, n, batch_size))


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
    """Percentile bootstrap of the mean of ``per_image`` (N) over images (Efron 1979), which must be independent.

    Draws that several images share make it too narrow: :func:`paired_difference` and ``evaluate`` allow for them.

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

    Over independent images only: see :func:`bootstrap_mean`.

    Raises:
        InputError: the two differ in length, or either is empty, not one-dimensional, or not finite.
    """
    left, right = _vector("first", first), _vector("second", second)
    if left.shape != right.shape:
        raise InputError(f"first has {len(left)} images, second {len(right)}; a paired difference needs the same ones")
    return bootstrap_mean(left - right, resamples, seed, confidence)


def accuracy_interval(scores: Scores | NDArray[np.bool_], *, confidence: float = 0.95) -> Interval:
    """Interval of the mean accuracy, over images and over the draws that images share.

    Wilson's where each image is scored once, or alike in all scorings. Elsewhere his formula with ``p (1 - p) / T`` for
    the number of images, T the two-way variance, and Student's quantile for the normal one (as in surveys: Korn and
    Graubard 1998). A single random scoring of fewer than four passes tells nothing of other draws, and has a note.

    Args:
        scores: as scored; an array (S, N) is taken for passes that are not known, of a fixed function if S is 1.
        confidence: of the interval.
    """
    _check_confidence(confidence)
    if not isinstance(scores, Scores):
        scores = Scores(scores)
    draws = _over_draws(scores)
    per_image, mean = scores.per_image, scores.mean()
    if draws is None or mean in (0.0, 1.0):
        interval = wilson(round(mean * scores.n), scores.n, confidence)
        return replace(interval, note=_not_covered([scores]))
    images = float(np.square(per_image - mean).sum()) / scores.n**2
    total, freedom = _combined(images, [draws])
    t = _quantile(confidence, freedom)
    weight = t * t * total / (mean * (1 - mean))  # t^2 over the effective number of images
    centre = (mean + weight / 2) / (1 + weight)
    half = t / (1 + weight) * math.sqrt(total + weight * total / (4 * mean * (1 - mean)))
    return Interval(max(centre - half, 0.0), min(centre + half, 1.0), confidence, "two-way", freedom=freedom)


def follows(interval: Interval, scores: Scores, *, seed: int) -> bool:
    """Tell whether an interval of a record is that of its ``scores``, by the method that it names.

    Records of before have Wilson's for one scoring of a random model, and for several a bootstrap by ``seed``.
    """
    if interval.method == "bootstrap":
        found = bootstrap_mean(scores.per_image, interval.resamples, seed, interval.confidence).interval
    else:
        plain = scores if interval.method == "two-way" else Scores(scores.correct)
        found = accuracy_interval(plain, confidence=interval.confidence)
    return interval.agrees(found)


def paired_difference(first: Scores, second: Scores | float, *, confidence: float = 0.95) -> Estimate:
    """Mean of ``first`` less ``second`` on the same images, its standard error and interval, over images and draws.

    The two are scored by draws of their own; ``second`` may be a number. Where neither has draws, two images more, one
    for either side, keep the interval from being too narrow where few images differ (Bonett, Price 2012).

    Raises:
        InputError: they are of different numbers of images.
    """
    _check_confidence(confidence)
    tables = [first] if isinstance(second, float) else [first, second]
    if len({table.n for table in tables}) > 1:
        sizes = " images, second ".join(str(table.n) for table in tables)
        raise InputError(f"first has {sizes}; a paired difference needs the same ones")
    values = first.per_image - (second if isinstance(second, float) else second.per_image)
    mean, n = float(values.mean()), len(values)
    images = float(np.square(values - mean).sum()) / n / max(n - 1, 1)
    found = [part for part in map(_over_draws, tables) if part is not None]
    total, freedom = _combined(images, found)
    centre, half = mean, _quantile(confidence, freedom) * math.sqrt(total)
    if not found and len(tables) == 2:
        centre = mean * n / (n + 2)
        half = _quantile(confidence, math.inf) * math.sqrt(((values @ values + 2) / (n + 2) - centre**2) / (n + 2))
    interval = Interval(centre - half, centre + half, confidence, "two-way", note=_not_covered(tables), freedom=freedom)
    return Estimate(mean, math.sqrt(total), interval, freedom)


@final
@dataclass(frozen=True)
class _Draws:
    """Variance of a mean by its draws.

    Attributes:
        seen: from the sums of the passes.
        shared: the same less what draws of their own would give the images.
        freedom: degrees of freedom of both.
        few: whether the draws are too few for the shared part to have an error of its own.
    """

    seen: float
    shared: float
    freedom: float
    few: bool

    @property
    def unsure(self) -> float:
        """What has an error of Satterthwaite's kind."""
        return self.seen if self.few else self.shared


def _over_draws(scores: Scores) -> _Draws | None:
    """Return what draws add to the variance of the mean; None where nothing varies, or nothing is known.

    ``V_draws - V_both = c sum_sb ((sum_i r_si)^2 - sum_i r_si^2) / (S N)^2`` over scorings s and passes b, where r is
    the deviation of a score from the mean of its image and c = S / (S - 1): the covariance of images in one pass. From
    a single scoring the deviations are those from the mean of all, so that passes are compared with each other.
    """
    correct = scores.correct
    scorings, n = correct.shape
    sizes = np.array(scores.batches or (n,), dtype=np.float64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    sums = np.add.reduceat(correct, starts, axis=1, dtype=np.int64).astype(np.float64)
    squares, fourths = float((sizes**2).sum()), float((sizes**4).sum())
    effective = squares**2 / fourths  # passes of one size that would tell as much
    share = scores.per_image
    if scorings > 1:
        deviations, own = sums - sums.mean(axis=0), float((share * (1 - share)).sum()) * scorings
        factor, freedom = scorings / (scorings - 1), (scorings - 1) * effective
        if own == 0:
            return None
    else:
        freedom = effective - effective / len(sizes)
        if not scores.random or freedom < _FEWEST:
            return None
        deviations, own = sums - sizes * share.mean(), float(share.mean() * (1 - share.mean())) * n
        factor = squares / (squares - 2 * float((sizes**3).sum()) / n + (squares / n) ** 2)
    scale = factor / (scorings * n) ** 2
    seen = scale * float(np.square(deviations).sum())
    return _Draws(seen, max(seen - scale * own, 0.0), freedom, few=scorings == 1 or freedom < _FEW)


def _not_covered(tables: Sequence[Scores]) -> str:
    unknown = any(one.random and len(one.correct) == 1 and _over_draws(one) is None for one in tables)
    return ONE_DRAW if unknown else ""


def _combined(images: float, draws: Sequence[_Draws]) -> tuple[float, float]:
    """Return the variance over images and draws together, and its degrees of freedom.

    Where draws are few, that of the draws alone if it is wider: of two or three draws, some are alike by chance.
    """
    found = [(images + sum(part.shared for part in draws), [(part.unsure, part.freedom) for part in draws])]
    few = [part for part in draws if part.few]
    if few:
        found.append((sum(part.seen for part in few), [(part.seen, part.freedom) for part in few]))
    estimates = [(total, _satterthwaite(total, parts)) for total, parts in found]
    return max(estimates, key=lambda one: _quantile(_USUAL, one[1]) * math.sqrt(one[0]))


def _satterthwaite(total: float, parts: Sequence[tuple[float, float]]) -> float:
    error = sum(variance**2 / freedom for variance, freedom in parts)
    if error == 0 or total == 0:
        return math.inf
    # The shared part of the variance is cut at zero, so that the total may be less than what its error is of.
    return max(total**2 / error, min(freedom for _, freedom in parts))


def _quantile(confidence: float, freedom: float) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + confidence) / 2, freedom))


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
