"""Training: the loop, alternating back-propagation, checkpoints, recipes."""

from learn2perturb.training.config import RECIPES, TrainConfig, load_recipe, read_config
from learn2perturb.training.load import load
from learn2perturb.training.loop import Run, choose_device, train
from learn2perturb.training.metrics import read_metrics

__all__ = [
    "RECIPES",
    "Run",
    "TrainConfig",
    "choose_device",
    "load",
    "load_recipe",
    "read_config",
    "read_metrics",
    "train",
]
