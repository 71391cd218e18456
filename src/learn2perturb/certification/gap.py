"""What the first noise guarantees of the risk under attack: Pinot's bound, as a record. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from learn2perturb import records
from learn2perturb.brief import brief
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation.intervals import bootstrap_mean
from learn2perturb.evaluation.result import format_eps
from learn2perturb.records import PackedIntegers


def place_of(site: str) -> str:
    """Return what a message calls a site; the network as a whole has no name."""
    return repr(site) if site else "the image"


def divergence(constant: float, distance: float, order: float = 1.0) -> float:
    """Return the Renyi divergence of two Gaussians that are ``constant * distance`` deviations apart.

    ``order S^2 d^2 / 2`` for features ``u + theta eps`` of images at l2 distance d; order 1 is the KL, the least.
    """
    return order * (constant * distance) ** 2 / 2


def risk_gap_bound(divergence: float, entropies: NDArray[np.float64]) -> float:
    """Return ``1 - exp(-divergence) mean exp(-H)``: the most by which the risk can grow under attack.

    Pinot et al., Theoretical evidence for adversarial robustness through randomization, 2019, theorem 3,
    https://arxiv.org/abs/1902.01148; H are the Shannon entropies of the answers to clean images, in nats.
    """
    return float(1 - math.exp(-divergence) * np.exp(-entropies).mean())


def total_variation(constant: float, distance: float) -> float:
    """Return ``2 Phi(S d / 2) - 1``, the total variation of the same two Gaussians: a bound on the gap as well."""
    return math.erf(constant * distance / (2 * math.sqrt(2)))


def entropy_bounds(votes: NDArray[np.int64], alpha: float) -> NDArray[np.float64]:
    """Return upper bounds (N,) of the entropies of distributions from votes (N, K); all hold with chance 1 - alpha.

    The entropy of the shares is too low by ``log(1 + (K - 1) / n)`` at most on average (Paninski 2003), and one vote
    moves it by ``2 log(n) / n`` at most, so that it is within ``log(n) sqrt(2 log(N / alpha) / n)`` of its mean with
    chance ``1 - alpha / N`` (Antos, Kontoyiannis 2001).
    """
    images, classes = votes.shape
    n = int(votes[0].sum())
    shares = votes / n
    with np.errstate(divide="ignore", invalid="ignore"):
        found = -np.where(votes > 0, shares * np.log(shares), 0.0).sum(axis=1)
    slack = math.log1p((classes - 1) / n) + math.log(max(n, 2)) * math.sqrt(2 * math.log(images / alpha) / n)
    bounds: NDArray[np.float64] = np.minimum(found + slack, math.log(classes))
    return bounds


@final
@dataclass(frozen=True)
class RiskGap(records.Saved):
    """How much the risk of one draw can grow within an l_inf ball, guaranteed by the first noise module.

    Attributes:
        constant: S, the most that a change of l2 norm 1 moves the noisy features, in deviations of their noise;
            ``exact`` tells whether it is the value itself or an upper bound.
        site: of the first noise.
        n, alpha: draws for each image; chance that one of the entropies is above its bound.
        eps: l_inf size of the ball, which lies in the l2 ball of ``distance``.
        pixels: numbers in an image.
        votes: (images x classes) how often each class was answered.
        bound: Pinot's, at most 1.
        floor: what it is at eps 0: that much is lost to the entropies alone.
        direct: the total variation of the noisy features, a bound on the same gap.
    """

    __repr__ = brief

    FORMAT: ClassVar[str] = "learn2perturb.risk_gap"
    VERSION: ClassVar[int] = 1

    constant: float
    exact: bool
    site: str
    n: int
    alpha: float
    eps: float
    pixels: int
    bound: float
    floor: float
    direct: float
    labels: PackedIntegers
    votes: PackedIntegers
    num_classes: int
    seed: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def distance(self) -> float:
        """Radius of the l2 ball that holds the l_inf ball of size eps."""
        return self.eps * math.sqrt(self.pixels)

    def counts(self) -> NDArray[np.int64]:
        """Return the votes (images, classes)."""
        return self.votes.unpack().reshape(-1, self.num_classes)

    @property
    def accuracies(self) -> NDArray[np.float64]:
        """Share of draws that are right, for each image."""
        counts = self.counts()
        shares: NDArray[np.float64] = counts[np.arange(len(counts)), self.labels.unpack()] / self.n
        return shares

    @property
    def accuracy(self) -> float:
        """Accuracy of one draw on the clean images."""
        return float(self.accuracies.mean())

    @property
    def reach(self) -> float:
        """l_inf size up to which Pinot's bound leaves any accuracy; 0 where it does at none."""
        kept, risk = 1 - self.floor, 1 - self.accuracy
        if risk <= 0:
            return math.inf
        return math.sqrt(max(2 * math.log(kept / risk), 0.0)) / self.constant / math.sqrt(self.pixels) if kept else 0.0

    @property
    def direct_reach(self) -> float:
        """The same of the total variation."""
        from scipy.special import ndtri

        return float(2 * ndtri((1 + self.accuracy) / 2)) / self.constant / math.sqrt(self.pixels)

    @property
    def statement(self) -> str:
        """Say what the bounds are worth against l_inf attacks of size eps."""
        size, left = format_eps(self.eps), self.accuracy - min(self.bound, self.direct)
        if left > 0:
            clean = f"{100 * self.accuracy:.1f} % on clean images"
            return f"Against l_inf {size} the accuracy of a draw is at least {100 * left:.1f} %, of {clean}."
        return (
            f"VACUOUS against l_inf {size}: the risk may grow by {100 * self.bound:.1f} points by Pinot's bound and by "
            f"{100 * self.direct:.1f} by the total variation, of an accuracy of {100 * self.accuracy:.1f} %. Anything "
            f"is left up to l_inf {self.reach:.2g} and {self.direct_reach:.2g}, {self._times()}."
        )

    def _times(self) -> str:
        best = max(self.reach, self.direct_reach)
        return f"{self.eps / best:.3g} times less" if best > 0 else "that is at none"

    def _check(self) -> None:
        """Check that the bounds are what the votes give."""
        fix = "restore the file or certify again"
        if self.n < 1 or not 0 < self.alpha < 1 or not self.constant > 0 or self.num_classes < 2:
            raise CheckpointError(f"n, alpha, constant or classes are none that a bound can have; {fix}")
        counts, labels = self.votes.unpack(), self.labels.unpack()
        if not len(labels) or len(counts) != len(labels) * self.num_classes:
            raise CheckpointError(f"labels and votes are not one row for each image; {fix}")
        if labels.min() < 0 or labels.max() >= self.num_classes or counts.min() < 0:
            raise CheckpointError(f"a label or a number of votes lies outside of what there is; {fix}")
        if bool((self.counts().sum(axis=1) != self.n).any()):
            raise CheckpointError(f"the votes of an image are not {self.n}; {fix}")
        for name, value in bounds_of(self.counts(), self.alpha, self.constant, self.distance).items():
            if not math.isclose(getattr(self, name), value, abs_tol=1e-6):
                raise CheckpointError(f"{name} is {getattr(self, name):.6g} and the votes give {value:.6g}; {fix}")

    def __str__(self) -> str:
        interval = bootstrap_mean(self.accuracies, seed=self.seed).interval
        constant = f"S = {self.constant:.4g}" if self.exact else f"S <= {self.constant:.4g}"
        what = f"{self.metadata.get('model', 'model')}: {len(self.accuracies)} images, renyi at {place_of(self.site)}"
        clean = f"{100 * self.accuracy:.2f} [{100 * interval.low:.2f}, {100 * interval.high:.2f}]"
        moved = f"{self.constant * self.distance:.4g}"
        lines = [
            f"{what}, {constant}, n = {self.n}, alpha = {self.alpha:g}",
            f"accuracy of a draw, clean: {clean} %",
            f"l_inf {format_eps(self.eps)} moves the noisy features by {moved} deviations of their noise at most",
            "",
            f"gap, Pinot et al. 2019   {100 * self.bound:6.2f} points (at eps 0, by entropy, {100 * self.floor:.2f})",
            f"gap, total variation     {100 * self.direct:6.2f} points",
            "",
            self.statement,
            "The guarantee is of single draws on these images, for l2 changes; an l_inf ball is put into an l2 ball.",
        ]
        return "\n".join(lines)


def bounds_of(votes: NDArray[np.int64], alpha: float, constant: float, distance: float) -> dict[str, float]:
    """Return ``bound``, ``floor`` and ``direct`` from votes (N, K)."""
    entropies = entropy_bounds(votes, alpha)
    return {
        "bound": risk_gap_bound(divergence(constant, distance), entropies),
        "floor": risk_gap_bound(0.0, entropies),
        "direct": total_variation(constant, distance),
    }
