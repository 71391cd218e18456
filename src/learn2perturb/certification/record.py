"""What a certification found: a radius for each image, certified accuracy against radius. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learn2perturb import records
from learn2perturb.brief import brief
from learn2perturb.certification.bounds import gaussian_dp_radius, laplace_radius
from learn2perturb.certification.config import METHODS
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation.intervals import wilson
from learn2perturb.evaluation.result import format_eps
from learn2perturb.records import PackedIntegers

ABSTAINED = -1
_ROUNDING = 1e-6  # of a radius: another release of scipy may give the last digits differently


def lower_bound(successes: ArrayLike, n: int, alpha: float) -> NDArray[np.float64]:
    """Return the one-sided Clopper-Pearson bound: with probability 1 - ``alpha`` the success rate is at least this."""
    from scipy.stats import beta

    k = np.asarray(successes, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(k == 0, 0.0, beta.ppf(alpha, k, n - k + 1))


def radius_of(p_low: ArrayLike, constant: float) -> NDArray[np.float64]:
    """Return ``R = Phi^-1(p_low) / S``, 0 where p_low <= 1/2 (Cohen et al. 2019, theorem 1, binary form)."""
    from scipy.stats import norm

    return np.maximum(norm.ppf(np.asarray(p_low)), 0.0) / constant


def largest_radius(n: int, alpha: float, constant: float) -> float:
    """Return the radius of an image on which all ``n`` draws agree: nothing beyond it can be certified."""
    return float(radius_of(lower_bound([n], n, alpha), constant)[0])


@final
@dataclass(frozen=True)
class Certification(records.Saved):
    """Certified radii of a majority vote, one an image.

    Attributes:
        method: ``first_noise``, ``smoothing`` or ``pixeldp``.
        norm: of the radii, [0, 1] pixel scale.
        constant: S: radii are in units of 1 / S; ``exact`` tells whether it is the value itself or an upper bound.
        site: of the first noise.
        n0, n, alpha: draws that chose, draws that certified, chance of a wrong certificate for each image.
        eps: l_inf size that the radii are compared with.
        pixels: numbers in an image.
        largest: the radius when all n draws agree.
        predictions: certified class, -1 where the vote abstained.
        votes: draws of the n for the chosen class.
        radii: 0 where it abstained.
    """

    __repr__ = brief

    FORMAT: ClassVar[str] = "learn2perturb.certification"
    VERSION: ClassVar[int] = 1

    method: str
    norm: str
    constant: float
    exact: bool
    site: str | None
    sigma: float | None
    n0: int
    n: int
    alpha: float
    eps: float
    pixels: int
    largest: float
    labels: PackedIntegers
    predictions: PackedIntegers
    votes: PackedIntegers
    radii: tuple[float, ...]
    num_classes: int
    seed: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def abstained(self) -> float:
        """Share of images without a certificate."""
        return float((self.predictions.unpack() == ABSTAINED).mean())

    @property
    def needed(self) -> float:
        """Radius that covers the l_inf ball of size eps: ``eps sqrt(pixels)`` in l2, ``eps pixels`` in l1."""
        return self.eps * (self.pixels if self.norm == "l1" else self.pixels**0.5)

    def accuracy_at(self, radius: float) -> float:
        """Return the certified accuracy: the share of images predicted rightly with at least this radius."""
        right = self.predictions.unpack() == self.labels.unpack()
        return float((right & (np.asarray(self.radii) >= radius)).mean())

    def curve(self, radii: Sequence[float] | None = None) -> tuple[tuple[float, float], ...]:
        """Return (radius, certified accuracy) pairs; by default 21 radii up to the largest that was certified."""
        if radii is None:
            radii = [float(radius) for radius in np.linspace(0, max((*self.radii, 1e-9)), 21)]
        return tuple((radius, self.accuracy_at(radius)) for radius in radii)

    @property
    def statement(self) -> str:
        """Say what the radii are worth against l_inf attacks of size eps."""
        size, needed = format_eps(self.eps), self.needed
        start = f"Against l_inf {size} an {self.norm} radius of {needed:.3f} is needed"
        if self.largest < needed:
            return (
                f"VACUOUS against l_inf {size}: {start[0].lower() + start[1:]}, and no image can be certified beyond "
                f"{self.largest:.3f}, even if all {self.n} draws agree."
            )
        share = self.accuracy_at(needed)
        if share == 0:
            return f"VACUOUS against l_inf {size}: {start[0].lower() + start[1:]}, and no image reached it."
        return f"{start}: {100 * share:.1f} % are certified."

    def _check(self) -> None:
        """Check that every radius and every abstention is what the votes give."""
        fix = "restore the file or certify again"
        labels, predictions, votes = (one.unpack() for one in (self.labels, self.predictions, self.votes))
        radii = np.asarray(self.radii, dtype=np.float64)
        if not labels.shape == predictions.shape == votes.shape == radii.shape or not len(radii):
            raise CheckpointError(f"labels, predictions, votes and radii are not one for each image; {fix}")
        if self.method not in METHODS or self.n < 1 or not 0 < self.alpha < 1 or not self.constant > 0:
            raise CheckpointError(f"n, alpha, constant or method are none that a certificate can have; {fix}")
        if self.method == "smoothing" and not (self.sigma and math.isclose(self.constant * self.sigma, 1)):
            raise CheckpointError(f"the constant is {self.constant:.6g}, and that of sigma is one through it; {fix}")
        for what, values, first, last in (
            ("label", labels, 0, self.num_classes - 1),
            ("prediction", predictions, ABSTAINED, self.num_classes - 1),
            ("number of votes", votes, 0, self.n),
        ):
            if values.min() < first or values.max() > last:
                raise CheckpointError(f"a {what} lies outside of {first} to {last}; {fix}")
        least, most, largest = self._radii_of(votes)
        wrong = np.flatnonzero(~((radii >= least - _ROUNDING) & (radii <= most + _ROUNDING)))
        if len(wrong):
            image = int(wrong[0])
            raise CheckpointError(
                f"image {image} has radius {radii[image]:.6g}, and its {votes[image]} of {self.n} votes give "
                f"{most[image]:.6g}; {fix}"
            )
        if not math.isclose(self.largest, largest, abs_tol=_ROUNDING):
            raise CheckpointError(
                f"the largest radius is {self.largest:.6g}, and {self.n} votes give {largest:.6g}; {fix}"
            )
        if not np.array_equal(predictions == ABSTAINED, radii <= 0):
            raise CheckpointError(f"an image without a radius has a certified class, or the other way round; {fix}")

    def _radii_of(self, votes: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """Return the least and the largest radius that ``votes`` (N) for the chosen class allow, and that of all n.

        They are one, but for ``pixeldp``, where how the other votes fall is not recorded.
        """
        if self.method != "pixeldp":
            radii = radius_of(lower_bound(votes, self.n, self.alpha), self.constant)
            return radii, radii, largest_radius(self.n, self.alpha, self.constant)
        rest = self.n - votes
        # The other votes all for one class, or spread evenly: the bound is on the class that has most of them.
        least, most = (self._private_radii(votes, others) for others in (rest, -(-rest // (self.num_classes - 1))))
        return least, most, float(self._private_radii(np.array([self.n]), np.array([0]))[0])

    def _private_radii(self, votes: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the radii of PixelDP for the votes of the chosen class, and of the one that has most of the rest."""
        level = self.alpha / self.num_classes
        low, high = lower_bound(votes, self.n, level), 1 - lower_bound(self.n - others, self.n, level)
        rule = laplace_radius if self.norm == "l1" else gaussian_dp_radius
        return rule(low, high, sigma=1.0, sensitivity=self.constant)

    def __str__(self) -> str:
        n = len(self.radii)
        where = f" at {self.site!r}" if self.site else ""
        constant = f"S = {self.constant:.4g}" if self.exact else f"S <= {self.constant:.4g}"
        how = f"{self.method}{where}, {constant}, n0 = {self.n0}, n = {self.n}, alpha = {self.alpha:g}"
        lines = [
            f"{self.metadata.get('model', 'model')}: {n} images, {how}",
            f"abstained: {100 * self.abstained:.1f} %; largest radius that n draws can certify: {self.largest:.4f}",
            "",
            f"{self.norm} radius   certified accuracy %",
        ]
        top = max((*self.radii, 0.0))
        for radius in sorted({0.0, *(top * part for part in (0.25, 0.5, 0.75)), self.needed}):
            share = self.accuracy_at(radius)
            interval = wilson(round(share * n), n)
            lines.append(f"{radius:9.4f}   {100 * share:6.2f} [{100 * interval.low:.2f}, {100 * interval.high:.2f}]")
        lines += ["", self.statement, "The certificate is of the majority vote over many draws, not of a single draw."]
        return "\n".join(lines)
