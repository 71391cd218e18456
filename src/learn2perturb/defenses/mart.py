"""MART (Wang et al. 2020): adversarial training that looks hardest at images which are wrong while they are clean.

Improving Adversarial Robustness Requires Revisiting Misclassified Examples, https://openreview.net/forum?id=rklOg6EFwS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.defenses.base import Clock, Defense, Losses, check_adversary, forward, training_adversary
from learn2perturb.defenses.objectives import clean_loss, kl_divergence, label_loss, losses_of_pair, mode_of_attack
from learn2perturb.defenses.settings import Settings, number


@final
@dataclass(frozen=True, kw_only=True)
class MART(Defense):
    """``BCE(p(x'), y) + kl_weight KL(p(x) || p(x')) (1 - p_y(x))``, mean over images (table 1); x' by PGD on CE.

    ``BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k)``. The adversary climbs the cross-entropy with the true labels,
    and every gradient goes through p(x) too. Before ``adversarial_delay`` it is the clean loss alone.

    Args:
        kl_weight: lambda of the paper; 5 in its code for ResNet-18.

    Raises:
        ConfigError: a value is not allowed.
    """

    objectives: ClassVar[tuple[str, ...]] = ()

    kl_weight: float = 5.0

    def __post_init__(self) -> None:
        number("kl_weight", self.kl_weight, 0.0, math.inf)

    def check(self, settings: Settings) -> None:
        """Refuse an adversary that does not move.

        Raises:
            ConfigError: ``eps`` is 0.
        """
        super().check(settings)
        check_adversary("MART", settings)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the objective on one batch; the attack comes first, as in the released code."""
        if clock.epoch < settings.adversarial_delay:
            return clean_loss(model, x, y, settings)
        x_adv = training_adversary(settings).craft(model, x, y, mode=mode_of_attack(settings))
        logits, adv_logits = forward(model, x), forward(model, x_adv)
        right = torch.softmax(logits, dim=1).gather(1, y[:, None]).squeeze(1)
        boosted = label_loss(adv_logits, y, settings) + margin_loss(adv_logits, y).mean()
        divergence = (kl_divergence(adv_logits, logits) * (1 - right)).mean()
        return losses_of_pair(boosted + self.kl_weight * divergence, logits, adv_logits, y)


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return ``-log(1 - max_{k != y} p_k)`` of each row, shape (N,), p the softmax of ``logits`` (N, K).

    From logits, as ``logsumexp(z) - logsumexp(z without its largest wrong one)``: 1 - p underflows, and its log with
    it. The released code adds 1e-4 to the difference instead.
    """
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, y[:, None], True)
    rival = logits.masked_fill(own, -torch.inf).argmax(1, keepdim=True)
    rest = logits.masked_fill(torch.zeros_like(own).scatter_(1, rival, True), -torch.inf)
    return torch.logsumexp(logits, dim=1) - torch.logsumexp(rest, dim=1)
