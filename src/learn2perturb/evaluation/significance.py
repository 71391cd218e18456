"""Tests on paired images: beyond so many standard errors, McNemar's exact test, Holm's correction of many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from learn2perturb.errors import ConfigError, InputError

# One-sided level at which a single comparison fails beyond two standard errors: 1 - Phi(2).
TWO_SIGMA = 0.022750131948179195
# Accuracies are ratios of whole numbers; a difference that lies on a threshold must not fall to a side by rounding.
_ROUNDING = 1e-9


def beyond(difference: float, allowed: float) -> bool:
    """Tell whether a difference of accuracies is more than ``allowed``, by more than rounding."""
    return difference > allowed + _ROUNDING


def exceeds(difference: float, allowed: float, standard_error: float, freedom: float = math.inf) -> float:
    """Return the one-sided p-value of "the difference is no more than ``allowed``": ``1 - F((d - allowed) / SE)``.

    F is Student's distribution function of so many degrees of ``freedom``, without end the normal one.
    """
    from scipy import stats

    if standard_error < _ROUNDING:
        return 0.0 if beyond(difference, allowed) else 1.0
    return float(stats.t.sf((difference - allowed) / standard_error, freedom))


def equals(difference: float, standard_error: float, freedom: float = math.inf) -> float:
    """Return the two-sided p-value of "there is no difference", by Student's distribution."""
    return min(1.0, 2 * exceeds(abs(difference), 0.0, standard_error, freedom))


def least_seen(standard_error: float, freedom: float = math.inf) -> float:
    """Return by how much a difference must exceed the allowed one for a single comparison to fail."""
    from scipy import stats

    return standard_error * float(stats.t.isf(TWO_SIGMA, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being many (Holm 1979): a level may be compared with each as if it were alone.

    The i-th smallest of m is multiplied by m - i + 1; results are at most 1 and keep the order.

    Raises:
        ConfigError: a value is no probability.
    """
    values = np.asarray(p_values, dtype=np.float64)
    if len(values) and not ((values >= 0) & (values <= 1)).all():
        raise ConfigError(f"p-values {list(p_values)} must lie in [0, 1]")
    order = np.argsort(values, kind="stable")
    scaled = np.minimum(values[order] * np.arange(len(values), 0, -1), 1.0)
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(scaled) if len(values) else scaled
    return [float(value) for value in adjusted]


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Return the two-sided exact p-value that two classifiers are equally often right (McNemar 1947).

    ``first`` and ``second`` (N) tell which images each got right. Only the images on which they disagree count; under
    equality each of these falls to either side with probability 1/2.

    Raises:
        InputError: the two differ in length, or are no booleans (N).
    """
    from scipy import stats

    left, right = np.asarray(first), np.asarray(second)
    if left.dtype != bool or right.dtype != bool or left.shape != right.shape or left.ndim != 1:
        raise InputError(
            f"first is {left.dtype} {left.shape} and second {right.dtype} {right.shape}; both must be one boolean an "
            "image, of the same images"
        )
    only_first, only_second = int((left & ~right).sum()), int((right & ~left).sum())
    disagreements = only_first + only_second
    return 1.0 if disagreements == 0 else float(stats.binomtest(only_first, disagreements).pvalue)
