"""Which pair another is compared with: the same cell of the baseline's run, of the same seed. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from learn2perturb.errors import ConfigError
from learn2perturb.experiments.spec import Pair, matches

_SAME = ("seed", "model", "dataset")


def partner(pair: Pair, baseline: Mapping[str, Any], pairs: Sequence[Pair]) -> Pair | None:
    """Return the pair that ``pair`` is compared with; None for the baseline itself, and where there is none.

    Of several runs with the labels of the baseline, the one that is most like: a baseline without gamma is that of
    every gamma, and a baseline with the same choice of gammas is taken gamma by gamma. Data and seed are the same, and
    the network, too, unless the baseline names it, or a run by its ``name``.

    Raises:
        ConfigError: several are equally like.
    """
    if matches(pair.run, baseline):
        return None
    free = {*baseline, *(("model",) if "name" in baseline else ())}
    kept = [key for key in _SAME if key not in free]
    cell = _cell(pair)
    found = [
        other for other in pairs
        if _cell(other) == cell and matches(other.run, baseline)
        and all(other.run.label(key) == pair.run.label(key) for key in kept)
    ]  # fmt: skip
    likeness = {id(other): _likeness(pair, other, baseline) for other in found}
    best = [other for other in found if likeness[id(other)] == max(likeness.values())]
    if len({id(other.run) for other in best}) > 1:
        names = ", ".join(other.run.title for other in best)
        raise ConfigError(f"its baseline is each of {names} for {pair.title}; add labels to baseline until it is one")
    return best[0] if best else None


def _cell(pair: Pair) -> tuple[str, str]:
    return pair.cell.title, str(pair.label("source"))


def _likeness(pair: Pair, other: Pair, baseline: Mapping[str, Any]) -> int:
    keys = {*pair.run.axes, *other.run.axes} - set(baseline)
    return sum(pair.run.label(key) == other.run.label(key) for key in keys)
