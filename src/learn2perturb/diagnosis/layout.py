"""A diagnosis as text: the verdict, one table of the checks, the evidence, and how to repeat or settle it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from learn2perturb.diagnosis.advice import described, repeated, settled
from learn2perturb.diagnosis.checks import CHECKS
from learn2perturb.diagnosis.verdict import percent
from learn2perturb.evaluation.result import format_eps
from learn2perturb.tables import aligned

if TYPE_CHECKING:
    from learn2perturb.diagnosis.record import Check, Diagnosis

_HEAD = ("", "check", "status", "key figure")


def laid_out(found: Diagnosis) -> str:
    """Return the diagnosis as it is printed."""
    head, *rest = found.summary.splitlines()
    clean = found.measurement("clean")
    what = f"{found.metadata.get('model', 'model')}: {clean.n} images, {found.norm} {format_eps(found.eps)}"
    lines = [
        head,
        "",
        *aligned([_HEAD, *([str(one.number), one.name, one.status, key_figure(one)] for one in found.checks)]),
    ]
    lines += ["", f"{what}, budget {found.budget.get('name')}, clean {percent(clean.accuracy)}"]
    lines += [f"warning: {finding}" for finding in found.findings]
    for one in found.checks:
        lines.append(f"{one.number}. {one.sentence}")
        lines += [f"   missing: {item}" for item in one.missing]
        lines += [f"   note: {item}" for item in one.notes]
    lines += ["", *rest, *advice(found)]
    return "\n".join(lines).rstrip()


def advice(found: Diagnosis) -> list[str]:
    """Return how to repeat what refuted a claim, or to settle what is not shown."""
    if found.verdict == "refuted" and found.trial is not None:
        measured = found.measurement(found.trial.found)
        return [
            f"Found by {measured.name}: {described(measured)}.",
            *(f"To repeat it: {text}" for text in repeated(found)),
        ]
    if found.verdict in ("not shown", "not trusted"):
        return [f"To settle it: {text}" for text in settled(found)]
    return []


def key_figure(check: Check) -> str:
    """Return the figures of a check that tell most, as they fit into a cell of a table."""
    evidence, key = check.evidence, CHECKS[check.number].key if check.number in CHECKS else ()
    if isinstance(key, str):
        try:
            return key.format_map(evidence)
        except KeyError:  # a check that found nothing to measure
            return ""
    named = list(evidence)
    places = [one if isinstance(one, str) else named[one] for one in key if isinstance(one, str) or len(named) >= -one]
    return ", ".join(_shares(evidence, places))


def _shares(evidence: Mapping[str, float], names: Sequence[str]) -> list[str]:
    rest = {name: value for name, value in evidence.items() if name not in names}
    chosen = [min(rest, key=lambda key: rest[key]) if name == "*" and rest else name for name in names]
    return [f"{name} {percent(evidence[name])}" for name in chosen if name in evidence]
