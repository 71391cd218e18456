"""Figures of a view, drawn without a display: colours and markers that the colour-blind tell apart, bands, units."""

from __future__ import annotations

import io
import warnings
from typing import Any

from learn2perturb.experiments.history import SCHEDULE
from learn2perturb.experiments.view import View, ViewCell
from learn2perturb.terminal import one_line

# Okabe and Ito 2008, without the yellow that white paper swallows; a line is told by its marker, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_AXES = {
    "eot": "draws averaged in each gradient", "attack.eot": "draws averaged in each gradient",
    "attack.steps": "steps of the attack", "epoch": "epoch", "epochs": "epochs of training",
}  # fmt: skip
_FORMATS = ("png", "svg")


def figures(view: View) -> dict[str, bytes]:
    """Return the figure of a curve or a history by format; of a table, and where nothing is there yet, none."""
    if view.kind == "table" or all(cell.value is None for cell in view.cells):
        return {}
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no display, and no global state

    with matplotlib.rc_context({"svg.hashsalt": view.name, "svg.fonttype": "path"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in letters that the font lacks
        figure = Figure(figsize=(6, 4), layout="constrained")
        _draw(figure.subplots(), view)
        return {kind: _saved(figure, kind) for kind in _FORMATS}


def _draw(axes: Any, view: View) -> None:
    scale, label = _axis(view)
    for number, row in enumerate(dict.fromkeys(cell.row for cell in view.cells)):
        for column in dict.fromkeys(cell.column for cell in view.cells if cell.row == row):
            points = [
                cell for cell in view.cells
                if (cell.row, cell.column) == (row, column) and cell.value is not None and cell.x is not None
            ]  # fmt: skip
            points.sort(key=lambda cell: cell.x or 0.0)
            if points:
                _line(axes, view, points, number, scale)
    axes.set_xlabel(label)
    axes.set_ylabel(_plain(f"{view.value.replace('_', ' ')}, {view.unit}" if view.unit else view.value))
    axes.set_title(_plain(view.title + (f" ({view.level})" if view.level else "")), fontsize="small")
    axes.grid(alpha=0.3)
    if view.unit == "%":
        axes.set_ylim(0, 100)
    handles = axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(fontsize="small")


def _line(axes: Any, view: View, points: list[ViewCell], number: int, scale: float) -> None:
    x = [scale * (cell.x or 0.0) for cell in points]
    y = [view.scale * (cell.value or 0.0) for cell in points]
    dashed = points[0].column == (SCHEDULE,)
    colour = COLOURS[number % len(COLOURS)]
    name = ", ".join((*points[0].row, *points[0].column)) or view.value
    few = len(points) <= 40
    axes.plot(
        x, y, color=colour, linestyle="--" if dashed else "-", marker=MARKERS[number % len(MARKERS)] if few else None,
        markersize=4, label=_plain(name),
    )  # fmt: skip
    bands = [cell.interval or (_spread(cell) if view.kind == "history" else None) for cell in points]
    if all(band is not None for band in bands) and len(points) > 1:
        low, high = ([view.scale * getattr(band, end) for band in bands] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if view.kind == "curve" and any(cell.std for cell in points):
        deviations = [view.scale * (cell.std or 0.0) for cell in points]
        axes.errorbar(x, y, yerr=deviations, color=colour, fmt="none", capsize=2)
    paper = [(at, view.scale * cell.paper.mean) for at, cell in zip(x, points, strict=True) if cell.paper is not None]
    if paper:
        axes.plot(*zip(*paper, strict=True), color=colour, linestyle=":", label=_plain(f"{name}, paper"))


def _spread(cell: ViewCell) -> Any:
    """Return the band of a history: a deviation over seeds to either side."""
    from learn2perturb.experiments.view import Bounds

    if cell.std is None or cell.value is None:
        return None
    return Bounds(cell.value - cell.std, cell.value + cell.std)


def _axis(view: View) -> tuple[float, str]:
    """Return scale and name of the axis: sizes of at most 1 are shown in 255ths, as papers do."""
    if view.x.rpartition(".")[2] == "eps" and all((cell.x or 0) <= 1 for cell in view.cells):
        return 255.0, "eps, in 255ths of the pixel range"
    return 1.0, _plain(_AXES.get(view.x, view.x.replace("_", " ")))


def _plain(text: str) -> str:
    """Return text that matplotlib takes for no formula, and that does not hide a line from the legend."""
    line = one_line(text).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def _saved(figure: Any, kind: str) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()
