"""Two evaluations of the same images: the paired difference, its interval, and whether it is more than chance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from learn2perturb import records
from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation.intervals import Interval, paired_bootstrap
from learn2perturb.evaluation.result import Evaluation, Row
from learn2perturb.evaluation.significance import holm, mcnemar

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """Accuracy of the first less that of the second, paired over ``n`` images.

    Attributes:
        first, second: the rows compared.
        first_accuracy, second_accuracy: means over scorings.
        difference: first less second.
        standard_error: of the difference, paired bootstrap over images.
        interval: of the difference, percentile bootstrap over images.
        mcnemar: exact p-value, two-sided, from one scoring of each (the first).
        mcnemar_holm: the same, corrected for the number of rows compared.
        n: images.
    """

    first: str
    second: str
    first_accuracy: float
    second_accuracy: float
    difference: float
    standard_error: float
    interval: Interval
    mcnemar: float
    mcnemar_holm: float
    n: int

    @property
    def sentence(self) -> str:
        """What may be said."""
        points = (
            f"{100 * self.difference:+.2f} points [{100 * self.interval.low:+.2f}, {100 * self.interval.high:+.2f}]"
        )
        if self.interval.low > 0:
            return f"the first is better: {points}"
        if self.interval.high < 0:
            return f"the second is better: {points}"
        return f"neither is shown to be better: {points}"


@dataclass(frozen=True)
class Comparison(records.Saved):
    """Differences of two evaluations, row by row."""

    FORMAT: ClassVar[str] = "learn2perturb.comparison"
    VERSION: ClassVar[int] = 1

    first: str
    second: str
    differences: tuple[Difference, ...]
    confidence: float
    metadata: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"first:  {self.first}", f"second: {self.second}", ""]
        for one in self.differences:
            rows = one.first if one.first == one.second else f"{one.first} against {one.second}"
            lines += [
                f"{rows}: {100 * one.first_accuracy:.2f} % and {100 * one.second_accuracy:.2f} % of {one.n} images",
                f"  {one.sentence}, McNemar p = {one.mcnemar_holm:.2g}",
            ]
        lines += [
            "",
            f"Difference: first less second; {100 * self.confidence:g} % interval: paired bootstrap over images.",
            f"McNemar: exact, on one scoring of each; Holm's correction for {len(self.differences)} rows.",
            "One training seed of each: the interval says nothing about other seeds.",
        ]
        return "\n".join(lines)


def compare(
    first: Evaluation, second: Evaluation, *, pairs: Iterable[tuple[str, str]] = (), confidence: float = 0.95
) -> Comparison:
    """Compare two evaluations of the same images, row by row.

    Args:
        first: what ``evaluate`` returned, or ``Evaluation.load`` read.
        second: another one, of the same images.
        pairs: attacks to compare that have other names in the two, such as ``("eot-pgd20", "pgd20")``; without, all
            rows that agree in attack, size, noise and predictor.
        confidence: of the intervals.

    Raises:
        InputError: they are of different images.
        ConfigError: they have no row in common.
    """
    _check_images(first, second)
    rows = _rows(first, second, tuple(pairs))
    found = []
    for left, right in rows:
        one, other = left.correct.unpack(), right.correct.unpack()
        estimate = paired_bootstrap(one.mean(axis=0), other.mean(axis=0), _RESAMPLES, first.seed, confidence)
        found.append((left, right, estimate, mcnemar(one[0], other[0])))
    corrected = holm([p for *_, p in found])
    differences = tuple(
        Difference(
            first=left.label,
            second=right.label,
            first_accuracy=left.accuracy,
            second_accuracy=right.accuracy,
            difference=estimate.mean,
            standard_error=estimate.standard_error,
            interval=estimate.interval,
            mcnemar=p,
            mcnemar_holm=adjusted,
            n=left.n,
        )
        for (left, right, estimate, p), adjusted in zip(found, corrected, strict=True)
    )
    names = [str(one.metadata.get("model", "a model")) for one in (first, second)]
    return Comparison(names[0], names[1], differences, confidence, {"resamples": _RESAMPLES})


def _check_images(first: Evaluation, second: Evaluation) -> None:
    one, other = first.labels.unpack(), second.labels.unpack()
    names = [str(evaluation.metadata.get("data")) for evaluation in (first, second)]
    mend = "; evaluate both on the same images (--dataset, --split, --limit)"
    if len(one) != len(other):
        raise InputError(f"the first is of {len(one)} images, the second of {len(other)}{mend}")
    if names[0] != names[1] or first.num_classes != second.num_classes:
        raise InputError(f"the first is of {names[0]}, {first.num_classes} classes, the second of {names[1]}, "
                         f"{second.num_classes} classes{mend}")  # fmt: skip
    if not np.array_equal(one, other):
        differing = int((one != other).sum())
        raise InputError(f"the labels of {differing} of {len(one)} images differ, so these are not the same{mend}")


def _rows(first: Evaluation, second: Evaluation, pairs: tuple[tuple[str, str], ...]) -> list[tuple[Row, Row]]:
    if pairs:
        return [(_only(first, left), _only(second, right)) for left, right in pairs]
    known = {_key(row): row for row in second.rows}
    found = [(row, known[_key(row)]) for row in first.rows if _key(row) in known]
    if not found:
        shown = [", ".join(row.label for row in evaluation.rows) for evaluation in (first, second)]
        raise ConfigError(f"no row in common: {shown[0]} against {shown[1]}; name what to compare as pairs")
    return found


def _only(evaluation: Evaluation, attack: str) -> Row:
    """Return the row with the noise as it is; a pair names no size, so there must be one."""
    return evaluation.row(attack, noise=any(row.noise for row in evaluation.rows if row.attack == attack))


def _key(row: Row) -> tuple[Any, ...]:
    return row.attack, None if row.eps is None else round(row.eps, 9), row.noise, row.predictor
