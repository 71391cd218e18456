"""Short names of attacks: a row that is called after all its settings is shown as what people call it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from learn2perturb.evaluation import Row

_FROM = " from "  # what a transferred attack says before its source
_NAMED = ("steps", "eot")  # settings that a short name has in any case


def short_names(rows: Iterable[Row]) -> dict[str, str]:
    """Return attack as a record names it -> short name, such as ``EOT-16 PGD-20``; no two have the same.

    A name without settings is short already. What two attacks differ in beyond the usual is added.
    """
    first = {row.attack: row for row in rows}
    short = {attack: _short(row) for attack, row in first.items()}
    for name in set(short.values()):
        same = [attack for attack, one in short.items() if one == name]
        if len(same) > 1:
            settings = {attack: _spelled(attack) for attack in same}
            shared = set.intersection(*(set(one) for one in settings.values()))
            for attack in same:
                own = [text for text in settings[attack] if text not in shared and text.split("=")[0] not in _NAMED]
                short[attack] = f"{name} ({', '.join(own)})" if own else name
    doubles = {name for name in short.values() if list(short.values()).count(name) > 1}
    return {attack: attack if name in doubles and attack != name else name for attack, name in short.items()}


def label(row: Row, names: Mapping[str, str]) -> str:
    """Return the label of a row with its short name."""
    return row.label.replace(row.attack, names.get(row.attack, row.attack), 1)


def _short(row: Row) -> str:
    head, colon, rest = row.attack.partition(":")
    if not colon or not all("=" in text for text in _spelled(row.attack)):
        return row.attack
    inner = row.parameters.get("attack")
    settings: Mapping[str, Any] = inner if isinstance(inner, Mapping) else row.parameters
    steps, eot = (settings.get(name) for name in _NAMED)
    averaged = f"EOT-{eot} " if isinstance(eot, int) and eot > 1 else ""
    source = rest[rest.index(_FROM) :] if _FROM in rest else ""
    return f"{averaged}{head}{f'-{steps}' if isinstance(steps, int) else ''}{source}"


def _spelled(attack: str) -> list[str]:
    """Return the settings that a name spells out."""
    return attack.partition(":")[2].partition(_FROM)[0].split(",")
