"""Defenses: each a frozen set of options and the few methods in which it differs from plain training."""

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
    sgd_optimizers,
    training_adversary,
)
from learn2perturb.defenses.settings import Settings

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
    "sgd_optimizers",
    "training_adversary",
]
