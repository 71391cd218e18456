"""Noise, accuracy or losses over the epochs of the trainings of a study. Knows no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from learn2perturb.errors import ConfigError
from learn2perturb.experiments.facts import published
from learn2perturb.experiments.grid import Labels, lines
from learn2perturb.experiments.levels import level_notes
from learn2perturb.experiments.results import Results
from learn2perturb.experiments.seeds import deviation, over_seeds
from learn2perturb.experiments.spec import ViewPlan
from learn2perturb.experiments.view import Statement, View, ViewCell

NOISE, ACCURACY, CLEAN = "noise", "accuracy", "clean"
SCHEDULE = "schedule"  # what the regulariser alone would make of the noise
_MONITORED = {ACCURACY: "_pgd", CLEAN: "_clean"}  # ends of the keys of what is scored after each epoch
_SHARES = ("_accuracy", *_MONITORED.values())


def history_view(plan: ViewPlan, results: Results) -> View:
    """Return what the metrics of the trainings say of ``plan.value``, one line a series.

    Raises:
        ConfigError: no line of a training has such a value, though there are lines.
    """
    cells: list[ViewCell] = []
    names: set[str] = set()
    notes = list(plan.notes)
    missing = 0
    for row, runs in lines(plan, results.study).items():
        histories = [history for run in runs if (history := results.history(run))]
        missing += len(runs) - len(histories)
        if not histories:
            cells.append(ViewCell(row, wanted=len(runs)))
            continue
        named = [name for history in histories if (name := value_of(history, plan.value)) is not None]
        if not named:  # such as the noise of a network that has none
            notes.append(f"The metrics of {', '.join(row)} hold no {plan.value}.")
            continue
        names.update(named)
        cells += _line(row, (named[0],), named[0], histories, len(runs))
        if plan.value == NOISE:
            schedule = f"{named[0].removesuffix('_mean')}_{SCHEDULE}"
            cells += _line(row, (SCHEDULE,), schedule, histories, len(runs))
    if not cells:
        raise ConfigError(
            f"view {plan.name}: no metrics of its runs hold {plan.value}; "
            "give noise, accuracy, clean, or a key of theirs"
        )
    unit = "%" if any(name.endswith(_SHARES) for name in (*names, plan.value)) else ""
    notes += _what(names)
    facts = published(str(plan.paper["facts"])) if plan.paper else None
    notes += level_notes(results.study) if facts is not None else []
    said = tuple(Statement(claim.text, 0, 0) for claim in (facts.claims if facts is not None else ()))
    return View(
        plan.name, "history", plan.title or results.study.title, results.study.name, results.study.level, plan.series,
        ("what",), "epoch", plan.value, unit, tuple(cells), notes=tuple(notes), statements=said, missing=missing,
    )  # fmt: skip


def value_of(history: list[dict[str, Any]], value: str) -> str | None:
    """Return the key of the metrics that ``value`` names: ``noise``, ``accuracy``, ``clean``, or the key itself."""
    keys = dict.fromkeys(key for line in history for key in line)
    if value == NOISE:
        return next((key for key in keys if key.endswith("_mean") and key.removesuffix("_mean") in keys), None)
    if value in _MONITORED:
        return next((key for key in keys if key.endswith(_MONITORED[value])), None)
    return value if value in keys else None


def _line(
    row: Labels, column: Labels, key: str, histories: list[list[dict[str, Any]]], wanted: int
) -> Iterator[ViewCell]:
    """Give the mean over seeds at each epoch at which a training wrote a finite number."""
    found: dict[int, list[float]] = {}
    for history in histories:
        for line in history:
            number = _number(line, key)
            if number is not None and isinstance(line.get("epoch"), int):
                found.setdefault(line["epoch"] + 1, []).append(number)
    for epoch, values in sorted(found.items()):
        yield ViewCell(
            row, column, float(epoch), statistics.fmean(values), seeds=len(values), wanted=wanted,
            std=deviation(values), over_seeds=over_seeds(values),
        )  # fmt: skip


def _number(line: Mapping[str, Any], key: str) -> float | None:
    value = line.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _what(names: set[str]) -> Iterator[str]:
    if names:
        yield f"Shown: {', '.join(sorted(names))} after each epoch, mean over seeds."
    if any(name.endswith("_mean") for name in names):
        yield (
            f"{SCHEDULE}: what the regulariser alone would make of the noise (Learn2Perturb-R); noise that follows it "
            "has learned nothing from the loss."
        )
