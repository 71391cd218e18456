"""Attacks from names and settings as they are written: on a command line, in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from learn2perturb.attacks import Attack, build_attack
from learn2perturb.errors import ConfigError
from learn2perturb.presets import PRESETS
from learn2perturb.registry import ATTACKS
from learn2perturb.sizes import LINF_EPS
from learn2perturb.values import converted, kinds_of


def build_attacks(specs: Mapping[str, tuple[str, dict[str, Any]]], eps: float = LINF_EPS) -> dict[str, Attack]:
    """Return row name -> attack; ``eps`` is the l_inf radius of those that bring none.

    Raises:
        ConfigError: a setting is unknown or not allowed.
    """
    attacks = {}
    for row, (name, settings) in specs.items():
        if "step_size" in settings and "eps" not in settings and settings.get("norm", "linf") == "linf":
            # A step is judged by the radius that it is for; those of presets are for 8/255, and shrink with it.
            settings = settings | {"eps": max(eps, LINF_EPS)}
        values = converted(settings, kinds_of(ATTACKS.entry(name).load()), f"attack {row!r}: ")
        try:
            attacks[row] = build_attack(name, **values)
        except ConfigError as error:
            raise ConfigError(f"attack {row!r}: {error}") from None
    return attacks


def in_norm(
    specs: Mapping[str, tuple[str, dict[str, Any]]], norm: str, eps: float
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return attacks in ``norm`` with the radius ``eps``, where they know that norm and do not name another.

    The steps of presets are made for l_inf; in another norm they are what is usual for the radius.
    """
    if norm == "linf":
        return dict(specs)
    found = {}
    for row, (name, settings) in specs.items():
        kind = ATTACKS.entry(name).load()
        if "norm" not in settings and norm in kind.norms and not kind.minimum_norm:
            kept = {key: value for key, value in settings.items() if key != "step_size" or row not in PRESETS}
            settings = {"eps": eps} | kept | {"norm": norm}
        found[row] = (name, settings)
    return found


def attacks_of_size(
    specs: Mapping[str, tuple[str, dict[str, Any]]], own: float, *, asked: Sequence[float] = ()
) -> dict[str, Attack]:
    """Return row name -> attack of the size ``own`` where it brings none.

    With ``asked``, sizes that whoever runs the attacks gives them, steps are judged by the largest and no size is set.

    Raises:
        ConfigError: a setting is unknown or not allowed.
    """
    attacks = build_attacks(specs, max(asked, default=own))
    if asked:
        return attacks
    return {
        name: attack if "eps" in specs[name][1] or not attack.sized else attack.resized(own)
        for name, attack in attacks.items()
    }
