"""A view as Markdown, CSV and LaTeX. Names in it come from files of strangers: each format escapes them.

Knows no torch.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence

from learn2perturb.experiments.grid import text_of
from learn2perturb.experiments.view import Bounds, PaperCheck, View, ViewCell, ViewDifference
from learn2perturb.tables import aligned
from learn2perturb.terminal import markdown_row, one_line

MISSING = "missing"
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "`": r"\textasciigrave{}", '"': r"\textquotedbl{}", "[": "{[}", "]": "{]}",
}  # fmt: skip
_MARKUP = re.compile(r"([\\`*_<>#\[\]|!~])")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
Table = list[list[str]]


def markdown(view: View) -> str:
    """Return the view in Markdown: the numbers, differences, what agrees with the paper, notes."""
    return _laid_out(view, _markdown_table, _md)


def for_terminal(view: View) -> str:
    """Return the same for a terminal: its tables are aligned and fit its width."""
    return _laid_out(view, lambda rows: "\n".join(aligned([list(map(one_line, row)) for row in rows])), one_line)


def _laid_out(view: View, as_text: Callable[[Table], str], said: Callable[[str], str]) -> str:
    level = "" if view.level is None else f", level {said(view.level)}"
    parts = [f"## {said(view.title)}", f"View {said(view.name)} of study {said(view.study)}{level}. {legend(view)}"]
    parts.append(as_text(table(view)))
    if view.differences:
        parts += ["### Differences", difference_legend(view), as_text(difference_table(view))]
    parts += _beside_the_paper(view, said)
    if view.notes:
        parts.append("\n".join(f"- {said(note)}" for note in view.notes))
    return "\n\n".join(parts) + "\n"


def table(view: View) -> Table:
    """Return the numbers as text, the head first: a table as it is, a curve and a history one line a point."""
    if view.kind != "table":
        return _points(view)
    columns = view.column_labels
    with_paper = {column for column in columns for cell in view.cells if cell.column == column and cell.paper}
    head = [*view.rows]
    for column in columns:
        name = ", ".join(filter(None, column)) or view.value
        head += [name, *([f"{name}, paper"] if column in with_paper else [])]
    body = []
    for row in dict.fromkeys(cell.row for cell in view.cells):
        texts = list(row)
        for column in columns:
            cell = view.cell(row, column)
            texts.append("" if cell is None else number(view, cell))
            if column in with_paper:
                texts.append("" if cell is None or cell.paper is None else str(cell.paper))
        body.append(texts)
    return [head, *body]


def _points(view: View) -> Table:
    wide = view.kind == "history"
    head = [*view.rows, *(["what"] if wide else []), view.x, view.value, "paper"]
    body = [
        [*cell.row, *(cell.column if wide and cell.column else [""] * wide), axis_text(view.x, cell.x),
         number(view, cell), "" if cell.paper is None else str(cell.paper)]
        for cell in view.cells
    ]  # fmt: skip
    return _without_empty([head, *body])


def _without_empty(rows: Table) -> Table:
    """Leave the last column out where no row has anything in it."""
    return rows if any(row[-1] for row in rows[1:]) else [row[:-1] for row in rows]


def axis_text(key: str, x: float | None) -> str:
    """Return a place on an axis as text: ``8/255`` for an eps, 0 for clean images."""
    if x is None:
        return ""
    return text_of(key, x) if key.endswith("eps") and x else f"{x:g}"


def number(view: View, cell: ViewCell) -> str:
    """Return a number as it is shown: mean, deviation over seeds, interval over images and draws."""
    if cell.value is None:
        return cell.text or MISSING
    text = _scaled(view, cell.value)
    if cell.std is not None:
        text += f" +- {_scaled(view, cell.std)}"
    if cell.interval is not None:
        text += f" {_bounds(view, cell.interval)}"
    return text + (f" ({cell.seeds} of {cell.wanted} seeds)" if cell.seeds < cell.wanted else "")


def difference_table(view: View) -> Table:
    """Return the differences as text, in points."""
    seeds = any(one.seeds > 1 for one in view.differences)
    place = [*view.rows, *view.columns, *([view.x] if view.x else [])]
    head = [*place, "baseline", "points", "interval", *(["seeds", "over seeds"] if seeds else []), "p (Holm)", "said"]
    return [head, *(_difference_row(view, one, seeds) for one in view.differences)]


def _difference_row(view: View, one: ViewDifference, seeds: bool) -> list[str]:
    place = [*one.row, *one.column, *([axis_text(view.x, one.x)] if view.x else [])]
    over = [str(one.seeds), "" if one.over_seeds is None else _points_of(one.over_seeds)] if seeds else []
    said = [f"{one.p_holm:.2g}", one.sentence]
    return [*place, one.baseline, f"{100 * one.difference:+.2f}", _points_of(one.interval), *over, *said]


def difference_legend(view: View) -> str:
    """Say what the differences are."""
    seeds = max(one.seeds for one in view.differences)
    text = (
        "Accuracy less the baseline's, in points, paired over images (and seeds); 95 % intervals over images and "
        "draws, of these very networks; p by McNemar or Student, with Holm's correction for "
        f"{len(view.differences)} differences."
    )
    over = "Over seeds: Student's interval of the mean difference."
    return f"{text} {over if seeds > 1 else 'One seed: nothing is said of others.'}"


def _beside_the_paper(view: View, said: Callable[[str], str]) -> list[str]:
    lines = paper_lines(view)
    if not lines:
        return []
    summary = paper_summary(view)
    return ["### Beside the paper", *([summary] if summary else []), "\n".join(f"- {said(line)}" for line in lines)]


def paper_summary(view: View) -> str:
    """Say how many numbers agree with the paper's; nothing where none are set beside them."""
    checks = view.paper_checks
    if not checks:
        return ""
    count = {verdict: sum(one.verdict == verdict for one in checks) for verdict in ("agrees", "differs", "suspect")}
    return (
        f"{count['agrees']} of {len(checks)} numbers agree, {count['differs']} differ (by more than our interval, "
        f"that over seeds included, and the paper's deviation); {count['suspect']} of the paper's are suspect and "
        "not judged."
    )


def paper_lines(view: View) -> list[str]:
    """Say of each number how it lies beside the paper's, and of each sentence of the paper where it holds here."""
    said = [f"The paper: {one.text} {_held(one.holds, one.points)}" for one in view.statements]
    return [*(check_text(view, one) for one in view.paper_checks), *said]


def _held(holds: int, points: int) -> str:
    return f"Ours: so at {holds} of {points} points." if points else "Ours: not judged by a number."


def check_text(view: View, one: PaperCheck) -> str:
    """Say how one of our numbers lies beside the paper's."""
    where = ", ".join(filter(None, (*one.row, *one.column, axis_text(view.x, one.x) if view.x else "")))
    text = f"{one.verdict}: {where}: {100 * one.ours:.2f}, paper {one.paper}: {100 * one.difference:+.2f} points"
    if one.verdict == "differs":
        why = "; ".join(one.reasons) or "no reason is known"
        return f"{text} (allowed {100 * one.allowed:.2f}): {why}"
    return text


def legend(view: View) -> str:
    """Say what is shown, in a line."""
    unit = f"{view.value.replace('_', ' ')}, {view.unit}" if view.unit else view.value.replace("_", " ")
    seeds = max((cell.wanted for cell in view.cells), default=1)
    text = f"Shown: {unit}"
    if seeds > 1:
        text += f"; mean +- standard deviation over {seeds} seeds"
    if any(cell.interval is not None for cell in view.cells):
        text += "; [95 % interval over images and draws" + (", of these very seeds]" if seeds > 1 else "]")
    return text + "." + (f" {view.missing} are missing." if view.missing else "")


def to_csv(view: View) -> str:
    """Return the numbers as CSV, one line a number, as they are in the record."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [*view.rows, *view.columns, *([view.x] if view.x else [])]
    writer.writerow([
        *map(_csv, names), "value", "text", "low", "high", "std_over_seeds", "low_over_seeds", "high_over_seeds",
        "seeds", "seeds_wanted", "n", "paper", "paper_std", "paper_suspect", "difference", "difference_low",
        "difference_high", "difference_p_holm", "baseline", "measured",
    ])  # fmt: skip
    differences = {(one.row, one.column, one.x): one for one in view.differences}
    for cell in view.cells:
        column = cell.column or ("",) * len(view.columns)
        paper, one = cell.paper, differences.get((cell.row, cell.column, cell.x))
        found = [None] * 5 if one is None else [one.difference, *_ends(one.interval), one.p_holm, one.baseline]
        writer.writerow([
            *map(_csv, (*cell.row, *column)), *([cell.x] if view.x else []), cell.value, _csv(cell.text),
            *_ends(cell.interval), cell.std, *_ends(cell.over_seeds), cell.seeds, cell.wanted, cell.n,
            *([None] * 3 if paper is None else [paper.mean, paper.std, _csv(paper.suspect or "")]), *found[:4],
            _csv(str(found[4] or "")), _csv(cell.measured),
        ])  # fmt: skip
    return text.getvalue()


def to_latex(view: View) -> str:
    """Return the numbers as a LaTeX table (booktabs), its notes below."""
    rows = table(view)
    labels = len(view.rows) + (len(view.columns) if view.kind == "history" else 0)
    spec = "l" * labels + "r" * (len(rows[0]) - labels)
    lines = [r"% \usepackage{booktabs}", r"\begin{tabular}{" + spec + "}", r"\toprule"]
    lines += [_latex_row(rows[0]), r"\midrule", *map(_latex_row, rows[1:]), r"\bottomrule", r"\end{tabular}"]
    told = [view.title + ".", legend(view), *view.notes, *(check_text(view, one) for one in view.paper_checks)]
    lines += ["", r"\par\footnotesize", *(latex(note) + r"\par" for note in told)]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Return text for LaTeX: nothing in it is a command; ``+-`` is the sign."""
    escaped = "".join(_LATEX.get(character, character) for character in one_line(text))
    return escaped.replace("+-", r"$\pm$")


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(latex, cells)) + r" \\"


def _markdown_table(rows: Table) -> str:
    return "\n".join([markdown_row(rows[0]), "|" + "---|" * len(rows[0]), *map(markdown_row, rows[1:])])


def _md(text: str) -> str:
    """Return text for a line of Markdown: nothing in it starts markup."""
    return _MARKUP.sub(r"\\\1", one_line(text))


def _csv(text: str) -> str:
    """Return text for CSV that no spreadsheet takes for a formula."""
    line = one_line(text)
    return f"'{line}" if line.startswith(_FORMULA) else line


def _scaled(view: View, value: float) -> str:
    return f"{view.scale * value:.2f}" if view.unit == "%" else f"{value:.4g}"


def _bounds(view: View, bounds: Bounds) -> str:
    return f"[{_scaled(view, bounds.low)}, {_scaled(view, bounds.high)}]"


def _points_of(bounds: Bounds) -> str:
    return f"[{100 * bounds.low:+.2f}, {100 * bounds.high:+.2f}]"


def _ends(bounds: Bounds | None) -> list[float | None]:
    return [None, None] if bounds is None else [bounds.low, bounds.high]
