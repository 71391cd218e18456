"""HAT (Rade, Moosavi-Dezfooli 2022): TRADES, and examples beyond x' that keep its margin from growing without need.

Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off,
https://openreview.net/forum?id=Azh9QBQ4tR7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from learn2perturb.defenses.base import Clock, Defense, Losses, Optimizers, Stage, check_adversary, forward
from learn2perturb.defenses.objectives import (
    clean_loss,
    kl_divergence,
    label_loss,
    losses_of_pair,
    mode_of_attack,
    trades_adversary,
)
from learn2perturb.defenses.settings import Settings, number
from learn2perturb.engine.frozen import left_in_eval, train_but
from learn2perturb.engine.modes import in_mode
from learn2perturb.engine.weights import copied
from learn2perturb.errors import ConfigError
from learn2perturb.models.weights import load_weights


@final
@dataclass(frozen=True)
class _Helper:
    """The standard network: what it is, whether it learns, and what of it stays in eval mode."""

    network: nn.Module
    learns: bool
    frozen: list[nn.Module] = field(default_factory=list)

    @torch.no_grad()
    def labels(self, x: Tensor) -> Tensor:
        """Return the label (N,) that it gives each image, in eval mode."""
        with in_mode(self.network, False):
            return forward(self.network, x).argmax(1)

    def taught(self, losses: Losses, x: Tensor, y: Tensor, settings: Settings) -> Losses:
        """Return ``losses`` with its own clean loss added, of other weights, if it learns."""
        if not self.learns:
            return losses
        train_but(self.network, self.frozen)
        own = label_loss(forward(self.network, x), y, settings)
        return replace(losses, total=losses.total + own, extra={"helper_loss": own.detach()})


# Beside the network and no part of it: what is trained is saved, loaded and attacked without its helper.
_HELPERS: WeakKeyDictionary[nn.Module, _Helper] = WeakKeyDictionary()


@final
@dataclass(frozen=True, kw_only=True)
class HAT(Defense):
    """``CE(f(x), y) + kl_weight KL(p(x) || p(x')) + helper_weight CE(f(x + reach r), h(x'))``, ``r = x' - x``.

    x' is the maximiser of that KL in the ball, as in TRADES, and h(x') the label that a standard network, the helper,
    gives it (algorithm 1). The helper is a copy of the network as it begins, trained beside it on the clean images by
    the same optimiser and schedule, or the network of ``helper``. It is in ``resume.pt`` and not in the trained
    network. Before ``adversarial_delay`` both train on clean images alone.

    Args:
        helper: file of weights of a standard-trained network of this architecture, such as the ``model.safetensors``
            of a run of ``none``; it stays as it is. None: one is trained beside the network.
        reach: how far the helper example is, in units of r.
        kl_weight: weight of the KL.
        helper_weight: weight of the helper examples.

    Raises:
        ConfigError: a value is not allowed.
    """

    objectives: ClassVar[tuple[str, ...]] = ()

    helper: str | None = None
    reach: float = 2.0
    kl_weight: float = 2.5
    helper_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("reach", "kl_weight", "helper_weight"):
            number(name, getattr(self, name), 0.0, math.inf)
        if self.helper is not None and not isinstance(self.helper, str):
            raise ConfigError(f"helper is {self.helper!r}; give a file of weights, or leave it out")

    def check(self, settings: Settings) -> None:
        """Refuse an adversary that does not move.

        Raises:
            ConfigError: ``eps`` is 0.
        """
        super().check(settings)
        check_adversary("HAT", settings)

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Give ``network`` its helper, and return it as it is.

        Raises:
            CheckpointError: the file of ``helper`` does not fit.
        """
        helper, learns = copied(network), self.helper is None
        frozen = left_in_eval(helper)
        if self.helper is not None:
            load_weights(helper, self.helper)
            helper.requires_grad_(False)
        _HELPERS[network] = _Helper(helper, learns, frozen)
        return network

    def beside(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the helper."""
        return {"helper": _helper_of(model).network}

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return one stage in which the helper, if it learns, has an optimiser of its own, and the same schedule."""
        (stage,) = super().stages(settings)

        def build(model: nn.Module) -> Optimizers:
            helper = _helper_of(model)
            own = {"helper": stage.optimizers(helper.network)["weights"]} if helper.learns else {}
            return {**stage.optimizers(model), **own}

        return (Stage(stage.epochs, build, stage.factor),)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the objective on one batch, and with it the helper's own clean loss, of other weights."""
        helper = _helper_of(model)
        if clock.epoch < settings.adversarial_delay:
            return helper.taught(clean_loss(model, x, y, settings), x, y, settings)
        x_adv = trades_adversary(settings).craft(model, x, y, mode=mode_of_attack(settings))
        labels = helper.labels(x_adv)
        beyond = x + self.reach * (x_adv - x)
        logits, adv_logits, far_logits = forward(model, x), forward(model, x_adv), forward(model, beyond)
        total = label_loss(logits, y, settings) + self.kl_weight * kl_divergence(adv_logits, logits).mean()
        total = total + self.helper_weight * label_loss(far_logits, labels, settings)
        return helper.taught(losses_of_pair(total, logits, adv_logits, y), x, y, settings)


def _helper_of(model: nn.Module) -> _Helper:
    """Return the helper of ``model``.

    Raises:
        ConfigError: it has none.
    """
    found = _HELPERS.get(model)
    if found is None:
        raise ConfigError("the network has no helper; prepare it with the defense, and train that very network")
    return found
