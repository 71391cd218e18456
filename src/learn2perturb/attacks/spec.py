"""Attacks from names and settings as they are written: on a command line, in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from learn2perturb.attacks import Attack, build_attack
from learn2perturb.attacks.balls import BALLS
from learn2perturb.errors import ConfigError
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
        stepped = "step_size" in settings and settings.get("norm", "linf") == "linf"
        if stepped and "eps" not in settings and _takes_size(name, "linf"):
            # A step is judged by the radius that it is for; those of presets are for 8/255, and shrink with it.
            settings = settings | {"eps": max(eps, LINF_EPS)}
        values = converted(settings, kinds_of(ATTACKS.entry(name).load()), f"attack {row!r}: ")
        try:
            attacks[row] = build_attack(name, **values)
        except ConfigError as error:
            raise ConfigError(f"attack {row!r}: {error}") from None
    return attacks


def attacks_of_size(
    specs: Mapping[str, tuple[str, dict[str, Any]]],
    own: Callable[[str], float],
    *,
    norm: str = "linf",
    asked: Sequence[float] = (),
    usual_steps: Container[str] = (),
) -> dict[str, Attack]:
    """Return row name -> attack, each in a norm of its own, ``norm``, or the one that it knows, and of a size in that.

    The one place that decides both, for verbs and studies: a size of one norm is never used in another.

    Args:
        specs: row name -> registered attack and settings, whose ``norm`` and ``eps`` stay.
        own: gives the size in a norm; called where an attack brings none and none is asked for.
        norm: of those that name none and know it.
        asked: sizes that whoever runs the attacks gives them: steps are judged by the largest, and no size is set.
        usual_steps: rows whose ``step_size`` is a preset's, made for l_inf; elsewhere it is what is usual there.

    Raises:
        ConfigError: a setting is unknown or not allowed, or a norm has no size.
    """
    found = {}
    for row, (name, settings) in specs.items():
        place = _norm_of(name, settings, norm)
        sized = _takes_size(name, place) and "eps" not in settings
        size = max(asked, default=None) if asked or not sized else own(place)
        if place != "linf" and place in BALLS:
            settings = {key: value for key, value in settings.items() if key != "step_size" or row not in usual_steps}
            settings["norm"] = place
        if sized and place != "linf":
            settings = {"eps": size, **settings}
        (attack,) = build_attacks({row: (name, settings)}, size or LINF_EPS).values()
        found[row] = attack if asked or not sized or size is None else attack.resized(size)
    return found


def _norm_of(name: str, settings: Mapping[str, Any], norm: str) -> str:
    """Return the norm that an attack is in where ``norm`` is that of those that name none."""
    kind = ATTACKS.entry(name).load()
    default = _default(name, "norm", "linf")
    known = norm in kind.norms and not kind.minimum_norm
    return str(settings.get("norm", norm if known else default))


def _takes_size(name: str, norm: str) -> bool:
    """Tell whether an attack has a radius that is anybody's choice: no number of pixels, and no norm to look for."""
    return norm in BALLS and _default(name, "eps", LINF_EPS) < math.inf


def _default(name: str, setting: str, otherwise: Any) -> Any:
    entry = ATTACKS.entry(name)
    fields = getattr(entry.load(), "__dataclass_fields__", {})
    return entry.arguments.get(setting, fields[setting].default if setting in fields else otherwise)
