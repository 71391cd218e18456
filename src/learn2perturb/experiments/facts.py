"""What papers published: numbers typed as facts into ``paper/*.yaml``, one file a table. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, final

import yaml

from learn2perturb.checks import fraction
from learn2perturb.errors import UnknownNameError

PAPER_EOT = 1  # draws in a gradient of the attacks of the Learn2Perturb paper
_FOLDER = Path(__file__).parent / "paper"
_EMPTY: dict[str, Any] = {"keys": [], "cells": {}, "suspect": [], "parameters": {}, "claims": []}


@final
@dataclass(frozen=True)
class Published:
    """One number of a paper: accuracy in [0, 1], its deviation where given, and why it is suspect where it is."""

    mean: float
    std: float | None = None
    suspect: str | None = None

    def __str__(self) -> str:
        text = f"{100 * self.mean:.2f}" + ("" if self.std is None else f" +- {100 * self.std:.2f}")
        return text + ("" if self.suspect is None else " (suspect)")


@final
@dataclass(frozen=True)
class Claimed:
    """What the paper says of a figure: runs with the labels ``best`` lie highest up to ``most`` on the axis.

    Without ``best`` no number judges it.
    """

    text: str
    best: Mapping[str, str] = field(default_factory=dict)
    most: float = math.inf


@final
@dataclass(frozen=True)
class Facts:
    """A published table: ``keys`` say what the levels of a cell's name are, such as (network, pixels, defense).

    ``parameters`` of the networks, as published. A figure has no numbers, and ``claims`` say what is said of it.
    """

    name: str
    title: str
    dataset: str
    keys: tuple[str, ...]
    cells: Mapping[tuple[str, ...], Published]
    parameters: Mapping[str, int] = field(default_factory=dict)
    claims: tuple[Claimed, ...] = ()

    def cell(self, **names: str) -> Published | None:
        """Return the number of the cell so named, a number however it is written; None where the paper has none."""
        return self._found.get(tuple(_plain(names[key]) for key in self.keys))

    @cached_property
    def _found(self) -> dict[tuple[str, ...], Published]:
        return {tuple(map(_plain, cell)): number for cell, number in self.cells.items()}


def known() -> list[str]:
    """Return the names of the published tables and figures."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


@lru_cache
def published(name: str) -> Facts:
    """Return the table called ``name``.

    Raises:
        UnknownNameError: no table is so called.
    """
    if name not in known():
        raise UnknownNameError.of("table", name, known())
    raw = _EMPTY | yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    suspect = {tuple(item["cell"]): item["why"] for item in raw["suspect"]}
    keys = tuple(raw["keys"])
    found: dict[tuple[str, ...], Published] = {}
    _collect(raw["cells"], (), len(keys), suspect, found)
    claims = tuple(
        Claimed(one["text"], one.get("best", {}), fraction(one["most"]) if "most" in one else math.inf)
        for one in raw["claims"]
    )
    return Facts(name, raw["title"], raw["dataset"], keys, found, raw["parameters"], claims)


def _plain(text: str) -> str:
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


def _collect(
    level: Mapping[str, Any],
    above: tuple[str, ...],
    depth: int,
    suspect: Mapping[tuple[str, ...], str],
    found: dict[tuple[str, ...], Published],
) -> None:
    for key, value in level.items():
        cell = (*above, key)
        if len(cell) < depth:
            _collect(value, cell, depth, suspect, found)
            continue
        mean, std = value if isinstance(value, list) else (value, None)
        found[cell] = Published(mean / 100, None if std is None else std / 100, suspect.get(cell))
