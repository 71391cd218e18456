"""Certified radii from bounds on the chance of each class: pure functions of numbers, no network and no torch.

``p_low`` is a lower bound on the probability of the predicted class over draws, ``p_high`` an upper bound on that of
every other; ``sigma`` the standard deviation of the noise, ``sensitivity`` the D of what comes before it (the outputs
there differ by at most D times the images). Radii are norms of a change of the image, in [0, 1] pixel scale; 0 where
nothing can be certified. All arguments broadcast.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learn2perturb.errors import ConfigError

Floats = NDArray[np.float64]
RULES = ("tight", "dp")
MECHANISMS = ("gaussian", "laplace")
# Every delta gives a certificate, the best one counts; Lecuyer et al. search [0.001, 0.3) in steps of 0.001.
_DELTAS = np.arange(0.001, 0.3, 0.0005)


def pixeldp_radius(
    p_low: ArrayLike,
    p_high: ArrayLike,
    *,
    sigma: float,
    sensitivity: float = 1.0,
    rule: str = "tight",
    mechanism: str = "gaussian",
) -> Floats:
    """Return the radius that PixelDP's noise certifies: l2 for ``gaussian`` noise, l1 for ``laplace``.

    ``rule``: ``dp`` is the bound of Lecuyer et al. 2018, by differential privacy; ``tight`` the one that the same
    noise has by the Neyman-Pearson lemma (Cohen et al. 2019). For ``laplace`` both are the bound of pure privacy.

    Raises:
        ConfigError: an unknown rule or mechanism, a sigma or sensitivity not above 0, or no probabilities.
    """
    if rule not in RULES or mechanism not in MECHANISMS:
        raise ConfigError(
            f"rule is {rule!r} and mechanism {mechanism!r}; allowed: {', '.join(RULES)}; {', '.join(MECHANISMS)}"
        )
    if mechanism == "laplace":
        return laplace_radius(p_low, p_high, sigma=sigma, sensitivity=sensitivity)
    return (gaussian_radius if rule == "tight" else gaussian_dp_radius)(
        p_low, p_high, sigma=sigma, sensitivity=sensitivity
    )


def gaussian_radius(p_low: ArrayLike, p_high: ArrayLike, *, sigma: float, sensitivity: float = 1.0) -> Floats:
    """Return ``R = sigma / (2 D) (Phi^-1(p_low) - Phi^-1(p_high))``, l2 (Cohen et al. 2019, theorem 1).

    Raises:
        ConfigError: sigma or sensitivity is not above 0, or a probability outside [0, 1].
    """
    from scipy.stats import norm

    low, high = _checked(p_low, p_high, sigma, sensitivity)
    certain = low > high
    # Where nothing is certified the difference may be infinite minus infinite; it is not looked at.
    gap = norm.ppf(np.where(certain, low, 0.5)) - norm.ppf(np.where(certain, high, 0.5))
    return sigma / (2 * sensitivity) * gap


def gaussian_dp_radius(p_low: ArrayLike, p_high: ArrayLike, *, sigma: float, sensitivity: float = 1.0) -> Floats:
    """Return the l2 radius of Lecuyer et al. 2018: the largest over delta in [0.001, 0.3) and epsilon <= 1.

    Noise of this sigma is (epsilon, delta) private for changes of size
    ``sigma epsilon / (D sqrt(2 ln(1.25 / delta)))``, and they cannot change the prediction while
    ``p_low > exp(2 epsilon) p_high + (1 + exp(epsilon)) delta``. For a given delta the largest epsilon has a closed
    form, since the condition is quadratic in exp(epsilon).

    Raises:
        ConfigError: sigma or sensitivity is not above 0, or a probability outside [0, 1].
    """
    low, high = _checked(p_low, p_high, sigma, sensitivity)
    best = np.zeros(np.broadcast(low, high).shape)
    for delta in _DELTAS:
        room = np.maximum(low - delta, 0.0)
        # The positive root of high u^2 + delta u - room = 0, in the form that holds for high = 0 too.
        root = 2 * room / (delta + np.sqrt(delta**2 + 4 * high * room))
        epsilon = np.clip(np.log(np.maximum(root, 1.0)), 0.0, 1.0)
        best = np.maximum(best, sigma * epsilon / (sensitivity * np.sqrt(2 * np.log(1.25 / delta))))
    return best


def laplace_radius(p_low: ArrayLike, p_high: ArrayLike, *, sigma: float, sensitivity: float = 1.0) -> Floats:
    """Return ``R = b / (2 D) ln(p_low / p_high)``, l1, for Laplace noise of scale ``b = sigma / sqrt 2``: pure privacy.

    Raises:
        ConfigError: sigma or sensitivity is not above 0, or a probability outside [0, 1].
    """
    low, high = _checked(p_low, p_high, sigma, sensitivity)
    certain = low > high
    with np.errstate(divide="ignore"):
        ratio = np.log(np.where(certain, low, 1.0)) - np.log(np.where(certain, high, 1.0))
    return sigma / np.sqrt(2) / (2 * sensitivity) * ratio


def vote_bounds(counts: ArrayLike, alpha: float = 0.05, *, top: ArrayLike | None = None) -> tuple[Floats, Floats]:
    """Return ``(p_low, p_high)``, each (N,), that hold together with probability 1 - ``alpha`` for each image.

    Clopper-Pearson bounds on the votes ``counts`` (N, classes), Bonferroni over all that are used: with the class
    ``top`` (N,) chosen on other draws, one for each class; without, the most voted class of these very draws is
    taken, any class might have been it, and the level is halved. (The released PixelDP code does not halve it.)

    Raises:
        ConfigError: counts are no (N, classes >= 2) whole numbers with votes, or alpha is outside (0, 1).
    """
    from scipy.stats import beta

    votes = np.asarray(counts, dtype=np.float64)
    if votes.ndim != 2 or votes.shape[1] < 2 or (votes < 0).any() or (votes.sum(1) == 0).any():
        raise ConfigError(f"counts have shape {votes.shape}; give the votes (N, classes >= 2), at least one an image")
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha is {alpha!r}; it must be between 0 and 1, such as 0.05")
    level = alpha / votes.shape[1] / (2 if top is None else 1)
    chosen = votes.argmax(1) if top is None else np.asarray(top)
    total = votes.sum(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        lower = np.where(votes == 0, 0.0, beta.ppf(level, votes, total - votes + 1))
        upper = np.where(votes == total, 1.0, beta.ppf(1 - level, votes + 1, total - votes))
    rows = np.arange(len(votes))
    others = upper.copy()
    others[rows, chosen] = 0.0
    return lower[rows, chosen], others.max(1)


def _checked(p_low: ArrayLike, p_high: ArrayLike, sigma: float, sensitivity: float) -> tuple[Floats, Floats]:
    if not sigma > 0 or not sensitivity > 0:
        raise ConfigError(f"sigma is {sigma!r} and sensitivity {sensitivity!r}; both must be above 0")
    low, high = np.asarray(p_low, dtype=np.float64), np.asarray(p_high, dtype=np.float64)
    if not ((low >= 0) & (low <= 1)).all() or not ((high >= 0) & (high <= 1)).all():
        raise ConfigError("p_low and p_high must be probabilities, in [0, 1]; divide votes by their number")
    return low, high
