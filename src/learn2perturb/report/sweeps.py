"""Rows of records that differ in one thing, the size, the steps or the draws of an attack: the points of a curve."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, final

from learn2perturb.evaluation import Evaluation, Row
from learn2perturb.evaluation.result import CLEAN

FEWEST = 3  # points that are worth a curve
Axis = Literal["eps", "steps", "eot"]
_AXES: tuple[Axis, ...] = ("eps", "steps", "eot")
_FOLLOWS = {"eps": ("step_size",)}  # what changes with it


@final
@dataclass(frozen=True)
class Sweep:
    """Rows of one network on one number of images, along ``axis``; ``at`` is where each stands."""

    model: str
    axis: Axis
    at: tuple[float, ...]
    rows: tuple[Row, ...]
    num_classes: int

    @property
    def norm(self) -> str:
        """The norm of all its attacks."""
        return str(self.rows[-1].parameters.get("norm", "linf"))


@final
@dataclass(frozen=True)
class _Scored:
    """Which network was scored, on which images, and how: the same in all points of a curve."""

    model: str
    weights: str
    images: str
    num_classes: int
    noise: bool
    predictor: str
    members: int
    n: int

    @classmethod
    def of(cls, evaluation: Evaluation, row: Row) -> _Scored:
        model, weights, images = (str(evaluation.metadata.get(name, name)) for name in ("model", "weights", "images"))
        return cls(model, weights, images, evaluation.num_classes, row.noise, row.predictor, row.members, row.n)


def sweeps(evaluations: Iterable[Evaluation]) -> list[Sweep]:
    """Return every curve of at least three points that rows make, of one record or of several of a network.

    The clean images are the point at size 0.
    """
    lines: dict[tuple[Axis, _Scored, str], dict[float, Row]] = {}
    clean: dict[_Scored, Row] = {}
    for evaluation in evaluations:
        for row in evaluation.rows:
            scored = _Scored.of(evaluation, row)
            if row.attack == CLEAN:
                clean.setdefault(scored, row)
            for axis, at, rest in _places(row):
                lines.setdefault((axis, scored, rest), {}).setdefault(at, row)
    for (axis, scored, _), line in lines.items():
        if axis == "eps" and scored in clean:
            line.setdefault(0.0, clean[scored])
    return [
        Sweep(scored.model, axis, tuple(sorted(line)), tuple(line[at] for at in sorted(line)), scored.num_classes)
        for (axis, scored, _), line in lines.items()
        if len(line) >= FEWEST
    ]


def _places(row: Row) -> Iterator[tuple[Axis, float, str]]:
    """Yield each axis that the row stands on, where, and all else that was set, as text."""
    if row.attack_type is None:
        return
    for axis in _AXES:
        at = row.eps if axis == "eps" else row.parameters.get(axis)
        if isinstance(at, bool) or not isinstance(at, int | float):
            continue
        left_out = {axis, "seed", *_FOLLOWS.get(axis, ())}
        rest = {name: value for name, value in row.parameters.items() if name not in left_out}
        yield axis, float(at), json.dumps([row.attack_type, rest], sort_keys=True, default=str)
