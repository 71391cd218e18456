"""RSE, random self-ensemble (Liu, Cheng, Zhang, Hsieh 2018): fixed Gaussian noise before every convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from learn2perturb.checks import check_flag
from learn2perturb.defenses.base import (
    Clock,
    Defense,
    Losses,
    Stage,
    check_without_adversary,
    mixed_loss,
    of_clean_images,
    restarted_stages,
    sgd_optimizers,
)
from learn2perturb.defenses.settings import OBJECTIVES, Settings, number
from learn2perturb.errors import SiteError
from learn2perturb.noise import perturb
from learn2perturb.noise.sites import convolutions, probe


@final
@dataclass(frozen=True, kw_only=True)
class RSE(Defense):
    """``h <- h + sigma * eps`` before every convolution, those of shortcuts too, in training and in inference.

    eps is drawn for each element of each example. Sigma is fixed, so the network learns to live with it; the answer is
    the softmax summed over draws. The paper trains on clean images and does not normalise them, so that
    ``sigma_init`` is a standard deviation in [0, 1] pixel scale: the recipes of ``rse`` build the network without
    normalisation, and for a network of your own that has one, sigma is in the units after it.

    Args:
        sigma_init: standard deviation before the first convolution that is called.
        sigma_inner: standard deviation before all others.
        adversarial: train on the recipe's adversary too, which the paper does not (``rse_at``).
        restarts: start each stage of a ``step`` schedule with a fresh optimiser, whose momentum is zero, as the
            released code does.

    Raises:
        ConfigError: a sigma is not a number, or below 0.
    """

    predictor: ClassVar[str] = "mean_probability"
    members: ClassVar[int] = 50
    objectives: ClassVar[tuple[str, ...]] = OBJECTIVES

    sigma_init: float = 0.2
    sigma_inner: float = 0.1
    adversarial: bool = False
    restarts: bool = False

    def __post_init__(self) -> None:
        for name in ("sigma_init", "sigma_inner"):
            number(name, getattr(self, name), 0.0, math.inf)
        for name in ("adversarial", "restarts"):
            check_flag(name, getattr(self, name))

    def check(self, settings: Settings) -> None:
        """Refuse an objective with an adversary where there is none.

        Raises:
            ConfigError: ``objective`` or ``awp`` needs one.
        """
        super().check(settings)
        if not self.adversarial:
            check_without_adversary("RSE", settings, "rse_at")

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Insert the noise, in place.

        Raises:
            SiteError: the network has no convolution, or calls one more than once in a pass.
        """
        names = convolutions(probe(network, input_shape))
        if not names:
            raise SiteError("the network has no convolution, and RSE's noise goes before those; use learn2perturb")
        for sites, sigma in ((names[:1], self.sigma_init), (names[1:], self.sigma_inner)):
            if sites:
                perturb(
                    network, input_shape=input_shape, sites=sites, place="input", init=sigma, minimum=0.0,
                    granularity="layer", learned=False,
                )  # fmt: skip
        return network

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return one stage, or with ``restarts`` one for each learning rate of the schedule."""
        return restarted_stages(settings, sgd_optimizers(settings)) if self.restarts else super().stages(settings)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the clean cross-entropy, or with ``adversarial`` the recipe's objective."""
        if self.adversarial:
            return super().loss(model, x, y, clock, settings)
        return mixed_loss(model, x, y, clock, of_clean_images(settings))
