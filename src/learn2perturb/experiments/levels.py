"""What a level changes beside the paper's own, and what a view's numbers were measured on. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from learn2perturb.experiments.facts import Facts
from learn2perturb.experiments.grid import Grid, text_of
from learn2perturb.experiments.spec import Study
from learn2perturb.experiments.study_file import read_source, read_study, shipped
from learn2perturb.experiments.view import ViewCell

PAPER = "paper"
_CONFIG = (
    "defense", "dataset", "model", "recipe", "epochs", "limit", "batch_size", "lr", "schedule", "attack_steps", "eps",
    "engine",
)  # fmt: skip
_WORDS = {"limit": "training images", "model": "network"}
_ALL = "all"


def level_notes(study: Study) -> list[str]:
    """Say in what the study at its level differs from the same study at the paper's level."""
    paper = _at_paper(study)
    if paper is None:
        return []
    found = [
        *_differing(_configs(study), _configs(paper)),
        *_differing(_options(study, paper), _options(paper, study)),
        *_differing({"seeds": _seeds(study)}, {"seeds": _seeds(paper)}),
        *_cells(study, paper),
    ]
    return [f"Level {study.level} beside the paper's: {'; '.join(found)}."] if found else []


def _at_paper(study: Study) -> Study | None:
    return None if study.level == PAPER or study.name not in shipped() else _shipped_at_paper(study.name)


@lru_cache
def _shipped_at_paper(name: str) -> Study | None:
    return read_study(name, PAPER) if PAPER in (read_source(name)[1].get("levels") or {}) else None


def _configs(study: Study) -> dict[str, list[str]]:
    """Return the values of each setting over all runs, as shown."""
    configs = [run.config for run in study.runs if run.config is not None]
    return {key: _shown(key, [getattr(config, key) for config in configs]) for key in _CONFIG}


def _options(study: Study, other: Study) -> dict[str, list[str]]:
    """Return the values of each option that is set, as shown, of the defenses that the other study has too."""
    both = {run.config.defense for run in other.runs if run.config is not None}
    found: dict[str, list[Any]] = {}
    for config in (run.config for run in study.runs if run.config is not None):
        for key, value in config.options.items() if config.defense in both else ():
            found.setdefault(f"{key} of `{config.defense}`", []).append(value)
    return {key: _shown(key, values) for key, values in found.items()}


def _seeds(study: Study) -> list[str]:
    return [str(len({run.label("seed") for run in study.runs}))]


def _cells(study: Study, paper: Study) -> Iterator[str]:
    """Give what differs in the cells that both have, and those that one lacks."""
    own, there = _by_name(study), _by_name(paper)
    for key in ("limit", "draws", "predictor", "members"):
        yield from (
            line.replace("training images", "images") for line in _differing(
                {key: _shown(key, [getattr(cell.scoring, key) for cell in study.cells])},
                {key: _shown(key, [getattr(cell.scoring, key) for cell in paper.cells])},
            )
        )  # fmt: skip
    for name in own.keys() & there.keys():
        yield from (f"{name}: {line}" for line in _differing(own[name], there[name]))
    for name in sorted(there.keys() - own.keys()):
        yield f"{name} is left out"


def _by_name(study: Study) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[Any]]] = {}
    for cell in study.cells:
        settings = {"eps": cell.eps, **(cell.attack[1] if cell.attack is not None else {}), **cell.settings}
        for key, value in settings.items():
            found.setdefault(cell.name, {}).setdefault(key, []).append(value)
    return {name: {key: _shown(key, values) for key, values in keys.items()} for name, keys in found.items()}


def _shown(key: str, values: Sequence[Any]) -> list[str]:
    shown = [_ALL if key == "limit" and value is None else text_of(key, value) for value in values]
    return list(dict.fromkeys(shown))


def _differing(own: Mapping[str, list[str]], paper: Mapping[str, list[str]]) -> Iterator[str]:
    for key in dict.fromkeys((*own, *paper)):
        ours, theirs = own.get(key, []), paper.get(key, [])
        if set(ours) != set(theirs):
            here, there = (", ".join(filter(None, values)) or "as is usual" for values in (ours, theirs))
            setting, of, defense = key.partition(" of ")
            yield f"{_WORDS.get(setting, setting.replace('_', ' '))}{of}{defense} {here} ({there})"


def paper_notes(layout: Grid, facts: Facts | None, cells: Sequence[ViewCell]) -> Iterator[str]:
    """Say of what data the paper's numbers are where ours are of others, and which of them are suspect."""
    if facts is None:
        return
    data = {pair.label("dataset") for pairs in layout.places.values() for pair in pairs}
    others = sorted(map(str, data - {facts.dataset}))
    if others and (facts.cells or facts.claims):
        yield f"The paper's numbers are of {facts.dataset}, ours of {', '.join(others)}: they are not set side by side."
    for cell in cells:
        if cell.paper is not None and cell.paper.suspect is not None:
            where = ", ".join((*cell.row, *cell.column))
            yield f"Suspect: the paper's {100 * cell.paper.mean:.2f} of {where}: {cell.paper.suspect}."


def measured_notes(cells: Sequence[ViewCell]) -> Iterator[str]:
    """Say of which images the numbers are and how they were scored; where that differs, of which is what."""
    found: dict[str, list[ViewCell]] = {}
    for cell in cells:
        if cell.measured:
            found.setdefault(cell.measured, []).append(cell)
    if len(found) < 2:
        yield from (f"Measured on {measured}." for measured in found)
        return
    if len({_images(measured) for measured in found}) > 1:
        yield _unlike([cell for some in found.values() for cell in some])
    for measured, some in found.items():
        yield f"Measured on {measured}: {_places(some, cells)}."


def _images(measured: str) -> str:
    return measured.partition(", ")[0]


def _unlike(cells: Sequence[ViewCell]) -> str:
    """Say which of the ``cells``, which are not all of the same images, may be compared."""
    for name, place in (("column", lambda cell: (cell.column, cell.x)), ("row", lambda cell: cell.row)):
        seen: dict[Any, list[str]] = {}
        for cell in cells:
            seen.setdefault(place(cell), []).append(_images(cell.measured))
        if all(len(set(images)) == 1 for images in seen.values()) and any(len(images) > 1 for images in seen.values()):
            return f"Each {name} is of the same images, but not all {name}s are: compare within a {name}."
    return "NOT ALL OF THE SAME IMAGES: compare only what is."


def _places(some: Sequence[ViewCell], cells: Sequence[ViewCell]) -> str:
    """Name cells by their rows, and by their columns too where not the whole row is among them."""
    names = []
    for row in dict.fromkeys(cell.row for cell in some):
        own = {(cell.column, cell.x) for cell in some if cell.row == row}
        whole = own == {(cell.column, cell.x) for cell in cells if cell.row == row and cell.measured}
        columns = [", ".join(column) if x is None else f"{x:.4g}" for column, x in sorted(own, key=str)]
        names.append(", ".join(row) + ("" if whole else f" ({'; '.join(columns)})"))
    return "; ".join(names)
