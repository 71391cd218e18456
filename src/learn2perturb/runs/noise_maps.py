"""What a run folder says of the scale of its noise, place by place: small maps that a page can show. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from learn2perturb.errors import CheckpointError
from learn2perturb.records import Saved

FILE = "noise.json"  # in a run folder
MOST_SIDE, MOST_STRIP = 16, 64  # of a map, and of a single row
_DIGITS = 5

Values = NDArray[np.floating[Any]]


@final
@dataclass(frozen=True)
class NoiseMap:
    """The scale of the noise at one site: four numbers of all of it, and a map of ``rows`` by ``columns``.

    ``shape`` is that of the scale itself, ``averaged`` says over what the map is a mean, in words.
    """

    symbol: str
    site: str
    shape: tuple[int, ...]
    mean: float
    spread: float
    minimum: float
    maximum: float
    rows: str
    columns: str
    averaged: str
    values: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, symbol: str, site: str, scale: Values) -> NoiseMap:
        """Return the map of a ``scale`` of any shape: of features (C, H, W) or (C, 1, 1), of a weight, or one number."""
        whole = np.asarray(scale, dtype=np.float64)
        rows, columns, over, plane = _plane(whole)
        small = _blocks(plane, 1 if len(plane) == 1 else MOST_SIDE, MOST_STRIP if len(plane) == 1 else MOST_SIDE)
        averaged = [*([over] if over else []), *(["blocks"] if small.shape != plane.shape else [])]
        return cls(
            symbol, site, whole.shape,
            mean=_short(whole.mean()), spread=_short(whole.std()),
            minimum=_short(whole.min()), maximum=_short(whole.max()),
            rows=rows, columns=columns, averaged=" and ".join(averaged),
            values=tuple(tuple(map(_short, row)) for row in small),
        )  # fmt: skip


@final
@dataclass(frozen=True)
class NoiseMaps(Saved):
    """The maps of all sites of a trained network, and the fingerprint of its weights; files of before have none."""

    FORMAT: ClassVar[str] = "learn2perturb.noise"
    VERSION: ClassVar[int] = 1

    sites: tuple[NoiseMap, ...]
    weights: str | None = None

    @classmethod
    def of(cls, scales: Mapping[str, Values], weights: str | None = None) -> NoiseMaps:
        """Return the maps of ``symbol/site`` -> scale, in a network of these ``weights``."""
        named = ((*name.partition("/"), scale) for name, scale in scales.items() if scale.size)
        return cls(tuple(NoiseMap.of(symbol, site, scale) for symbol, _, site, scale in named), weights)

    def _check(self) -> None:
        for one in self.sites:
            numbers = [one.mean, one.spread, one.minimum, one.maximum, *(value for row in one.values for value in row)]
            if not one.values or len({len(row) for row in one.values}) != 1 or not one.values[0]:
                raise CheckpointError(f"the map of {one.site!r} has no rows of one length; train again")
            if len(one.values) > MOST_SIDE or len(one.values[0]) > MOST_STRIP:
                raise CheckpointError(f"the map of {one.site!r} is larger than {MOST_SIDE} by {MOST_STRIP}; train again")
            if not all(map(math.isfinite, numbers)):
                raise CheckpointError(f"the map of {one.site!r} has values that are not finite; train again")


def _plane(whole: Values) -> tuple[str, str, str, Values]:
    """Return names of rows and columns, what is averaged over, and the values in two dimensions."""
    if whole.ndim == 3 and math.prod(whole.shape[1:]) > 1:
        return "row", "column", "channels", whole.mean(axis=0)
    if whole.ndim == 2 and min(whole.shape) > 1:
        return "first index", "second index", "", whole
    if whole.ndim > 3 and math.prod(whole.shape[1:]) > 1:
        return "output", "input", "the kernel", whole.mean(axis=tuple(range(2, whole.ndim)))
    return "", "channel", "", whole.reshape(1, -1)


def _blocks(plane: Values, rows: int, columns: int) -> Values:
    """Return the means of ``rows`` by ``columns`` blocks at most, of nearly equal sizes."""
    for axis, most in enumerate((rows, columns)):
        if plane.shape[axis] > most:
            parts = np.array_split(plane, most, axis=axis)
            plane = np.stack([part.mean(axis=axis) for part in parts], axis=axis)
    return plane


def _short(value: Any) -> float:
    return float(f"{float(value):.{_DIGITS}g}")
