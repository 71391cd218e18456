"""From comparisons to verdicts: standard errors, Holm's correction over all statements, and plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from learn2perturb.diagnosis.checks import ATTACK, CHECKS, FAILURES
from learn2perturb.diagnosis.claim import ANY, Claim
from learn2perturb.diagnosis.record import NO_PROOF, Check, Judged, Measurement, Status, Verdict
from learn2perturb.diagnosis.trial import Trial
from learn2perturb.evaluation.intervals import Scores, paired_difference
from learn2perturb.evaluation.significance import TWO_SIGMA, beyond, exceeds, holm, least_seen

# Below this, two standard errors are more than 10 points, and nearly everything passes.
FEWEST_IMAGES = 100


@final
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


@final
@dataclass(frozen=True, eq=False)
class Statement:
    """``mean(first - second) <= allowed``, paired over images; ``second`` may be a number.

    ``absolute`` compares the size of the difference. Two standard errors are allowed on top; where ``strict`` is set,
    a difference that is only within them is not shown rather than passed.
    """

    text: str
    broken: str
    first: Scores
    second: Scores | float
    allowed: float = 0.0
    absolute: bool = False
    strict: bool = False


def judge(drafts: Sequence[Draft]) -> tuple[Check, ...]:
    """Return the checks, each claim judged at two standard errors after Holm's correction over all of them."""
    statements = [statement for draft in drafts for statement in draft.claims]
    estimates = [paired_difference(one.first, one.second) for one in statements]
    p_values = []
    for one, estimate in zip(statements, estimates, strict=True):
        if one.absolute:
            size = exceeds(abs(estimate.mean), one.allowed, estimate.standard_error, estimate.freedom)
            p_values.append(min(1.0, 2 * size))
        else:
            p_values.append(exceeds(estimate.mean, one.allowed, estimate.standard_error, estimate.freedom))
    judged = [
        Judged(
            text=one.text,
            difference=estimate.mean,
            allowed=one.allowed,
            standard_error=estimate.standard_error,
            n=one.first.n,
            p_value=p,
            adjusted=adjusted,
            holds=adjusted > TWO_SIGMA,
            freedom=estimate.freedom,
        )
        for one, estimate, p, adjusted in zip(statements, estimates, p_values, holm(p_values), strict=True)
    ]
    remaining = iter(judged)
    return tuple(_check(draft, tuple(next(remaining) for _ in draft.claims)) for draft in drafts)


def _check(draft: Draft, claims: tuple[Judged, ...]) -> Check:
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
    name = CHECKS[draft.number].name
    return Check(draft.number, name, status, text, draft.evidence, claims, draft.missing, draft.notes)


def conclude(
    checks: Sequence[Check],
    *,
    lowest: str,
    accuracy: float,
    n: int,
    eps: str,
    claim: Claim | None = None,
    trial: Trial | None = None,
    measured: Mapping[str, Measurement] | None = None,
) -> tuple[Verdict, str]:
    """Return the overall verdict, and the same in plain words: the first line in short, then what else is to be known.

    Args:
        checks: all of them.
        lowest: what reached the lowest accuracy.
        accuracy: that accuracy.
        n: images.
        eps: the ball, as it is to be written.
        claim: what is claimed, if anything is.
        trial: of the claim.
        measured: measurements by name, for the figures of the claim.
    """
    failed = [check for check in checks if check.status == "failed"]
    unseen = [check for check in checks if check.status == "not shown"]
    known = measured or {}
    low = figure(known[lowest]) if lowest in known else f"{percent(accuracy)} ({lowest})"
    at = f"The lowest accuracy that any attack here reached at {eps} is {low}."
    if claim is None or trial is None:
        verdict, head = _of_gradients(checks, failed, unseen, n)
        lines = [f"{head} {at}", *_seen(checks, n), *([NO_PROOF] if verdict == "trusted" else [])]
        return verdict, "\n".join(lines)
    found = known[trial.found]
    chance = f"p = {trial.adjusted:.2g} after Holm's correction over {len(trial.tried)} attacks"
    _, of_gradients = _of_gradients(checks, failed, unseen, n)
    if trial.refuted:
        head = f"REFUTED: claimed {claim}; found {figure(found)}."
        return "refuted", "\n".join([head, f"Less than claimed: {chance}.", *_by_itself(claim, known), of_gradients])
    power = (
        f"Power: on {found.n} images an attack that leaves {100 * trial.drop:.1f} points less than claimed is seen in "
        f"80 % of cases ({len(trial.tried)} attacks, corrected)."
        if trial.drop < claim.accuracy
        else f"Power: on {found.n} images no attack is sure to be seen, whatever it leaves; use more images."
    )
    below = [f"The lowest is less than claimed, but it may be chance: {chance}."] if accuracy < claim.accuracy else []
    tried = f"Tried: {', '.join(trial.tried)}."
    rest = [*_by_itself(claim, known), *below, tried, power]
    if failed or unseen or n < FEWEST_IMAGES:
        head = f"NOT SHOWN: claimed {claim}; no attack refutes it, but {_why(failed, unseen, n)}."
        return "not shown", "\n".join([head, at, *rest])
    return "not refuted", "\n".join([f"NOT REFUTED: claimed {claim}. {at}", *rest, NO_PROOF])


def _of_gradients(
    checks: Sequence[Check], failed: Sequence[Check], unseen: Sequence[Check], n: int
) -> tuple[Verdict, str]:
    """Return of what use the gradients and the attacks by them are."""
    none = any(check.number == 10 and check.status == "does not apply" for check in checks)
    what = "NO GRADIENTS, so attacks from values decide" if none else "GRADIENTS CAN BE TRUSTED"
    if failed:
        said = {CHECKS[check.number].failing if check.number in CHECKS else ATTACK for check in failed}
        wrong = next(text for text in FAILURES if text in said)
        more = f" Checks {_numbers(unseen)} were not shown." if unseen else ""
        return "not trusted", f"{wrong}: check {_named(failed)} failed.{more}"
    if n < FEWEST_IMAGES:
        few = f"{n} images are too few to pass anything (at least {FEWEST_IMAGES}); none failed."
        return "not shown", f"NOT SHOWN whether attacks can be trusted here: {few}"
    if unseen:
        why = f"nothing that was run speaks against them, but checks {_numbers(unseen)} were not shown."
        return "not shown", f"NOT SHOWN whether attacks can be trusted here: {why}"
    return "trusted", f"{what}: every check that applies passed."


def _why(failed: Sequence[Check], unseen: Sequence[Check], n: int) -> str:
    """Say why a claim that no attack refutes is not shown."""
    reasons = [f"check {_named(failed)} failed"] if failed else []
    reasons += [f"check {_named(unseen)} was not shown"] if unseen else []
    reasons += [f"{n} images are too few (at least {FEWEST_IMAGES})"] if n < FEWEST_IMAGES else []
    return ", and ".join(reasons)


def _by_itself(claim: Claim, measured: Mapping[str, Measurement]) -> list[str]:
    """Say what the attack that the claim names leaves."""
    if claim.attack == ANY:
        return []
    afresh = f", {claim.predicted if claim.ensemble else 'fresh draws'}"
    names = [f"{claim.attack}{afresh}", claim.attack, f"reported{afresh}", "reported"]
    own = next((measured[name] for name in names if name in measured), None)
    return [] if own is None else [f"{claim.attack} itself leaves {figure(own)}."]


def _seen(checks: Sequence[Check], n: int) -> list[str]:
    most = max((least_seen(one.standard_error, one.freedom) for check in checks for one in check.claims), default=0.0)
    if most <= 0:
        return []
    return [f"{n} images: differences below about {100 * most:.0f} points cannot be seen everywhere."]


def _named(checks: Sequence[Check]) -> str:
    return ", ".join(f"{check.number} ({check.name})" for check in checks)


def figure(measured: Measurement) -> str:
    """``41.3 % [34.6, 48.2] of 200 images (loss margin)``."""
    interval = f"[{100 * measured.interval.low:.1f}, {100 * measured.interval.high:.1f}]"
    return f"{percent(measured.accuracy)} {interval} of {measured.n} images ({measured.name})"


def _numbers(checks: Sequence[Check]) -> str:
    return ", ".join(str(check.number) for check in checks)


def percent(value: float) -> str:
    """``41.3 %``."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """``+2.3``, a difference of accuracies in percentage points."""
    return f"{100 * value:+.1f}"
