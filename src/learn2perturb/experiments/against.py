"""Numbers of a view against a baseline's, and against the paper's, with the known reasons. Knows no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from learn2perturb.errors import InputError
from learn2perturb.evaluation import Evaluation
from learn2perturb.evaluation.comparing import check_same_images, tested
from learn2perturb.evaluation.significance import equals, holm
from learn2perturb.experiments.facts import Facts, Published
from learn2perturb.experiments.grid import Grid, Place
from learn2perturb.experiments.levels import level_notes
from learn2perturb.experiments.measures import row_of
from learn2perturb.experiments.results import Results
from learn2perturb.experiments.seeds import CONFIDENCE, over_images, over_seeds
from learn2perturb.experiments.spec import Pair, Study, ViewPlan, matches
from learn2perturb.experiments.view import PaperCheck, Statement, ViewCell, ViewDifference


def differences(plan: ViewPlan, layout: Grid, results: Results, notes: list[str]) -> list[ViewDifference]:
    """Return the paired differences to the baseline, with Holm's correction; what has no pair is told in ``notes``."""
    found = [
        one for place, pairs in layout.places.items()
        if (one := _difference(place, pairs, plan, layout, results, notes)) is not None
    ]  # fmt: skip
    corrected = holm([one.p_value for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, corrected, strict=True)]


def _difference(
    place: Place, pairs: Sequence[Pair], plan: ViewPlan, layout: Grid, results: Results, notes: list[str]
) -> ViewDifference | None:
    names, estimates, decided = [], [], []
    for pair in pairs:
        other = layout.partners.get(pair.key)
        if plan.baseline and other is None and not matches(pair.run, plan.baseline):
            notes.append(f"Not compared, for want of a baseline of its data, seed and cell: {pair.run.kind}.")
        own, base = results.record(pair), None if other is None else results.record(other)
        if other is None or not isinstance(own, Evaluation) or not isinstance(base, Evaluation):
            continue
        try:
            check_same_images(own, base)
        except InputError as error:
            notes.append(f"{pair.title} is not compared with {other.run.title}: {error}")
            continue
        rows = row_of(own, pair, plan.noise), row_of(base, other, plan.noise)
        random = any(row.stochastic for row in rows)
        scores = own.scores(rows[0]), base.scores(rows[1])
        estimate, _, p = tested(*scores, random=random, confidence=CONFIDENCE)
        names.append(other.run.kind)
        estimates.append(estimate)
        decided.append(p)
    interval = over_images([one.interval for one in estimates])
    if interval is None:
        return None
    if len(estimates) > 1:  # as for the interval: the error of a mean is at most the mean of the errors
        spread = statistics.fmean(one.standard_error for one in estimates)
        mean = statistics.fmean(one.mean for one in estimates)
        decided = [equals(mean, spread, min(one.freedom for one in estimates))]
    means = [one.mean for one in estimates]
    return ViewDifference(
        place.row, place.column, place.x, names[0], statistics.fmean(means), interval, len(means), over_seeds(means),
        decided[0],
    )  # fmt: skip


def checks(study: Study, cells: Sequence[ViewCell], layout: Grid) -> Iterator[PaperCheck]:
    """Give each number beside the paper's, and the known reasons where they differ."""
    shorter = [f"level {study.level} is not the paper's training (the note on the level)"] if level_notes(study) else []
    for cell in cells:
        if cell.paper is None or cell.value is None or cell.interval is None:
            continue
        difference = cell.value - cell.paper.mean
        allowed = _half(cell, upper=difference < 0) + (cell.paper.std or 0.0)
        verdict: Literal["agrees", "differs", "suspect"] = "agrees" if abs(difference) <= allowed else "differs"
        if cell.paper.suspect is not None:
            verdict = "suspect"
        pair = layout.places[Place(cell.row, cell.column, cell.x)][0]
        why = (*shorter, *_reasons(study, pair)) if verdict == "differs" else ()
        yield PaperCheck(cell.row, cell.column, cell.x, cell.value, cell.paper, difference, allowed, verdict, why)


def _half(cell: ViewCell, *, upper: bool) -> float:
    """Return how far our interval reaches to one side: over images and draws, and over seeds, which are independent."""
    found = [bounds for bounds in (cell.interval, cell.over_seeds) if bounds is not None]
    value = cell.value or 0.0
    return math.hypot(*(bounds.high - value if upper else value - bounds.low for bounds in found))


def _reasons(study: Study, pair: Pair) -> Iterator[str]:
    for reason in study.reasons:
        if matches(pair, reason.get("where") or {}):
            yield str(reason["why"])


def statements(facts: Facts | None, layout: Grid, cells: Sequence[ViewCell]) -> Iterator[Statement]:
    """Give what the paper says in words of a curve, and at how many points our numbers say so."""
    if facts is None:
        return
    same = all(pairs[0].label("dataset") == facts.dataset for pairs in layout.places.values())
    for claim in facts.claims:
        best = [row for row in layout.rows if claim.best and _is_of(row, layout, claim.best)]
        points = sorted({cell.x for cell in cells if cell.x is not None and 0 < cell.x <= claim.most + 1e-9})
        holds = judged = 0
        for x in points if same else ():
            values = {cell.row: cell.value for cell in cells if cell.x == x and cell.value is not None}
            own, others = [values[row] for row in best if row in values], [values[r] for r in values if r not in best]
            if own and others:
                judged += 1
                holds += max(own) > max(others)
        yield Statement(claim.text, holds, judged)


def _is_of(row: tuple[str, ...], layout: Grid, labels: Mapping[str, str]) -> bool:
    return any(matches(pairs[0], labels) for place, pairs in layout.places.items() if place.row == row)


def of_paper(plan: ViewPlan, facts: Facts | None, pair: Pair) -> Published | None:
    """Return what the paper has for a pair; None of other data than the paper's, where it would be no comparison."""
    if facts is None or pair.label("dataset") != facts.dataset:
        return None
    return facts.cell(**{key: _named(key, plan, pair) for key in facts.keys})


# Where the labels of a pair are found that name a cell of the paper.
_LABELS = {"network": "model", "kappa": "attack.confidence", "pixels": "attack.eps"}


def _named(key: str, plan: ViewPlan, pair: Pair) -> str:
    value = pair.label(str(plan.paper.get(key, _LABELS.get(key, key))))
    return "clean" if value is None and key == "attack" else str(value)
