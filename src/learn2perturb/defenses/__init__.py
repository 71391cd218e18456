"""Defenses: each a frozen set of options and the few methods in which it differs from plain training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learn2perturb.defenses.settings import Settings
from learn2perturb.lazy import lazily

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

__getattr__ = lazily(__name__, dict.fromkeys(__all__, "base"))
