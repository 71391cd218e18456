"""Training: the loop, alternating back-propagation, checkpoints, recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from learn2perturb.training.config import RECIPES, TrainConfig, load_recipe, read_config

if TYPE_CHECKING:
    from learn2perturb.training.loop import Run, train
    from learn2perturb.training.metrics import read_metrics

__all__ = [
    "RECIPES",
    "Run",
    "TrainConfig",
    "load_recipe",
    "read_config",
    "read_metrics",
    "train",
]

# What needs torch is imported when it is first asked for: the command line reads a config without it.
_LAZY = {"Run": "loop", "read_metrics": "metrics", "train": "loop"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
