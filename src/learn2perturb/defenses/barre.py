"""BARRE (Dbouk, Shanbhag 2023): members trained one after the other against attacks on all of them so far.

On the Robustness of Randomized Ensembles to Adversarial Perturbations, https://arxiv.org/abs/2302.01375.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.attacks import ARC
from learn2perturb.checks import check_count
from learn2perturb.defenses.base import Clock, Defense, Losses, Stage, training_adversary
from learn2perturb.defenses.ensembles import (
    Mixture,
    adversarial_loss,
    begins,
    check_members_apart,
    choice_of,
    stages_of_members,
    with_members,
)
from learn2perturb.defenses.settings import Settings, number
from learn2perturb.engine.finite import Members, answers_right
from learn2perturb.engine.modes import in_mode
from learn2perturb.engine.rows import mean_of_rows
from learn2perturb.errors import ConfigError


@final
@dataclass(frozen=True, kw_only=True)
class BARRE(Defense):
    """Each member starts from the one before it and descends its loss on attacks on the mean of all so far.

    Members are drawn with equal chance, until the last ``osp_steps`` steps of the training choose the chances: a
    projected subgradient step on each batch, ``p <- simplex(p - lr_t e)``, e the members' errors on images by ARC and
    ``lr_t = osp_lr / t``. The epochs of the settings are shared out among the members, each with the whole schedule.

    Args:
        count: members; 5 in the paper.
        osp_steps: batches on which the chances are chosen; 0 leaves them equal.
        osp_lr: first length of a step of the chances.
        arc_steps: rounds of ARC for it.

    Raises:
        ConfigError: a value is not allowed.
    """

    objectives: ClassVar[tuple[str, ...]] = ()

    count: int = 5
    osp_steps: int = 10
    osp_lr: float = 0.1
    arc_steps: int = 10

    def __post_init__(self) -> None:
        check_count("count", self.count, 2)
        check_count("osp_steps", self.osp_steps, 0)
        check_count("arc_steps", self.arc_steps)
        number("osp_lr", self.osp_lr, 0.0, math.inf)

    def check(self, settings: Settings) -> None:
        """Refuse settings that make no sense with members trained one after the other.

        Raises:
            ConfigError: they do not.
        """
        super().check(settings)
        check_members_apart("BARRE", settings)
        if settings.adversarial_delay:
            raise ConfigError(
                f"adversarial_delay is {settings.adversarial_delay!r}, but BARRE has no clean loss to begin with; set 0"
            )
        if settings.accumulate > 1:
            raise ConfigError(
                f"accumulate is {settings.accumulate!r}, but BARRE moves its chances once a batch; leave it out"
            )

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Make the network the first member, in place."""
        return with_members(network, self.count, input_shape)

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return a stage for each member."""
        return stages_of_members(settings, self.count)

    def begin_step(self, model: nn.Module, clock: Clock) -> None:
        """Where a stage begins: draw among the members so far, and start the new one from the one before it."""
        if not begins(clock):
            return
        choice, trained = choice_of(model), clock.stage + 1
        choice.set_chances([1 / trained] * trained + [0.0] * (self.count - trained))
        if clock.stage:
            source = choice.others[clock.stage - 2] if clock.stage > 1 else model
            state = source.state_dict()
            new = choice.others[clock.stage - 1]
            new.load_state_dict({key: state[key] for key in new.state_dict()})

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the loss of the present member on attacks on the mean of all so far."""
        choice, trained = choice_of(model), clock.stage + 1
        members = choice.members_in(model)[:trained]
        target = Mixture(members, [1 / trained] * trained)
        losses = adversarial_loss(members[-1], target, x, y, settings, training_adversary(settings))
        left = (settings.epochs - clock.epoch) * clock.batches - clock.batch  # steps, this one included
        if left <= self.osp_steps and trained > 1:
            self._choose(model, x, y, settings, self.osp_steps - left + 1)
        return losses

    def _choose(self, model: nn.Module, x: Tensor, y: Tensor, settings: Settings, step: int) -> None:
        """Move the chances against the members' errors on images by ARC."""
        choice = choice_of(model)
        x_adv = ARC(settings.eps, steps=self.arc_steps, norm=settings.norm).craft(model, x, y)
        with in_mode(model, False):
            right = answers_right(Members(choice.members_in(model), choice.probabilities), x_adv, y)
        errors = 1 - mean_of_rows(right.to(choice.chances.dtype))
        trained = choice.chances > 0
        chances = onto_simplex((choice.chances - self.osp_lr / step * errors)[trained])
        choice.chances[trained] = chances


def onto_simplex(point: Tensor) -> Tensor:
    """Return the point of the probability simplex nearest to ``point`` (K,)."""
    ordered = point.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(point) + 1, device=point.device)
    last = int((ordered > excess).nonzero()[-1])
    return (point - excess[last]).clamp_min(0.0)
