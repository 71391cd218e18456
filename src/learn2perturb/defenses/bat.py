"""BAT, boosted adversarial training (Pinot et al. 2020): a robust network, rarely one trained on its attacks.

Randomization matters. How to defend against strong adversarial attacks, https://arxiv.org/abs/2002.11565, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from learn2perturb.checks import check_count
from learn2perturb.defenses.base import Clock, Defense, Losses, Stage, objective_loss, training_adversary
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
from learn2perturb.errors import ConfigError


@final
@dataclass(frozen=True, kw_only=True)
class BAT(Defense):
    """The first member is trained adversarially; each further one on adversarial examples of those before it.

    Drawn are the members before with ``1 - weight`` and the new one with ``weight``. The epochs of the settings are
    shared out among the members, each with the whole schedule.

    Args:
        count: members.
        weight: chance of each member that is added, when it is added (0.1 in the paper).

    Raises:
        ConfigError: a value is not allowed.
    """

    objectives: ClassVar[tuple[str, ...]] = ()

    count: int = 2
    weight: float = 0.1

    def __post_init__(self) -> None:
        check_count("count", self.count, 2)
        number("weight", self.weight, 0.0, 1.0)
        if self.weight in (0, 1):
            raise ConfigError(f"weight is {self.weight!r}, so one member is never drawn; the paper has 0.1")

    def check(self, settings: Settings) -> None:
        """Refuse settings that make no sense with members trained one after the other.

        Raises:
            ConfigError: they do not.
        """
        super().check(settings)
        check_members_apart("BAT", settings)

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Make the network the first member, in place."""
        return with_members(network, self.count, input_shape)

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return a stage for each member."""
        return stages_of_members(settings, self.count)

    def chances(self, members: int) -> list[float]:
        """Return how likely each member is drawn when so many are trained; 0 for the others."""
        found = [1.0]
        for _ in range(members - 1):
            found = [*((1 - self.weight) * chance for chance in found), self.weight]
        return [*found, *[0.0] * (self.count - members)]

    def begin_step(self, model: nn.Module, clock: Clock) -> None:
        """Draw among the members that are trained, the present one included."""
        if begins(clock):
            choice_of(model).set_chances(self.chances(clock.stage + 1))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the recipe's loss of the first member, or the loss of a further one on attacks on those before it."""
        members = choice_of(model).members_in(model)
        if clock.stage == 0:
            return objective_loss(members[0], x, y, clock, settings)
        before = Mixture(members[: clock.stage], self.chances(clock.stage)[: clock.stage])
        return adversarial_loss(members[clock.stage], before, x, y, settings, training_adversary(settings))
