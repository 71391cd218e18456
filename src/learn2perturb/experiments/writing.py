"""The files of the views of a study, each written whole or not at all. Knows no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from learn2perturb import records
from learn2perturb.errors import ConfigError
from learn2perturb.experiments.folder import CONTENTS, contents
from learn2perturb.experiments.plots import figures
from learn2perturb.experiments.rendering import markdown, to_csv, to_latex
from learn2perturb.experiments.results import Results
from learn2perturb.experiments.spec import Study
from learn2perturb.experiments.view import View
from learn2perturb.terminal import markdown_row, one_line

INDEX = "README.md"
_TAKEN = [Path(name).stem for name in (INDEX, CONTENTS, "sweep.json", "page.html")]  # what else lies in the folder


def file_name(name: str) -> str:
    """Return a name of a view that is a name of a file in this folder, whatever the study's file calls it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "view"


def write(results: Results, views: Sequence[View], folder: Path) -> list[Path]:
    """Write ``views`` into ``folder``, and where what they rest on is; return the files, the page of all first.

    Raises:
        ConfigError: two views would have one file.
        CheckpointError: a file cannot be written.
    """
    study = results.study
    names = [file_name(view.name) for view in views]
    doubles = sorted({name for name in names if (names + _TAKEN).count(name) > 1})
    if doubles:
        raise ConfigError(f"views of study {study.name}: {doubles[0]} would be the file of two; give it another name")
    files = []
    for name, view in zip(names, views, strict=True):
        texts: dict[str, bytes | str] = {"md": markdown(view), "csv": to_csv(view), "tex": to_latex(view)}
        files.append(view.save(folder / f"{name}.json"))
        files += [
            records.atomic_write(folder / f"{name}.{kind}", content)
            for kind, content in (texts | figures(view)).items()
        ]
    files.append(contents(results, [f"{name}.json" for name in names], folder).save(folder / CONTENTS))
    return [records.atomic_write(folder / INDEX, page(study, views)), *files]


def page(study: Study, views: Sequence[View]) -> str:
    """Return the page of all views in Markdown, figures included by name."""
    level = "" if study.level is None else f" at level {study.level}"
    parts = [f"# {markdown_row([study.title + level])[2:-2]}", *(f"- {one_line(note)}" for note in study.notes)]
    for view in views:
        parts.append(markdown(view))
        if view.kind != "table" and any(cell.value is not None for cell in view.cells):
            name = file_name(view.name)
            parts.append(f"![{name}]({name}.png)")
    return "\n\n".join(parts) + "\n"
