"""From comparisons to verdicts: standard errors, Holm's correction over all claims, and plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from learn2perturb.evaluation.diagnostics.record import CHECKS, NO_PROOF, Check, Claim, Status, Verdict
from learn2perturb.evaluation.intervals import paired_bootstrap
from learn2perturb.evaluation.significance import TWO_SIGMA, beyond, exceeds, holm

# Below this, two standard errors are more than 10 points, and nearly everything passes.
FEWEST_IMAGES = 100


@dataclass(frozen=True)
class Draft:
    """A check before its claims are judged.

    Attributes:
        number: of the check.
        good: what to say if nothing is wrong.
        claims: statistical ones, judged together with those of all other checks.
        wrong: what is wrong beyond statistics; one is enough to fail.
        missing: what could not be run; named, no failure.
        not_shown: why the check as a whole was not shown, or nothing.
        does_not_apply: why it does not apply to this model, or nothing.
        notes: what is no fault, with its consequence.
        evidence: name -> number.
    """

    number: int
    good: str = ""
    claims: tuple[Statement, ...] = ()
    wrong: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    not_shown: str = ""
    does_not_apply: str = ""
    notes: tuple[str, ...] = ()
    evidence: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Statement:
    """``mean(first - second) <= allowed``, paired over images.

    ``absolute`` compares the size of the difference. Two standard errors are allowed on top; where ``strict`` is set,
    a difference that is only within them is not shown rather than passed.
    """

    text: str
    broken: str
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    allowed: float = 0.0
    absolute: bool = False
    strict: bool = False


def judge(drafts: Sequence[Draft], seed: int) -> tuple[Check, ...]:
    """Return the checks, each claim judged at two standard errors after Holm's correction over all of them."""
    statements = [statement for draft in drafts for statement in draft.claims]
    estimates = [paired_bootstrap(one.first, one.second, seed=seed) for one in statements]
    p_values = []
    for one, estimate in zip(statements, estimates, strict=True):
        if one.absolute:
            p_values.append(min(1.0, 2 * exceeds(abs(estimate.mean), one.allowed, estimate.standard_error)))
        else:
            p_values.append(exceeds(estimate.mean, one.allowed, estimate.standard_error))
    judged = [
        Claim(
            text=one.text,
            difference=estimate.mean,
            allowed=one.allowed,
            standard_error=estimate.standard_error,
            n=len(one.first),
            p_value=p,
            adjusted=adjusted,
            holds=adjusted > TWO_SIGMA,
        )
        for one, estimate, p, adjusted in zip(statements, estimates, p_values, holm(p_values), strict=True)
    ]
    remaining = iter(judged)
    return tuple(_check(draft, tuple(next(remaining) for _ in draft.claims)) for draft in drafts)


def _check(draft: Draft, claims: tuple[Claim, ...]) -> Check:
    told = [
        f"{statement.broken} ({points(claim.difference)} +- {100 * claim.standard_error:.1f} points, allowed "
        f"{100 * claim.allowed:g})"
        for statement, claim in zip(draft.claims, claims, strict=True)
    ]
    wrong = [*draft.wrong, *(text for text, claim in zip(told, claims, strict=True) if not claim.holds)]
    doubtful = [
        f"{text}, or so it seems: on {claim.n} images it may be chance"
        for text, statement, claim in zip(told, draft.claims, claims, strict=True)
        if statement.strict and claim.holds and beyond(claim.difference, claim.allowed)
    ]
    status: Status
    if wrong:
        status, sentence = "failed", "; ".join(wrong)
    elif draft.does_not_apply:
        status, sentence = "does not apply", draft.does_not_apply
    elif draft.not_shown or doubtful:
        status, sentence = "not shown", "; ".join([*([draft.not_shown] if draft.not_shown else []), *doubtful])
    else:
        status, sentence = "passed", draft.good
    text = sentence[:1].upper() + sentence[1:].rstrip(".") + "."
    return Check(draft.number, CHECKS[draft.number], status, text, draft.evidence, claims, draft.missing, draft.notes)


def conclude(checks: Sequence[Check], *, lowest: str, accuracy: float, n: int, eps: str) -> tuple[Verdict, str]:
    """Return the overall verdict, and the same in plain words."""
    failed = [check for check in checks if check.status == "failed"]
    unseen = [check for check in checks if check.status == "not shown"]
    most = max((claim.standard_error for check in checks for claim in check.claims), default=0.0)
    resolution = (
        f"{n} images: differences below about {200 * most:.0f} points cannot be seen everywhere." if most > 0 else ""
    )
    figure = f"The lowest accuracy that any attack here reached at {eps} is {percent(accuracy)} ({lowest})."
    if failed:
        names = ", ".join(f"{check.number} ({check.name})" for check in failed)
        verdict: Verdict = "does not stand"
        text = f"THE CLAIM DOES NOT STAND as it is: check {names} failed. {figure} Robustness beyond that is not shown"
        text += "." if not unseen else f", nor were checks {_numbers(unseen)}."
    elif n < FEWEST_IMAGES:
        verdict = "not shown"
        text = f"NOT SHOWN: {n} images are too few to pass anything (at least {FEWEST_IMAGES}); none failed. {figure}"
    elif unseen:
        verdict = "not shown"
        text = (
            f"NOT SHOWN: nothing that was run speaks against the claim, but checks {_numbers(unseen)} were not shown."
        )
        text += f" {figure}"
    else:
        verdict = "stands"
        text = f"THE CLAIM STANDS: every check that applies passed. {figure} {NO_PROOF}"
    return verdict, f"{text} {resolution}".strip()


def _numbers(checks: Sequence[Check]) -> str:
    return ", ".join(str(check.number) for check in checks)


def percent(value: float) -> str:
    """``41.3 %``."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """``+2.3``, a difference of accuracies in percentage points."""
    return f"{100 * value:+.1f}"
