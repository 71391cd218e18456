"""What a diagnosis found: ten checks with their evidence, curves, and a verdict in plain words. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from learn2perturb import records
from learn2perturb.errors import UnknownNameError
from learn2perturb.evaluation.intervals import Interval
from learn2perturb.evaluation.result import format_eps
from learn2perturb.records import PackedBits, PackedIntegers

Status = Literal["passed", "failed", "not shown", "does not apply"]
Verdict = Literal["stands", "does not stand", "not shown"]

CHECKS = {
    1: "iterative beats one-step",
    2: "white-box beats black-box",
    3: "an unbounded attack succeeds",
    4: "random search finds nothing new",
    5: "more distortion, more success",
    6: "noise off holds too",
    7: "the attack has converged",
    8: "no loss or restart matters much",
    9: "the draws are real",
    10: "the gradient is the function's",
}
NO_PROOF = "Passing is no proof: a stochastic counter-example is known (Popovic et al. 2022)."


@dataclass(frozen=True)
class Claim:
    """One statistical statement: a difference of accuracies is no more than ``allowed``.

    Attributes:
        text: what is claimed.
        difference: paired over ``n`` images.
        allowed: the threshold.
        standard_error: of the difference, bootstrap over images.
        p_value: one-sided, of the claim.
        adjusted: the same after Holm's correction over all claims of the diagnosis.
        holds: whether the claim was not refuted.
    """

    text: str
    difference: float
    allowed: float
    standard_error: float
    n: int
    p_value: float
    adjusted: float
    holds: bool


@dataclass(frozen=True)
class Check:
    """One of the checks: its verdict, a sentence, the numbers, what was missing, and what else is to be known."""

    number: int
    name: str
    status: Status
    sentence: str
    evidence: dict[str, float] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """One accuracy on a curve, with its 95 % interval over images."""

    at: float
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Curve:
    """Accuracy against ``axis``: ``eps``, ``draws`` or ``steps``; ``n`` images."""

    axis: Literal["eps", "draws", "steps"]
    n: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Measurement:
    """One attack and its scores on the first ``n`` images: raw bits (scorings, n), and what the attack cost."""

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


@dataclass(frozen=True)
class Diagnosis(records.Saved):
    """The checks of one model, and what they come to.

    Attributes:
        verdict: ``stands`` (all checks that apply passed), ``does not stand`` (one failed), ``not shown`` (else).
        summary: the verdict in plain words.
        findings: what was odd about the model before any check was run.
        lowest: name of the measurement with the lowest accuracy at ``eps`` on all images.
    """

    FORMAT: ClassVar[str] = "learn2perturb.diagnosis"
    VERSION: ClassVar[int] = 1

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

    def check(self, number: int) -> Check:
        """Return check ``number``, 1 to 10 (to 9 in records from before there was the last).

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

    def _check(self) -> None:
        """Check that accuracies, claims, statuses and the verdict follow from the data they are of."""
        from learn2perturb.evaluation.diagnostics.consistency import check_consistency

        check_consistency(self)

    def __str__(self) -> str:
        eps = f"{self.norm} {format_eps(self.eps)}"
        clean = self.measurement("clean")
        what = f"{self.metadata.get('model', 'model')}: {clean.n} images, {eps}, budget {self.budget.get('name')}"
        lines = [f"{what}, clean {100 * clean.accuracy:.1f} %", ""]
        lines += [f"warning: {finding}" for finding in self.findings]
        for one in self.checks:
            lines.append(f"{one.number}. {one.name}: {one.status.upper()}")
            lines.append(f"   {one.sentence}")
            lines += [f"   missing: {item}" for item in one.missing]
            lines += [f"   note: {item}" for item in one.notes]
        lines += ["", self.summary]
        return "\n".join(lines)
