"""What a diagnosis found: checks with their evidence, curves, and a verdict in plain words. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, final

from learn2perturb import records
from learn2perturb.brief import brief
from learn2perturb.diagnosis.checks import CHECKS
from learn2perturb.diagnosis.claim import Claim
from learn2perturb.diagnosis.trial import Trial
from learn2perturb.errors import UnknownNameError
from learn2perturb.evaluation.intervals import Interval, Scores, accuracy_interval, passes_of
from learn2perturb.records import PackedBits, PackedIntegers

Status = Literal["passed", "failed", "not shown", "does not apply"]
# Of a claim: refuted, not refuted. Without one, of the gradients and the attack: trusted, not trusted.
Verdict = Literal["refuted", "not refuted", "trusted", "not trusted", "not shown"]

NO_PROOF = "Passing is no proof: a stochastic counter-example is known (Popovic et al. 2022)."

# What the first version of the record said -> what this one says
_FIRST = {"stands": "trusted", "does not stand": "not trusted"}
_FIRST_WORDS = {
    "THE CLAIM STANDS": "GRADIENTS CAN BE TRUSTED",
    "THE CLAIM DOES NOT STAND as it is": "GRADIENTS CANNOT BE TRUSTED",
    "speaks against the claim": "speaks against the gradients",
}


@final
@dataclass(frozen=True)
class Judged:
    """One statistical statement: a difference of accuracies is no more than ``allowed``.

    Attributes:
        text: the statement.
        difference: paired over ``n`` images.
        allowed: the threshold.
        standard_error: of the difference, over images and draws; ``freedom``: its degrees of freedom.
        p_value: one-sided, of the statement.
        adjusted: the same after Holm's correction over all statements of the diagnosis.
        holds: whether it was not refuted.
    """

    text: str
    difference: float
    allowed: float
    standard_error: float
    n: int
    p_value: float
    adjusted: float
    holds: bool
    freedom: float = math.inf


@final
@dataclass(frozen=True)
class Check:
    """One of the checks: its verdict, a sentence, the numbers, what was missing, and what else is to be known."""

    number: int
    name: str
    status: Status
    sentence: str
    evidence: dict[str, float] = field(default_factory=dict)
    claims: tuple[Judged, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Point:
    """One accuracy on a curve, with its 95 % interval."""

    at: float
    accuracy: float
    interval: Interval


@final
@dataclass(frozen=True)
class Curve:
    """Accuracy against ``axis``: ``eps``, ``draws`` or ``steps``; ``n`` images."""

    axis: Literal["eps", "draws", "steps"]
    n: int
    points: tuple[Point, ...]


@final
@dataclass(frozen=True)
class Measurement:
    """One attack and its scores on the first ``n`` images: raw bits (scorings, n), and what the attack cost.

    ``by_itself``: whether the attack and its parameters say all, so that it can be run by itself: not so for images of
    another network, for chosen classes, or for the best of several attacks.
    """

    name: str
    attack: str
    parameters: dict[str, Any]
    n: int
    accuracy: float
    interval: Interval
    correct: PackedBits
    forward_passes: float
    backward_passes: float
    seconds: float
    by_itself: bool = False


@final
@dataclass(frozen=True)
class Diagnosis(records.Saved):
    """The checks of one model, and what they come to.

    Attributes:
        verdict: of a claim, ``refuted`` (an attack left less), ``not refuted`` (none did, and all checks that apply
            passed) or ``not shown`` (else). Without a claim, ``trusted`` (all checks that apply passed), ``not
            trusted`` (one failed) or ``not shown``.
        summary: the verdict in plain words, the first line in one sentence.
        findings: what was odd about the model before any check was run.
        lowest: name of the measurement with the lowest accuracy at ``eps``, by draws that did not choose it.
        claim: what was claimed, with what it did not say filled in.
        trial: the claim against what the attacks left.
    """

    __repr__ = brief

    FORMAT: ClassVar[str] = "learn2perturb.diagnosis"
    VERSION: ClassVar[int] = 2  # 1: intervals and standard errors over images only, by bootstrap

    verdict: Verdict
    summary: str
    checks: tuple[Check, ...]
    curves: tuple[Curve, ...]
    measurements: tuple[Measurement, ...]
    findings: tuple[str, ...]
    lowest: str
    labels: PackedIntegers
    num_classes: int
    stochastic: bool
    eps: float
    norm: str
    seed: int
    budget: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    claim: Claim | None = None
    trial: Trial | None = None

    def check(self, number: int) -> Check:
        """Return check ``number``; older records lack those that came later.

        Raises:
            UnknownNameError: there is no such check.
        """
        for one in self.checks:
            if one.number == number:
                return one
        raise UnknownNameError.of("check", number, map(str, CHECKS))

    def measurement(self, name: str) -> Measurement:
        """Return the measurement called ``name``.

        Raises:
            UnknownNameError: there is none of that name.
        """
        for one in self.measurements:
            if one.name == name:
                return one
        raise UnknownNameError.of("measurement", name, {one.name for one in self.measurements})

    def scores(self, one: Measurement) -> Scores:
        """Return which images were right in each scoring of a measurement, and which of them shared a pass."""
        batch_size = self.metadata.get("batch_size")
        passes = passes_of(one.n, batch_size) if isinstance(batch_size, int) and batch_size > 0 else ()
        return Scores(one.correct.unpack(), passes, self.stochastic)

    def _checked(self) -> Diagnosis:
        """Check that all follows from the data it is of; return it with the intervals that the bits give now."""
        from learn2perturb.diagnosis.consistency import check_consistency

        check_consistency(self)
        if self.trial is not None:  # it stands on the intervals that are recorded
            return self
        measurements = tuple(replace(one, interval=accuracy_interval(self.scores(one))) for one in self.measurements)
        return replace(self, measurements=measurements)

    @classmethod
    def upgraded(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """Return the fields of a record of an earlier version as this one has them."""
        if version > 1:
            return fields
        # Version 1 said of a claim that was never stated whether it stands.
        verdict = fields.get("verdict")
        verdict = _FIRST.get(verdict, verdict) if isinstance(verdict, str) else verdict
        summary = fields.get("summary")
        for said, now in _FIRST_WORDS.items():
            summary = summary.replace(said, now, 1) if isinstance(summary, str) else summary
        return fields | {"verdict": verdict, "summary": summary}

    def __str__(self) -> str:
        from learn2perturb.diagnosis.layout import laid_out

        return laid_out(self)
