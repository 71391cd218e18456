"""Defenses: each a frozen set of options and the few methods in which it differs from plain training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from learn2perturb.defenses.settings import Settings

if TYPE_CHECKING:
    from learn2perturb.defenses.base import (
        Alternation,
        Clock,
        Defense,
        Losses,
        Stage,
        build_defense,
        forward,
        learning_rate_factor,
        list_defenses,
        mixed_loss,
        objective_loss,
        prediction,
        sgd_optimizers,
        trades_loss,
        training_adversary,
    )

__all__ = [
    "Alternation",
    "Clock",
    "Defense",
    "Losses",
    "Settings",
    "Stage",
    "build_defense",
    "forward",
    "learning_rate_factor",
    "list_defenses",
    "mixed_loss",
    "objective_loss",
    "prediction",
    "sgd_optimizers",
    "trades_loss",
    "training_adversary",
]


def __getattr__(name: str) -> Any:
    # Lazy: ``settings`` is read by the command line, which does not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from learn2perturb.defenses import base

    value = getattr(base, name)
    globals()[name] = value
    return value
