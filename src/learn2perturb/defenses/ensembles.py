"""Random ensembles trained member after member: BAT (Pinot et al. 2020) and BARRE (Dbouk, Shanbhag 2023).

Pinot et al., Randomization matters. How to defend against strong adversarial attacks, https://arxiv.org/abs/2002.11565;
Dbouk, Shanbhag, On the Robustness of Randomized Ensembles to Adversarial Perturbations,
https://arxiv.org/abs/2302.01375.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from learn2perturb.defenses.base import Clock, Losses, Optimizers, Stage, forward, learning_rate_factor, sgd_optimizers
from learn2perturb.defenses.objectives import label_loss, mode_of_attack
from learn2perturb.defenses.settings import Settings
from learn2perturb.errors import ConfigError
from learn2perturb.noise import RandomMember, insert, random_members


def with_members(network: nn.Module, count: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Make ``network`` the first of ``count`` members, in place, and return it; only it is drawn at first.

    Raises:
        SiteError: it has noise on its output already.
    """
    spec = {"kind": RandomMember.kind, "site": "", "feature_shape": tuple(input_shape), "count": count}
    return insert(network, [spec])


def choice_of(model: nn.Module) -> RandomMember:
    """Return what draws among the members of ``model``.

    Raises:
        ConfigError: it has none.
    """
    found = random_members(model)
    if found is None:
        raise ConfigError("the network is no random ensemble; prepare a plain network with the defense")
    return found


def check_members_apart(name: str, settings: Settings) -> None:
    """Refuse averaged weights: an average over steps of several members is of none, nor are its chances.

    Raises:
        ConfigError: ``weight_average`` is set.
    """
    if settings.weight_average:
        raise ConfigError(
            f"weight_average is {settings.weight_average!r}, but {name} trains its members one after the other, and an "
            "average over all steps is none of them; leave it out"
        )


def stages_of_members(settings: Settings, count: int) -> tuple[Stage, ...]:
    """Return a stage for each member: equal shares of the epochs, rounded up, each with the whole schedule.

    With fewer epochs than members the last members have no stage; they are never drawn.
    """
    epochs = settings.epochs
    edges = [0, *(-(-epochs * done // count) for done in range(1, count + 1))]
    found = []
    for number, length in enumerate(end - start for start, end in itertools.pairwise(edges)):
        if length or not number:
            milestones = [round(milestone * length / max(epochs, 1)) for milestone in settings.milestones]
            own = replace(settings, epochs=length, milestones=milestones)
            found.append(Stage(length, _of_member(settings, number), learning_rate_factor(own, length)))
    return tuple(found)


def _of_member(settings: Settings, number: int) -> Callable[[nn.Module], Optimizers]:
    """Return a builder of SGD for the weights of one member."""

    def build(model: nn.Module) -> Optimizers:
        choice = choice_of(model)
        others = {id(parameter) for parameter in choice.parameters()}
        member = _Part([p for p in model.parameters() if id(p) not in others])
        return sgd_optimizers(settings)(choice.others[number - 1] if number else member)

    return build


@final
class _Part(nn.Module):
    """The parameters of a part of a network."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)


@final
class Mixture(nn.Module):
    """The log of the members' mean softmax under given probabilities: what attacks on an ensemble climb in training."""

    def __init__(self, members: Sequence[nn.Module], probabilities: Sequence[float]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = list(probabilities)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to log-probabilities (N, K)."""
        each = [
            torch.log_softmax(forward(member, x), dim=1) + math.log(weight)
            for member, weight in zip(self.members, self.weights, strict=True)
        ]
        return torch.logsumexp(torch.stack(each), dim=0)


def adversarial_loss(
    member: nn.Module, target: nn.Module, x: Tensor, y: Tensor, settings: Settings, attack: Any
) -> Losses:
    """Return ``CE(member(x'), y)``, x' by ``attack`` on ``target``."""
    x_adv = attack.craft(target, x, y, mode=mode_of_attack(settings))
    logits = forward(member, x_adv)
    loss = label_loss(logits, y, settings)
    return Losses(loss, adversarial=loss.detach(), adversarial_correct=logits.detach().argmax(1) == y)


def begins(clock: Clock) -> bool:
    """Tell whether a stage begins at ``clock``."""
    return clock.stage_epoch == 0 and clock.batch == 0
