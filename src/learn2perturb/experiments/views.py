"""Tables and figures of a study from what it has found so far: ``build_views`` and ``write_views``. Knows no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from learn2perturb.experiments.against import checks, differences, of_paper, statements
from learn2perturb.experiments.facts import Facts, published
from learn2perturb.experiments.grid import Grid, Place, grid, value_and_number
from learn2perturb.experiments.history import history_view
from learn2perturb.experiments.levels import level_notes, measured_notes, paper_notes
from learn2perturb.experiments.measures import Reading, read
from learn2perturb.experiments.results import Results
from learn2perturb.experiments.seeds import deviation, over_images, over_seeds
from learn2perturb.experiments.spec import ViewPlan
from learn2perturb.experiments.view import UNITS, View, ViewCell
from learn2perturb.experiments.writing import write

__all__ = ["View", "build_view", "build_views", "write_views"]


def build_views(results: Results) -> list[View]:
    """Return the views of a study, each from the records that are there; what has none is missing, never filled.

    Raises:
        ConfigError: a view asks for what the study, or a record, does not hold.
    """
    return [build_view(plan, results) for plan in results.study.views]


def write_views(results: Results, folder: Path) -> list[Path]:
    """Write the views into ``folder``: each as JSON, Markdown, CSV and LaTeX, a curve as PNG and SVG, too.

    Return the files, the page of all views, ``README.md``, first.

    Raises:
        CheckpointError: a file cannot be written; one that was there is left as it was.
    """
    return write(results, build_views(results), folder)


def build_view(plan: ViewPlan, results: Results) -> View:
    """Return one view."""
    if plan.kind == "history":
        return history_view(plan, results)
    study = results.study
    layout = grid(plan, study)
    facts = published(str(plan.paper["facts"])) if plan.paper else None
    notes = list(plan.notes)
    unlike: dict[str, list[str]] = {}
    cells = tuple(_cell(place, layout, plan, results, facts, notes, unlike) for place in layout.places)
    notes += [_without_mean(told, several) for several, told in unlike.items()]
    compared = tuple(differences(plan, layout, results, notes))
    notes += [*measured_notes(cells), *_off_axis(layout, plan.x), *paper_notes(layout, facts, cells)]
    notes += level_notes(study) if facts is not None else []
    curve = plan.kind == "curve"
    return View(
        plan.name, "curve" if curve else "table", plan.title or study.title, study.name, study.level,
        rows=plan.series if curve else plan.rows, columns=() if curve else plan.columns, x=plan.x if curve else "",
        column_labels=layout.columns, value=layout.value, cells=cells,
        unit=UNITS.get(value_and_number(layout.value)[0], "%"),
        notes=tuple(dict.fromkeys(notes)), differences=compared, paper_checks=tuple(checks(study, cells, layout)),
        statements=tuple(statements(facts, layout, cells)), missing=sum(cell.wanted - cell.seeds for cell in cells),
    )  # fmt: skip


def _cell(
    place: Place,
    layout: Grid,
    plan: ViewPlan,
    results: Results,
    facts: Facts | None,
    notes: list[str],
    unlike: dict[str, list[str]],
) -> ViewCell:
    pairs = layout.places[place]
    answers = [answer for pair in pairs if (answer := results.answer(pair)) is not None]
    readings = [
        read(answer.pair, answer.record, layout.value, plan.noise) for answer in answers if answer.record is not None
    ]
    paper = of_paper(plan, facts, pairs[0]) if layout.value == "accuracy" else None
    cell = ViewCell(place.row, place.column, place.x, wanted=len(pairs), paper=paper)
    files = tuple(answer.path.name for answer in answers if answer.record is not None and answer.path is not None)
    if not readings:
        return cell
    measured = list(dict.fromkeys(reading.measured for reading in readings))
    notes += [f"Interval {reading.note}." for reading in readings if reading.note]
    if len(measured) > 1:
        unlike.setdefault("; ".join(map(str, measured)), []).append(", ".join((*place.row, *place.column)))
        return replace(cell, seeds=len(readings), text="unlike", records=files)
    values = [reading.value for reading in readings if reading.value is not None]
    return replace(
        cell, value=statistics.fmean(values) if values else None, text=_words(readings),
        interval=over_images([reading.interval for reading in readings]), seeds=len(readings),
        std=deviation(values), over_seeds=over_seeds(values), n=measured[0].n, measured=str(measured[0]), records=files,
    )  # fmt: skip


def _without_mean(told: Sequence[str], several: str) -> str:
    """Return what is said of numbers that have no mean over seeds: which, and on what they were measured."""
    which = told[0] if len(told) == 1 else f"{told[0]} and {len(told) - 1} more"
    return f"No mean of {which}: the seeds are of unlike images or scorings ({several})."


def _words(readings: Sequence[Reading]) -> str:
    """Return what the records say in words, each with how many say so."""
    said = [reading.text for reading in readings if reading.text]
    if len(set(said)) < 2:
        return "".join(dict.fromkeys(said))
    return ", ".join(f"{text} ({said.count(text)})" for text in dict.fromkeys(said))


def _off_axis(layout: Grid, x: str) -> list[str]:
    names = dict.fromkeys(pair.cell.title for pair in layout.off_axis)
    return [f"Not on the axis, for want of {x}: {', '.join(names)}."] if names else []
