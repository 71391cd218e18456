"""Attacks: frozen specs, called as ``attack(model, x, y)`` on any callable that maps images in [0, 1] to logits."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from learn2perturb.attacks.base import Attack, AttackResult
from learn2perturb.attacks.fgsm import FGSM
from learn2perturb.attacks.pgd import PGD
from learn2perturb.errors import ConfigError
from learn2perturb.registry import ATTACKS

__all__ = ["FGSM", "PGD", "Attack", "AttackResult", "build_attack", "list_attacks"]


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
