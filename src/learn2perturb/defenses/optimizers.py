"""Optimisers of weights and noise, and what their learning rate does over a training: functions of the clock alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from learn2perturb.defenses.objectives import Clock
from learn2perturb.defenses.settings import OPTIMIZERS, Settings
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.noise import noise_parameters

Optimizers = dict[str, torch.optim.Optimizer]
# What other settings say, or the execution mode.
_NO_OPTIONS = ("self", "params", "lr", "weight_decay", "momentum", "nesterov", "foreach", "fused", "capturable")


def warmed(settings: Settings, factor: Callable[[Clock], float]) -> Callable[[Clock], float]:
    """Return ``factor`` with the warm-up of ``settings`` before it: a line from 0 over the first epochs."""
    length = settings.warmup_epochs
    if not length:
        return factor

    def rising(clock: Clock) -> float:
        done = clock.epoch + (clock.batch + 1) / clock.batches
        return factor(clock) * min(done / length, 1.0)

    return rising


def learning_rate_factor(settings: Settings, total_epochs: int) -> Callable[[Clock], float]:
    """Return the schedule of ``settings`` over ``total_epochs``: a function of the clock alone, without state."""

    def factor(clock: Clock) -> float:
        if settings.schedule == "step":
            passed = sum(clock.stage_epoch >= milestone for milestone in settings.milestones)
            return float(settings.decay**passed)
        done = (clock.stage_epoch + (clock.batch + 1) / clock.batches) / max(total_epochs, 1)
        if settings.schedule == "one_cycle":
            rise = 0.3
            return max(min(done / rise, (1 - done) / (1 - rise)), 1e-3)
        if settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return 1.0

    return warmed(settings, factor)


def sgd_optimizers(
    settings: Settings, *, noise_lr: float = 1.0, noise_decay: float = 0.0
) -> Callable[[nn.Module], Optimizers]:
    """Return a builder of the optimiser that ``settings`` name, SGD by default, for the weights and for learned noise.

    There is no weight decay on theta. ``noise_lr`` is what the learning rate of the noise is multiplied by,
    ``noise_decay`` its weight decay.

    Raises:
        UnknownNameError: the optimiser has no such option.
    """
    kind, common = _named(settings)

    def build(model: nn.Module) -> Optimizers:
        noise = noise_parameters(model)
        known = {id(parameter) for parameter in noise}
        weights = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        if not weights:
            raise ConfigError("the network has no parameter that requires a gradient; there is nothing to train")
        optimizers: Optimizers = {"weights": _made(kind, weights, settings.weight_decay, common)}
        if noise:
            own = {**common, "lr": common["lr"] * noise_lr}
            optimizers["noise"] = _made(kind, noise, noise_decay, own)
        return optimizers

    return build


def _named(settings: Settings) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """Return the class of the optimiser, and what weights and noise share."""
    kind = getattr(torch.optim, OPTIMIZERS[settings.optimizer])
    allowed = set(inspect.signature(kind).parameters)
    common: dict[str, Any] = {"lr": settings.lr}
    common |= {name: getattr(settings, name) for name in ("momentum", "nesterov") if name in allowed}
    for name, value in settings.optimizer_options.items():
        if name not in allowed.difference(_NO_OPTIONS):
            known = sorted(allowed.difference(_NO_OPTIONS)) or ["(it has none)"]
            raise UnknownNameError.of(f"option of optimizer {settings.optimizer!r}:", name, known)
        common[name] = tuple(value) if isinstance(value, list) else value
    return kind, common


def _made(
    kind: Callable[..., torch.optim.Optimizer], parameters: list[nn.Parameter], decay: float, common: dict[str, Any]
) -> torch.optim.Optimizer:
    try:
        return kind(parameters, weight_decay=decay, **common)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the optimizer refuses its options ({error}); change optimizer_options") from None
