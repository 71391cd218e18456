"""A part of a page, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True)
class Chart:
    """A chart with its place on the page."""

    name: str
    spec: dict[str, Any]


@final
@dataclass(frozen=True)
class Shown:
    """A table as text, with which columns are numbers; ``folded`` where a chart above shows the same."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[bool, ...]
    folded: bool = False


@final
@dataclass(frozen=True)
class Listing:
    """Lines under a small heading."""

    heading: str
    lines: tuple[str, ...]


@final
@dataclass(frozen=True)
class Shot:
    """An image, what an attack made of it, and what it added, as PNG files in text; how the draws voted on both."""

    index: int
    label: str
    kind: str
    clean: str
    adversarial: str
    difference: str
    votes: tuple[tuple[str, int], ...]
    clean_votes: tuple[tuple[str, int], ...]


@final
@dataclass(frozen=True)
class Gallery:
    """Images under one row, chosen by a rule; ``row`` is its label, ``told`` what is to be known of them."""

    row: str
    told: str
    times: int
    shots: tuple[Shot, ...]


@final
@dataclass(frozen=True)
class Section:
    """A heading and what is under it: sentences, tables, lists, settings, charts, checks, images."""

    title: str
    sentences: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    charts: tuple[Chart, ...] = ()
    checks: tuple[dict[str, Any], ...] = ()
    tables: tuple[Shown, ...] = ()
    lists: tuple[Listing, ...] = ()
    galleries: tuple[Gallery, ...] = ()


@final
@dataclass(frozen=True)
class RunProgress:
    """How far a run of a study is: epochs, records, and about how long the rest takes, in words."""

    run: str
    epochs: int
    epochs_in_all: int
    records: int
    records_in_all: int
    left: str
