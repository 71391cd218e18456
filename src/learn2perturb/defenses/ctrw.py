"""CTRW, constrained trainable random weights (Ma, Dong, Xu 2023): the image times random weights that are learned.

Adversarial Robustness through Random Weight Sampling, NeurIPS 2023.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import nn

from learn2perturb.checks import check_choice
from learn2perturb.defenses.base import Clock, Defense, Stage, sgd_optimizers
from learn2perturb.defenses.settings import Settings, number
from learn2perturb.errors import SiteError
from learn2perturb.noise import RandomGain, insert, noise_modules
from learn2perturb.noise.base import SHARINGS
from learn2perturb.noise.sites import check, convolutions, probe


@final
@dataclass(frozen=True, kw_only=True)
class CTRW(Defense):
    """``v (mu + sigma eps)`` on what the first convolution takes, mu and sigma learned for each element of it.

    sigma is held to at least ``least``, which is the constraint; mu and sigma start at 1, and have the weight decay of
    the weights. With the noise off it is ``v mu``.

    Args:
        least: lower bound of sigma: the paper's code bounds the sum over 3,072 elements by 2,048.
        sharing: ``per_batch``, one draw a pass as released, or ``per_example``.

    Raises:
        ConfigError: a value is not allowed.
    """

    least: float = 2 / 3
    sharing: str = "per_batch"

    def __post_init__(self) -> None:
        number("least", self.least, 0.0, 1.0)
        check_choice("sharing", self.sharing, SHARINGS)

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Insert the random weights before the first convolution that is called, in place.

        Raises:
            SiteError: there is no convolution, or the first is called more than once in a pass.
        """
        seen = probe(network, input_shape)
        names = convolutions(seen)
        if not names:
            raise SiteError("the network has no convolution, and CTRW's weights go before the first; use learn2perturb")
        spec = {
            "kind": RandomGain.kind, "site": names[0], "place": "input", "sharing": self.sharing, "least": self.least,
            "feature_shape": check(names[0], seen, "input")[0],
        }  # fmt: skip
        return insert(network, [spec])

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return one stage of SGD, with weight decay on mu and sigma too."""
        optimizers = sgd_optimizers(settings, noise_decay=settings.weight_decay)
        return tuple(replace(stage, optimizers=optimizers) for stage in super().stages(settings))

    def after_step(self, model: nn.Module, clock: Clock) -> None:
        """Hold sigma to its bound."""
        for module in noise_modules(model):
            module.project()
