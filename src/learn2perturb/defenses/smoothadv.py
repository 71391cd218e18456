"""SmoothAdv (Salman et al. 2019): Gaussian noise on the image, and the averaged predictor trained as such.

Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers, https://arxiv.org/abs/1906.04584.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from learn2perturb.defenses.base import Defense
from learn2perturb.defenses.settings import OBJECTIVES, number
from learn2perturb.errors import ConfigError
from learn2perturb.noise import perturb_images


@final
@dataclass(frozen=True, kw_only=True)
class SmoothAdv(Defense):
    """``-log mean_k p(y | x' + sigma eps_k)``, x' by PGD on that same loss (eqs. 5 and 6).

    The loss is the setting ``loss`` with the value ``averaged``, of ``loss_draws`` draws, which noise on features can
    have too; this is it with noise on the image. The answer is the mean softmax over draws, and ``certify`` with
    ``first_noise`` gives the radius of Cohen et al. (2019).

    Args:
        sigma: standard deviation of the noise, [0, 1] pixel scale; 0.12, 0.25, 0.5 and 1 in the paper.

    Raises:
        ConfigError: sigma is not above 0.
    """

    predictor: ClassVar[str] = "mean_probability"
    members: ClassVar[int] = 50
    objectives: ClassVar[tuple[str, ...]] = OBJECTIVES

    sigma: float = 0.12

    def __post_init__(self) -> None:
        number("sigma", self.sigma, 0.0, math.inf)
        if self.sigma == 0:
            raise ConfigError("sigma is 0, so there is nothing to average over; the paper has 0.12 and more")

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Insert the noise on the image, in place."""
        return perturb_images(network, self.sigma, input_shape=input_shape)
