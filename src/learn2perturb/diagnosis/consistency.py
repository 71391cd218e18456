"""Is a diagnosis what its own data say? What follows from bits and statements is computed anew and compared."""

from __future__ import annotations

import math

from learn2perturb.diagnosis.checks import CHECKS
from learn2perturb.diagnosis.record import Check, Diagnosis, Judged, Measurement
from learn2perturb.diagnosis.trial import p_value
from learn2perturb.diagnosis.verdict import conclude
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation.intervals import follows
from learn2perturb.evaluation.significance import TWO_SIGMA, exceeds, holm

_ROUNDING = 1e-9  # of an accuracy
_FIX = "restore the file or diagnose again"


def check_consistency(found: Diagnosis) -> None:
    """Check the accuracies against the bits, the statements and statuses against the differences, and the verdict.

    Raises:
        CheckpointError: they contradict each other.
    """
    labels = found.labels.unpack()
    if labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() >= found.num_classes:
        raise CheckpointError(f"the labels are none of {found.num_classes} classes; {_FIX}")
    for one in found.measurements:
        _check_measurement(one, len(labels), found)
    numbers = [check.number for check in found.checks]
    ours = [number for number in numbers if number in CHECKS]  # others are checks that were registered elsewhere
    if ours != list(CHECKS)[: len(ours)] or numbers != sorted({*numbers}):
        raise CheckpointError(f"the checks are {', '.join(str(check.number) for check in found.checks)}; {_FIX}")
    _check_statements(found)
    for check in found.checks:
        _check_status(check)
    _check_curves(found)
    accuracy = found.measurement(found.lowest).accuracy
    _check_trial(found)
    verdict, _ = conclude(
        found.checks, lowest=found.lowest, accuracy=accuracy, n=len(labels), eps="", claim=found.claim,
        trial=found.trial, measured={one.name: one for one in found.measurements},
    )  # fmt: skip
    if verdict != found.verdict:
        raise CheckpointError(f"the verdict is {found.verdict!r}, and its checks give {verdict!r}; {_FIX}")


def _check_measurement(one: Measurement, images: int, found: Diagnosis) -> None:
    correct = one.correct.unpack()
    if correct.ndim != 2 or correct.shape[1] != one.n or not 0 < one.n <= images or not len(correct):
        raise CheckpointError(f"measurement {one.name!r} is of {one.n} images, and its bits are of others; {_FIX}")
    true = float(correct.mean())
    if not _close(one.accuracy, true):
        raise CheckpointError(
            f"measurement {one.name!r} has accuracy {one.accuracy:.6g}, but its bits give {true:.6g}; {_FIX}"
        )
    if not follows(one.interval, found.scores(one), seed=found.seed):
        raise CheckpointError(f"the interval of measurement {one.name!r} is not that of its bits; {_FIX}")


def _check_statements(found: Diagnosis) -> None:
    statements = [one for check in found.checks for one in check.claims]
    for one in statements:
        if not any(_close(one.p_value, p) for p in _p_values(one)):
            raise CheckpointError(f"the p-value of the statement {one.text!r} is not that of its difference; {_FIX}")
    for one, adjusted in zip(statements, holm([one.p_value for one in statements]), strict=True):
        if not _close(one.adjusted, adjusted) or one.holds != (one.adjusted > TWO_SIGMA):
            raise CheckpointError(f"the statement {one.text!r} is not judged as its p-value says; {_FIX}")


def _p_values(one: Judged) -> tuple[float, float]:
    """Return the p-values of a statement on the difference and on its size: the record does not say which it is."""
    size = exceeds(abs(one.difference), one.allowed, one.standard_error, one.freedom)
    return exceeds(one.difference, one.allowed, one.standard_error, one.freedom), min(1.0, 2 * size)


def _check_status(check: Check) -> None:
    """Check what the statements decide; what else fails a check is in its sentence only."""
    if any(not one.holds for one in check.claims) and check.status != "failed":
        raise CheckpointError(f"check {check.number} {check.status!r}, though a statement of it does not hold; {_FIX}")


def _check_trial(found: Diagnosis) -> None:
    """Check the trial of the claim against the measurements that it is of."""
    claim, trial = found.claim, found.trial
    if claim is None or trial is None:
        if claim is not None or trial is not None:
            raise CheckpointError(f"there is a claim without its trial, or a trial without its claim; {_FIX}")
        return
    if (claim.norm, claim.eps) != (found.norm, found.eps):
        raise CheckpointError(f"the claim is of another ball than the diagnosis; {_FIX}")
    if trial.found not in trial.p_values or len(trial.tried) < len(trial.p_values):
        raise CheckpointError(f"the trial of the claim lacks {trial.found!r}; {_FIX}")
    for name, value in trial.p_values.items():
        if not _close(value, p_value(found.measurement(name), claim.accuracy)):
            raise CheckpointError(f"the p-value of {name!r} is not that of its accuracy and the claim; {_FIX}")


def _check_curves(found: Diagnosis) -> None:
    for curve in found.curves:
        for point in curve.points:
            if not point.interval.low - _ROUNDING <= point.accuracy <= point.interval.high + _ROUNDING:
                raise CheckpointError(f"a point of the curve over {curve.axis} lies outside of its interval; {_FIX}")


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=_ROUNDING)
