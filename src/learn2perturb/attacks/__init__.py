"""Attacks: frozen specs, called as ``attack(model, x, y)`` on any callable that maps images in [0, 1] to logits."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from learn2perturb.attacks.apgd import APGD
from learn2perturb.attacks.arc import ARC
from learn2perturb.attacks.auto_attack import AutoAttack, AutoAttackReport, auto_attack_report
from learn2perturb.attacks.base import Attack, AttackResult
from learn2perturb.attacks.bpda import BPDA, bpda
from learn2perturb.attacks.cw import CW
from learn2perturb.attacks.export import to_adv_lib, to_art, to_foolbox, to_torchattacks
from learn2perturb.attacks.fab import FAB
from learn2perturb.attacks.few_pixel import FewPixel
from learn2perturb.attacks.fgsm import FGSM
from learn2perturb.attacks.foreign import from_adv_lib, from_art, from_foolbox, from_function, from_torchattacks
from learn2perturb.attacks.pgd import PGD
from learn2perturb.attacks.rays import RayS
from learn2perturb.attacks.spsa import SPSA
from learn2perturb.attacks.square import Square
from learn2perturb.attacks.surrogate import Surrogate, distil
from learn2perturb.attacks.transfer import Source, Transfer
from learn2perturb.errors import ConfigError
from learn2perturb.registry import ATTACKS

__all__ = [
    "APGD",
    "ARC",
    "BPDA",
    "CW",
    "FAB",
    "FGSM",
    "PGD",
    "SPSA",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "AutoAttackReport",
    "FewPixel",
    "Source",
    "RayS",
    "Square",
    "Surrogate",
    "Transfer",
    "auto_attack_report",
    "bpda",
    "build_attack",
    "distil",
    "list_attacks",
    "from_adv_lib",
    "from_art",
    "from_foolbox",
    "from_function",
    "from_torchattacks",
    "to_adv_lib",
    "to_art",
    "to_foolbox",
    "to_torchattacks",
]


def list_attacks(pattern: str = "*") -> list[str]:
    """Return the registered names that match the glob ``pattern``."""
    return ATTACKS.names(pattern)


def build_attack(name: str, **settings: Any) -> Attack:
    """Return the attack registered as ``name`` with these settings, e.g. ``build_attack("pgd", steps=20, eot=10)``.

    Raises:
        UnknownNameError: no attack has that name.
        ConfigError: a setting is unknown to the attack, or its value is not allowed.
    """
    entry = ATTACKS.entry(name)
    attack = entry.load()
    known = {item.name: item for item in fields(attack)}  # without the class's own constants
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise ConfigError(f"attack {name!r} has no setting {', '.join(map(repr, unknown))}; it has: {', '.join(known)}")
    built: Attack = attack(**{**entry.arguments, **settings})
    return built
