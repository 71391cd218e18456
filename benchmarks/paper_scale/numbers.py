"""Numbers of a cell, read from its record; None where there is none yet, and nothing is ever filled in."""

from __future__ import annotations

import shlex

from benchmarks.paper_scale.plan import PLAN, Cell, Plan
from benchmarks.paper_scale.state import State
from learn2perturb.evaluation import Row
from learn2perturb.evaluation.intervals import Scores, paired_difference

MISSING = "missing"
CLEAN = "clean"


def row_of(plan: Plan, state: State, run: str, cell: str, *, noise: bool = True) -> Row | None:
    """Return the row of a cell; ``clean`` is that of the first cell of the plan that is there."""
    for planned in plan.cells:
        if cell not in (planned.name, CLEAN) or (cell == CLEAN and not planned.is_verb):
            continue
        evaluation = state.evaluation(run, planned.name)
        if evaluation is None:
            continue
        for row in evaluation.rows:
            if row.noise == noise and (row.attack == CLEAN) == (cell == CLEAN):
                return row
    return None


def accuracy(row: Row | None) -> str:
    """Return accuracy in %, its deviation over draws, and its interval over images and draws."""
    if row is None:
        return MISSING
    spread = "" if row.std is None else f" ± {100 * row.std:.2f}"
    return f"{100 * row.accuracy:.2f}{spread} [{100 * row.interval.low:.2f}, {100 * row.interval.high:.2f}]"


def lead(first: Row | None, second: Row | None) -> str:
    """Return ``first`` less ``second`` in points, paired over the same images, with its interval."""
    if first is None or second is None or first.n != second.n:
        return MISSING
    left, right = (Scores(row.correct.unpack(), random=row.stochastic) for row in (first, second))
    found = paired_difference(left, right)
    return f"{100 * found.mean:+.2f} [{100 * found.interval.low:+.2f}, {100 * found.interval.high:+.2f}]"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def command(plan: Plan, run: str, cell: Cell) -> str:
    """Return what computes a cell anew: the package's own verb where it can express it."""
    if cell.is_verb:
        return shlex.join(["learn2perturb", "evaluate", run, *plan.words(cell)])
    words = ["python", "-m", "benchmarks.paper_scale", "cell", run, cell.name, "--out", f"{cell.name}.json"]
    if plan.path.resolve() != PLAN:
        root = PLAN.parents[2]
        path = plan.path.resolve()
        words += ["--plan", str(path.relative_to(root)) if path.is_relative_to(root) else path.name]
    return shlex.join(words)
