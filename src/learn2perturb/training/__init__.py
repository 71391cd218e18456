"""Training: the loop, alternating back-propagation, checkpoints, recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learn2perturb.lazy import lazily
from learn2perturb.training.config import RECIPES, TrainConfig, load_recipe, read_config

if TYPE_CHECKING:
    from learn2perturb.training.loggers import Beginning, Logger
    from learn2perturb.training.loop import Run, train
    from learn2perturb.training.metrics import read_metrics

__all__ = [
    "RECIPES",
    "Beginning",
    "Logger",
    "Run",
    "TrainConfig",
    "load_recipe",
    "read_config",
    "read_metrics",
    "train",
]

__getattr__ = lazily(
    __name__,
    {
        "Beginning": "loggers", "Logger": "loggers", "Run": "loop", "read_metrics": "metrics", "train": "loop",
    },
)  # fmt: skip
