"""What a page shows of studies: views as tables and charts, differences, the paper beside, what to say first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from learn2perturb.experiments.folder import StudyFolder
from learn2perturb.experiments.rendering import (
    MISSING,
    Table,
    difference_legend,
    difference_table,
    legend,
    paper_lines,
    paper_summary,
    table,
)
from learn2perturb.experiments.view import View
from learn2perturb.report import charts
from learn2perturb.report.section import Chart, Listing, Section, Shown

_NUMBER = re.compile(rf"([\d+\-\[]|$|{MISSING})")  # what the text of a number begins with


def sections(views: Sequence[View]) -> Iterable[Section]:
    """Give a section for each view."""
    titles = [view.title for view in views]
    for index, view in enumerate(views):
        drawn = charts.of_view(view)
        tables = [_shown("" if drawn is None else view.title, table(view), folded=drawn is not None)]
        if view.differences:
            tables.append(_shown(difference_legend(view), difference_table(view)))
        told = [view.level, view.name if titles.count(view.title) > 1 else None]
        lists = {"Beside the paper": [paper_summary(view), *paper_lines(view)], "Notes": view.notes}
        yield Section(
            view.title + "".join(f" ({text})" for text in told if text),
            (_signed(legend(view)),),
            charts=() if drawn is None else (Chart(f"view-{index}", drawn),),
            tables=tuple(tables),
            lists=tuple(
                Listing(heading, tuple(_signed(line) for line in lines if line))
                for heading, lines in lists.items()
                if any(lines)
            ),
        )


def _shown(caption: str, rows: Table, *, folded: bool = False) -> Shown:
    """Return a table whose columns are numbers where all their texts begin as one."""
    head, *body = [tuple(map(_signed, row)) for row in rows]
    numbers = tuple(all(_NUMBER.match(row[column]) for row in body) for column in range(len(head)))
    return Shown(_signed(caption), head, tuple(body), numbers, folded)


def _signed(text: str) -> str:
    return text.replace("+-", "±")


def verdict(studies: Sequence[StudyFolder], views: Sequence[View]) -> tuple[str, list[str]]:
    """Return what studies have found in a sentence, and the evidence: differences counted, the paper's numbers too."""
    said = [text for view in views for text in _differences(view)]
    beside = [f"{view.title}: {summary}" for view in views if (summary := paper_summary(view))]
    missing = [
        f"{one.missing} of {one.wanted} cells of study {one.name} have no record yet." for one in studies if one.missing
    ]
    found = [*said, *beside]
    head = found[0] if found else f"{len(views)} {'view' if len(views) == 1 else 'views'}, and nothing is compared."
    return head, [*found[1:], *missing]


def _differences(view: View) -> Iterable[str]:
    by_row: dict[tuple[str, str], list[str]] = {}
    for one in view.differences:
        by_row.setdefault((", ".join(one.row), one.baseline), []).append(one.sentence)
    for (row, baseline), sentences in by_row.items():
        counted = "; ".join(f"{text} in {count} of {len(sentences)}" for text, count in Counter(sentences).items())
        yield f"{row} against {baseline}: {counted}."
