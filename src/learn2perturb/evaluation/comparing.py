"""Two evaluations of the same images: the paired difference, its interval, and whether it is more than chance."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import numpy as np

from learn2perturb import records
from learn2perturb.brief import brief
from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation.intervals import Estimate, Interval, Scores, paired_difference
from learn2perturb.evaluation.result import Evaluation, Row
from learn2perturb.evaluation.significance import equals, holm, mcnemar
from learn2perturb.plugins import changed

# What the record of a comparison keeps of the metadata of both: its name here -> its name there.
_KEPT = {"steps": "step", "weights": "weights"}
_TESTS = {"mcnemar": "McNemar", "t": "t-test"}
# Settings that change nothing where two passes over an image are the same.
_EOT = ("eot", "eot_average", "eot_draws")
# Settings that older records do not hold, with what they were.
_BEFORE = {"eot_draws": "fresh"}


@final
@dataclass(frozen=True)
class Difference:
    """Accuracy of the first less that of the second, paired over ``n`` images.

    Attributes:
        first, second: the rows compared.
        first_accuracy, second_accuracy: means over scorings.
        difference: first less second.
        standard_error: of the difference, over images and draws.
        interval: of the difference, over images and draws.
        mcnemar: exact p-value, two-sided, from one scoring of each (the first): of these draws only.
        mcnemar_holm: the same, corrected for the number of rows compared.
        n: images.
        test: what decides: McNemar's of networks without noise, Student's over images and draws of others.
        p_value: two-sided, by ``test``; ``p_holm`` the same, corrected.
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
    test: Literal["mcnemar", "t"] = "mcnemar"
    p_value: float | None = None
    p_holm: float | None = None

    @property
    def decided(self) -> float:
        """The corrected p-value that decides; in records of before McNemar's."""
        return self.mcnemar_holm if self.p_holm is None else self.p_holm

    @property
    def sentence(self) -> str:
        """What may be said."""
        points = (
            f"{100 * self.difference:+.2f} points [{100 * self.interval.low:+.2f}, {100 * self.interval.high:+.2f}]"
        )
        tested = self.decided < 1 - self.interval.confidence
        if tested and self.interval.low > 0:
            return f"the first is better: {points}"
        if tested and self.interval.high < 0:
            return f"the second is better: {points}"
        return f"neither is shown to be better: {points}"


@final
@dataclass(frozen=True)
class Comparison(records.Saved):
    """Differences of two evaluations, row by row; ``left_out`` has no partner, ``notes`` say what is not known."""

    __repr__ = brief

    FORMAT: ClassVar[str] = "learn2perturb.comparison"
    VERSION: ClassVar[int] = 2  # 1: intervals over images only, McNemar's test of any network

    first: str
    second: str
    differences: tuple[Difference, ...]
    confidence: float
    metadata: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        steps = self.metadata.get("steps", [None, None])
        told = ["" if step is None else f", step {step}" for step in steps]
        lines = [f"first:  {self.first}{told[0]}", f"second: {self.second}{told[1]}", ""]
        for one in self.differences:
            rows = one.first if one.first == one.second else f"{one.first} against {one.second}"
            lines += [
                f"{rows}: {100 * one.first_accuracy:.2f} % and {100 * one.second_accuracy:.2f} % of {one.n} images",
                f"  {one.sentence}, {_TESTS[one.test]} p = {one.decided:.2g}",
            ]
        if self.left_out:
            lines += ["", "Left out, for want of a row with the same settings of the attack:"]
            lines += [f"  {row}" for row in self.left_out]
        lines += [f"note: {note}" for note in self.notes]
        lines += [
            "",
            f"Difference: first less second; {100 * self.confidence:g} % interval: paired, over images and draws.",
            "McNemar: exact, of networks without noise; t: over images and draws.",
            f"Both with Holm's correction for {len(self.differences)} rows.",
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
            rows that agree in all settings of the attack, noise and predictor; names do not count. EOT does not count
            on a network without noise, where it changes nothing.
        confidence: of the intervals.

    Raises:
        InputError: they are of different images.
        ConfigError: they have no row in common.
    """
    check_same_images(first, second)
    pairs = tuple(pairs)
    other_code = changed(first.metadata, second.metadata)
    rows = _rows(first, second, pairs, other_code)
    found = []
    for left, right in rows:
        one, other = first.scores(left), second.scores(right)
        random = left.stochastic or right.stochastic
        found.append((left, right, *tested(one, other, random=random, confidence=confidence)))
    corrected, corrected_exact = holm([p for *_, p in found]), holm([exact for _, _, _, exact, _ in found])
    differences = tuple(
        Difference(
            first=left.label,
            second=right.label,
            first_accuracy=left.accuracy,
            second_accuracy=right.accuracy,
            difference=estimate.mean,
            standard_error=estimate.standard_error,
            interval=estimate.interval,
            mcnemar=exact,
            mcnemar_holm=adjusted_exact,
            n=left.n,
            test="t" if left.stochastic or right.stochastic else "mcnemar",
            p_value=p,
            p_holm=adjusted,
        )
        for (left, right, estimate, exact, p), adjusted, adjusted_exact in zip(
            found, corrected, corrected_exact, strict=True
        )
    )
    names = [str(one.metadata.get("model", "a model")) for one in (first, second)]
    left_out = () if pairs else _left_out(first, second, rows, other_code)
    notes = (
        *_unidentified(first, second),
        *(f"{part} is of other code in the two" for part in other_code),
        *(note for left, right in rows for note in _unlike(left, right, other_code)),
    )
    metadata = {name: [one.metadata.get(key) for one in (first, second)] for name, key in _KEPT.items()}
    return Comparison(names[0], names[1], differences, confidence, metadata, left_out, notes)


def tested(first: Scores, second: Scores, *, random: bool, confidence: float) -> tuple[Estimate, float, float]:
    """Return the paired difference, McNemar's exact p-value of the first scorings, and the p-value that decides.

    ``random``: whether a fresh scoring of one of them may differ; then Student's test over images and draws decides.
    """
    estimate = paired_difference(first, second, confidence=confidence)
    exact = mcnemar(first.correct[0], second.correct[0])
    return estimate, exact, equals(estimate.mean, estimate.standard_error, estimate.freedom) if random else exact


def check_same_images(first: Evaluation, second: Evaluation) -> None:
    """Check that two evaluations are of the same images, in order.

    Raises:
        InputError: they are not.
    """
    one, other = first.labels.unpack(), second.labels.unpack()
    names = [str(evaluation.metadata.get("data")) for evaluation in (first, second)]
    fix = "; evaluate both on the same images (--dataset, --split, --limit)"
    if len(one) != len(other):
        raise InputError(f"the first is of {len(one)} images, the second of {len(other)}{fix}")
    if names[0] != names[1] or first.num_classes != second.num_classes:
        raise InputError(f"the first is of {names[0]}, {first.num_classes} classes, the second of {names[1]}, "
                         f"{second.num_classes} classes{fix}")  # fmt: skip
    if not np.array_equal(one, other):
        differing = int((one != other).sum())
        raise InputError(f"the labels of {differing} of {len(one)} images differ, so these are not the same{fix}")
    hashes = [evaluation.metadata.get("images") for evaluation in (first, second)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise InputError(f"the labels agree, but the images differ (hashes {hashes[0]} and {hashes[1]}){fix}")


def _rows(
    first: Evaluation, second: Evaluation, pairs: tuple[tuple[str, str], ...], other_code: Sequence[str]
) -> list[tuple[Row, Row]]:
    if pairs:
        return [(_only(first, left), _only(second, right)) for left, right in pairs]
    same = [row for row in first.rows if not _is_of(row, other_code)]
    found = [(row, other) for row in same if (other := _partner(row, second.rows)) is not None]
    if not found and len(same) < len(first.rows):
        raise ConfigError(
            f"no row in common: {', '.join(other_code)} is of other code in the two; evaluate both with the same"
        )
    if not found:
        shown = [", ".join(row.label for row in evaluation.rows) for evaluation in (first, second)]
        raise ConfigError(f"no row in common: {shown[0]} against {shown[1]}; name what to compare as pairs")
    return found


def _is_of(row: Row, parts: Sequence[str]) -> bool:
    """Tell whether the attack of a row is, or is made of, one of these parts."""
    return any(_names_attack(row, part) for part in parts)


def _names_attack(row: Row, part: str) -> bool:
    kind, _, name = part.partition(" ")
    if kind not in ("attack", "function"):
        return False
    attack = name.partition(".")[0]
    return row.attack_type == attack or re.search(rf"\b{re.escape(attack)}\b", repr(row.parameters)) is not None


def _partner(row: Row, others: Iterable[Row]) -> Row | None:
    """Return the row that was attacked with the same settings; of several, that of the same name."""
    alike = [other for other in others if _alike(row, other)]
    # EOT as in ``row`` comes first: a network without noise may have a row for each of several.
    alike.sort(key=lambda other: (_settings(other) != _settings(row), other.attack != row.attack))
    return alike[0] if alike else None


def _alike(one: Row, other: Row) -> bool:
    if (one.attack_type, one.noise, one.predictor) != (other.attack_type, other.noise, other.predictor):
        return False
    if one.attack_type is None and one.attack != other.attack:
        return False
    if one.stochastic and other.stochastic and one.members != other.members:
        return False
    free = () if one.stochastic and other.stochastic else _EOT
    return _differing(one, other, free) == []


def _differing(one: Row, other: Row, free: tuple[str, ...] = ()) -> list[str]:
    """Name the settings of the attack that differ, ``free`` ones aside."""
    left, right = _settings(one), _settings(other)
    return sorted(
        name
        for name in {*left, *right} - set(free)
        if (name in left) != (name in right) or not _equal(left[name], right[name])
    )


def _settings(row: Row) -> dict[str, Any]:
    return _BEFORE | row.parameters | {"eps": row.eps}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=0.0, abs_tol=1e-9)
    return bool(one == other)


def _left_out(
    first: Evaluation, second: Evaluation, rows: list[tuple[Row, Row]], other_code: Sequence[str]
) -> tuple[str, ...]:
    """Describe the rows that no pair holds, and, where one of the other record has its name, what differs."""
    found = []
    for which, (own, other) in enumerate(((first, second), (second, first))):
        paired = [id(pair[which]) for pair in rows]
        for row in own.rows:
            if id(row) in paired:
                continue
            twin = next((one for one in other.rows if (one.label, one.noise) == (row.label, row.noise)), None)
            usual = "its code" if _is_of(row, other_code) else "passes of the ensemble"
            why = f" (differs in {', '.join(_differing(row, twin) or [usual])})" if twin else ""
            found.append(f"{row.label} of the {('first', 'second')[which]}{why}")
    return tuple(found)


def _unlike(one: Row, other: Row, other_code: Sequence[str] = ()) -> Iterable[str]:
    """Say what differs in a pair that was named by hand."""
    free = () if one.stochastic and other.stochastic else _EOT
    names = _differing(one, other, free)
    if names or one.attack_type != other.attack_type:
        what = ", ".join(f"{name} {one.parameters.get(name)} and {other.parameters.get(name)}" for name in names)
        yield f"{one.label} and {other.label} are not the same attack: {what or 'another kind'}"
    elif _is_of(one, other_code):
        yield f"{one.label} and {other.label} are not the same attack: other code"


def _unidentified(first: Evaluation, second: Evaluation) -> Iterable[str]:
    for which, evaluation in (("first", first), ("second", second)):
        if evaluation.metadata.get("images") is None:
            yield f"the {which} record holds no hash of its images, so that they are the same is not known"
    weights = [evaluation.metadata.get("weights") for evaluation in (first, second)]
    if weights[0] is not None and weights[0] == weights[1]:
        yield f"both are of the same weights ({weights[0]})"


def _only(evaluation: Evaluation, attack: str) -> Row:
    """Return the row with the noise as it is; a pair names no size, so there must be one."""
    return evaluation.row(attack, noise=any(row.noise for row in evaluation.rows if row.attack == attack))
