"""Do the attacks refute a claimed accuracy? A test for each attack, Holm over all that were tried, and the power."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from learn2perturb.evaluation.intervals import Interval
from learn2perturb.evaluation.significance import exceeds, holm

LEVEL = 0.025  # one-sided: the upper end of a 95 % interval lies below the claim
POWER = 0.8
_Z = 1.959963984540054  # of a 95 % interval


class Scored(Protocol):
    """A measurement: an accuracy of ``n`` images and its 95 % interval."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def accuracy(self) -> float:
        """Mean over scorings and images."""

    @property
    def interval(self) -> Interval:
        """Of the accuracy."""

    @property
    def n(self) -> int:
        """The number of images."""


@final
@dataclass(frozen=True)
class Trial:
    """A claim against what the attacks left.

    Attributes:
        found: the measurement that speaks most against the claim.
        tried: the attacks among which it was chosen; their number is what Holm's correction is for.
        p_values: one-sided, of "at least what is claimed is left", by measurement; of attacks that left more than these
            there is none, which counts as 1.
        drop: the least drop below the claim that these images would have shown with 80 % power, corrected as well.
    """

    found: str
    tried: tuple[str, ...]
    p_values: dict[str, float]
    drop: float

    @property
    def adjusted(self) -> float:
        """The p-value of ``found`` after Holm's correction."""
        rest = [1.0] * (len(self.tried) - len(self.p_values))
        return dict(zip(self.p_values, holm([*self.p_values.values(), *rest]), strict=False))[self.found]

    @property
    def refuted(self) -> bool:
        """Whether some attack is shown to leave less than is claimed."""
        return self.adjusted < LEVEL


def put_on_trial(measured: Sequence[Scored], accuracy: float, *, tried: Sequence[str]) -> Trial:
    """Test a claimed accuracy against what attacks left, out of all that were ``tried``."""
    p_values = {one.name: p_value(one, accuracy) for one in measured}
    found = min(measured, key=lambda one: (p_values[one.name], one.accuracy))
    return Trial(found.name, tuple(tried), p_values, drop_seen(found, accuracy, tried=len(tried)))


def p_value(measured: Scored, accuracy: float) -> float:
    """Return the one-sided p-value of "at least ``accuracy`` is left", by the upper half of the 95 % interval."""
    interval = measured.interval
    return exceeds(
        accuracy - measured.accuracy, 0.0, (interval.high - measured.accuracy) / interval.quantile, interval.freedom
    )


def drop_seen(measured: Scored, accuracy: float, *, tried: int) -> float:
    """Return how far below ``accuracy`` an attack must lie to refute it with 80 % power on as many images.

    The error at ``accuracy`` is that of single independent answers, times what the interval of ``measured`` is wider or
    narrower than such a one: several scorings narrow it, draws that images share widen it.
    """
    from scipy import stats

    n, share, interval = measured.n, measured.accuracy, measured.interval
    design = (interval.high - interval.low) / (2 * _Z) / _binomial(share, n) if 0 < share < 1 else 1.0
    return float(stats.norm.isf(LEVEL / tried) + stats.norm.ppf(POWER)) * design * _binomial(accuracy, n)


def _binomial(share: float, n: int) -> float:
    """Return the standard error of ``n`` answers, one at least of each kind."""
    inside = min(max(share, 1 / n), 1 - 1 / n) if n > 1 else 0.5
    return float((inside * (1 - inside) / n) ** 0.5)
