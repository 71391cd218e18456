"""Two diagnoses of the same images in the same ball: verdicts, checks side by side, paired differences. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import numpy as np

from learn2perturb import records
from learn2perturb.brief import brief
from learn2perturb.diagnosis.record import Diagnosis
from learn2perturb.diagnosis.verdict import percent
from learn2perturb.errors import InputError
from learn2perturb.evaluation.intervals import Interval, paired_difference
from learn2perturb.evaluation.result import format_eps
from learn2perturb.plugins import changed
from learn2perturb.tables import aligned

_ABSENT = "not there"


@final
@dataclass(frozen=True)
class Statuses:
    """The status of one check in both diagnoses."""

    number: int
    name: str
    first: str
    second: str


@final
@dataclass(frozen=True)
class PairedAccuracy:
    """One accuracy of both, on the first ``n`` images; ``difference`` is the first less the second.

    Attributes:
        what: ``clean``, ``reported`` or ``lowest``.
        first, second: the measurements compared.
        interval: of the difference, 95 %, paired over images.
    """

    what: str
    first: str
    second: str
    first_accuracy: float
    second_accuracy: float
    difference: float
    interval: Interval
    n: int

    @property
    def sentence(self) -> str:
        """What may be said."""
        points = (
            f"{100 * self.difference:+.1f} points [{100 * self.interval.low:+.1f}, {100 * self.interval.high:+.1f}]"
        )
        if self.interval.low > 0:
            return f"more of the first is left: {points}"
        if self.interval.high < 0:
            return f"more of the second is left: {points}"
        return f"no difference is shown: {points}"


@final
@dataclass(frozen=True)
class DiagnosisComparison(records.Saved):
    """What two diagnoses say of two models; ``notes`` name the settings in which they differ."""

    __repr__ = brief

    FORMAT: ClassVar[str] = "learn2perturb.diagnosis-comparison"
    VERSION: ClassVar[int] = 1

    first: str
    second: str
    verdicts: tuple[str, str]
    claims: tuple[str, str]
    checks: tuple[Statuses, ...]
    accuracies: tuple[PairedAccuracy, ...]
    eps: float
    norm: str
    notes: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        names = (self.first, self.second)
        lines = [
            f"{which}: {name}: {verdict.upper()}{f' (claimed {claim})' if claim else ''}"
            for which, name, verdict, claim in zip(("first ", "second"), names, self.verdicts, self.claims, strict=True)
        ]
        rows = [(str(one.number), one.name, one.first, one.second) for one in self.checks]
        lines += ["", *aligned([("", "check", "first", "second"), *rows]), ""]
        for one in self.accuracies:
            same = one.first == one.second
            by = "" if same else f" ({one.first}; {one.second})"
            lines.append(
                f"{one.what}: {percent(one.first_accuracy)} and {percent(one.second_accuracy)} of {one.n} images{by}; "
                f"{one.sentence}"
            )
        lines += [f"note: {note}" for note in self.notes]
        ball = f"{self.norm} {format_eps(self.eps)}"
        lines += ["", f"At {ball}. Difference: first less second; 95 % interval, paired over images."]
        return "\n".join(lines)


def compare_diagnoses(first: Diagnosis, second: Diagnosis) -> DiagnosisComparison:
    """Compare two diagnoses of the same images in the same ball.

    Args:
        first: what ``diagnose`` returned, or ``Diagnosis.load`` read.
        second: another one.

    Raises:
        InputError: they are of other images, another norm or another eps, or one is no diagnosis.
    """
    for one in (first, second):
        if not isinstance(one, Diagnosis):
            raise InputError(
                f"a {type(one).__name__} is no diagnosis; give what diagnose returned or Diagnosis.load read"
            )
    _check_comparable(first, second)
    names = [str(one.metadata.get("model", "a model")) for one in (first, second)]
    claims = ["" if one.claim is None else str(one.claim) for one in (first, second)]
    numbers = sorted({check.number for one in (first, second) for check in one.checks})
    pairs = [("clean", "clean", "clean"), ("reported", "reported", "reported"), ("lowest", first.lowest, second.lowest)]
    kept = ("weights", "step")
    return DiagnosisComparison(
        first=names[0],
        second=names[1],
        verdicts=(first.verdict, second.verdict),
        claims=(claims[0], claims[1]),
        checks=tuple(_statuses(number, first, second) for number in numbers),
        accuracies=tuple(_paired(what, first, one, second, other) for what, one, other in pairs),
        eps=first.eps,
        norm=first.norm,
        notes=tuple(_unlike(first, second)),
        metadata={key: [one.metadata.get(key) for one in (first, second)] for key in kept},
    )


def _check_comparable(first: Diagnosis, second: Diagnosis) -> None:
    balls = [f"{one.norm} {format_eps(one.eps)}" for one in (first, second)]
    if first.norm != second.norm or abs(first.eps - second.eps) > 1e-9:
        raise InputError(
            f"the first is of {balls[0]}, the second of {balls[1]}; diagnose both in one ball (--eps, --norm)"
        )
    fix = "; diagnose both on the same images (--dataset, --split, --limit, --seed)"
    one, other = first.labels.unpack(), second.labels.unpack()
    data = [str(found.metadata.get("data")) for found in (first, second)]
    if len(one) != len(other):
        raise InputError(f"the first is of {len(one)} images, the second of {len(other)}{fix}")
    if data[0] != data[1] or first.num_classes != second.num_classes:
        raise InputError(
            f"the first is of {data[0]}, {first.num_classes} classes, the second of {data[1]}, {second.num_classes} "
            f"classes{fix}"
        )
    hashes = [found.metadata.get("images") for found in (first, second)]
    if not np.array_equal(one, other) or (None not in hashes and hashes[0] != hashes[1]):
        raise InputError(f"the images of the two are not the same{fix}")


def _statuses(number: int, first: Diagnosis, second: Diagnosis) -> Statuses:
    found = [{check.number: check for check in one.checks}.get(number) for one in (first, second)]
    name = next(check.name for check in found if check is not None)
    one, other = (_ABSENT if check is None else check.status for check in found)
    return Statuses(number, name, one, other)


def _paired(what: str, first: Diagnosis, one: str, second: Diagnosis, other: str) -> PairedAccuracy:
    """Compare two measurements on the images that both are of: the first ones, in the same order."""
    left, right = first.measurement(one), second.measurement(other)
    n = min(left.n, right.n)
    scores = first.scores(left).first(n), second.scores(right).first(n)
    estimate = paired_difference(*scores)
    return PairedAccuracy(what, one, other, scores[0].mean(), scores[1].mean(), estimate.mean, estimate.interval, n)


def _unlike(first: Diagnosis, second: Diagnosis) -> Iterable[str]:
    """Say in which settings the two differ, and what is not known of them."""
    budgets = [one.budget for one in (first, second)]
    # Of numbers that an older record does not hold nothing is known.
    names = sorted(key for key in {*budgets[0]} & {*budgets[1]} if budgets[0][key] != budgets[1][key])
    if names:
        shown = ", ".join(f"{name} {budgets[0][name]} and {budgets[1][name]}" for name in names[:4])
        yield f"the budgets differ ({shown}{', ...' if len(names) > 4 else ''})"
    if first.metadata.get("parameters") != second.metadata.get("parameters"):
        yield f"the reported attacks differ: {first.metadata.get('attack')} and {second.metadata.get('attack')}"
    if first.seed != second.seed:
        yield f"the seeds differ: {first.seed} and {second.seed}"
    sources = [", ".join(one.metadata.get("sources", [])) or "none" for one in (first, second)]
    if sources[0] != sources[1]:
        yield f"the sources differ: {sources[0]}; {sources[1]}"
    predictors = [one.claim.predicted if one.claim is not None else "single draws" for one in (first, second)]
    if predictors[0] != predictors[1]:
        yield f"the lowest accuracies are of other predictors: {predictors[0]} and {predictors[1]}"
    yield from (f"{part} is of other code in the two" for part in changed(first.metadata, second.metadata))
    for which, one in (("first", first), ("second", second)):
        if one.metadata.get("images") is None:
            yield f"the {which} record holds no hash of its images, so that they are the same is not known"
    weights = [one.metadata.get("weights") for one in (first, second)]
    if weights[0] is not None and weights[0] == weights[1]:
        yield f"both are of the same weights ({weights[0]})"
