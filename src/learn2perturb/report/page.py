"""``report``: one self-contained HTML file, which asks nothing of any network."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from learn2perturb.errors import ConfigError
from learn2perturb.records import atomic_write
from learn2perturb.report import library
from learn2perturb.report.content import Content, as_data, contents
from learn2perturb.report.figures import check_folder, write_figures
from learn2perturb.report.section import RunProgress
from learn2perturb.report.sources import gather

MOST_BYTES = 4 << 20


def report(
    *sources: str | os.PathLike[str],
    out: str | os.PathLike[str] = "report.html",
    claim: str | None = None,
    figures: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a page of records and run folders to ``out``, and return its path.

    Args:
        sources: records of evaluate, diagnose and certify (JSON), and run folders. A record in a folder whose weights
            are others than it is of is left out, with a warning; given itself, it is shown.
        out: the HTML file.
        claim: what is claimed, such as ``"51 % under pgd20"``; a diagnosis that was made of one brings its own.
        figures: a folder for the charts as SVG, PDF and PNG, one and two columns wide.

    Raises:
        ConfigError: there is nothing to show, or the claim does not go with the records.
        CheckpointError: a record is damaged, all are of other weights than lie there, or the page cannot be written.
    """
    folder = None if figures is None else check_folder(figures)
    material = gather(sources)
    for sentence in material.strangers:
        warnings.warn(sentence, stacklevel=2)
    found = contents(material, claim)
    text = rendered(found)
    if len(text.encode()) > MOST_BYTES:
        raise ConfigError(
            f"the page has {len(text.encode()) >> 20} MiB, more than {MOST_BYTES >> 20}; give fewer records"
        )
    path = atomic_write(Path(out), text)
    if folder is not None:
        write_figures(found, folder)
    return path


def page(*sources: str | os.PathLike[str], claim: str | None = None) -> str:
    """Return the HTML text of the page that :func:`report` writes."""
    return rendered(contents(gather(sources), claim))


def rendered(found: Content, *, runs: Sequence[RunProgress] = (), version: str = "") -> str:
    """Return a page as HTML text.

    Args:
        found: what is on it.
        runs: of a study that is watched, how far each is.
        version: of what is watched: the page asks where it came from for a newer one; empty: it asks nobody.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_part("page.html"))
    # "<" cannot end the element that holds the data.
    data = json.dumps(as_data(found) | ({"version": version} if version else {}), allow_nan=False).replace(
        "<", "\\u003c"
    )
    return template.render(
        page=found, data=data, style=_part("page.css"), script=_part("page.js"), library=library.script(),
        columns=COLUMNS, runs=runs, watched=bool(version),
    )  # fmt: skip


# Field of a row, its heading, whether it is a number.
COLUMNS = (
    ("model", "model", False), ("attack", "attack", False), ("eps", "eps", False), ("noise", "noise", False),
    ("predictor", "predictor", False), ("accuracy", "accuracy, %", True), ("interval", "95 % interval", True),
    ("worst", "worst of 10", True), ("n", "n", True), ("draws", "draws", True),
)  # fmt: skip


def _part(name: str) -> str:
    return (resources.files("learn2perturb.report") / "parts" / name).read_text(encoding="utf-8")
