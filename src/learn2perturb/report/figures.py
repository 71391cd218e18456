"""The charts of a page as figures for papers: SVG, PDF and PNG, as wide as one column and as two."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.records import atomic_write
from learn2perturb.report.content import Content
from learn2perturb.report.library import vl_convert
from learn2perturb.report.section import Chart

INCH = 72  # pixels of a specification, which are points on paper
WIDTHS = {"single": 3.35, "double": 6.9}  # inches, as most two-column styles have them
PPI = 300
_HEIGHT = {"single": 2.2, "double": 3.0}
_INK, _COLOURS = "#1a1d21", ("#0b57a4", "#a4550b", "#1d6b34", "#6b1d6b", "#565d66")
_CONFIG: dict[str, Any] = {
    "background": "white",
    "view": {"stroke": None},
    "axis": {"labelFontSize": 8, "titleFontSize": 8, "titleFontWeight": "normal", "gridOpacity": 0.5},
    "legend": {"labelFontSize": 8, "titleFontSize": 8, "orient": "bottom"},
    "text": {"fontSize": 8, "color": _INK},
    "rule": {"color": _INK},
    "line": {"strokeWidth": 1.25},
    "mark": {"color": _COLOURS[0]},
    "range": {"category": list(_COLOURS)},
}


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the folder of the figures.

    Raises:
        ConfigError: it is a file.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--figures {path} is a file; give a folder")
    return path


def write_figures(content: Content, folder: Path) -> list[Path]:
    """Write every chart of a page into ``folder``; ``figures.md``, which says what each shows, is the first path.

    Raises:
        MissingDependencyError: vl-convert is not installed.
        CheckpointError: a chart cannot be drawn, or a file cannot be written.
    """
    if any(section.charts for section in content.every):
        vl_convert()
    files: list[Path] = []
    lines = ["# Figures", ""]
    for section in content.every:
        for chart in section.charts:
            lines += [
                f"## {chart.name}",
                "",
                f"{section.title}: {chart.spec['title']}. {chart.spec['description']}",
                "",
            ]
            for width in WIDTHS:
                files += _drawn(chart, width, folder)
    return [atomic_write(folder / "figures.md", "\n".join(lines)), *files]


def sized(spec: Mapping[str, Any], width: str) -> dict[str, Any]:
    """Return a specification exactly as wide as a column, without its title, which is the caption's."""
    found = {name: value for name, value in spec.items() if name not in ("title", "description")}
    return found | {
        "width": INCH * WIDTHS[width], "height": INCH * _HEIGHT[width], "padding": 2,
        "autosize": {"type": "fit", "contains": "padding"}, "config": _CONFIG,
    }  # fmt: skip


def _drawn(chart: Chart, width: str, folder: Path) -> list[Path]:
    spec, draw = sized(chart.spec, width), vl_convert()
    offline: dict[str, Any] = {"allowed_base_urls": []}
    kinds: dict[str, Callable[[], str | bytes]] = {
        "svg": lambda: draw.vegalite_to_svg(spec, **offline),
        "pdf": lambda: draw.vegalite_to_pdf(spec, **offline),
        "png": lambda: draw.vegalite_to_png(spec, ppi=PPI, **offline),
    }
    files = []
    for ending, convert in kinds.items():
        try:
            content = convert()
        except ValueError as error:
            reason = str(error).splitlines()[0][:200]
            raise CheckpointError(f"chart {chart.name} cannot be drawn as {ending}: {reason}; report it") from None
        files.append(atomic_write(folder / f"{chart.name}-{width}.{ending}", content))
    return files
