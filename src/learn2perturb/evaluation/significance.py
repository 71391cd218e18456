"""Tests on paired images: standard errors by bootstrap, McNemar's exact test, Holm's correction of many."""

from __future__ import annotations

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


def exceeds(difference: float, allowed: float, standard_error: float) -> float:
    """Return the one-sided p-value of "the difference is no more than ``allowed``", ``1 - Phi((d - allowed) / SE)``."""
    from scipy import stats

    if standard_error < _ROUNDING:
        return 0.0 if beyond(difference, allowed) else 1.0
    return float(stats.norm.sf((difference - allowed) / standard_error))


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
